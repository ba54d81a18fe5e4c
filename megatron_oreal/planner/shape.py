"""Where a plan reads the model's shape: one config.json, no weights."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec, load_model_spec


def read_shape(model_path: str, config_file: str | Path, given: str | None) -> tuple[ModelSpec, Path]:
    """Return the shape and the directory that it was read from.

    ``given`` (``--model-shape``) is the only place looked at where it is set. Else ``model_path`` when it has a
    config.json, else the committed shape of that name beside the config file:
    ``<directory of the config file>/../models/<last part of model_path>``. ``UserError`` names all places tried.
    """
    if given is not None:
        return load_model_spec(given), Path(given)
    name = os.path.basename(os.path.normpath(model_path))
    places = [Path(model_path), Path(config_file).resolve().parent.parent / "models" / name]
    for place in places:
        if (place / "config.json").is_file():
            return load_model_spec(place), place
    tried = " and ".join(str(place / "config.json") for place in places)
    raise UserError(
        f"model.path={model_path!r}: the shape of the model is not known ({tried} do not exist): "
        "give --model-shape DIR with the model's config.json"
    )
