"""From YAML files and ``key=value`` overrides to a ``Config``; every mistake becomes one line that names its mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError, nearest


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` and apply overrides such as ``rollout.top_p=0.95`` in order.

    Raises ``UserError`` for a missing or malformed file, an unknown key (with the nearest valid one), a bad value.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], origin: str = "config") -> Config:
    """Validate a tree of plain values; ``origin`` names where it came from in error messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The effective tree as YAML, in the order of definition; reads back to an equal ``Config``."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold keys and values at the top level, not {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"override {override!r} is not of the form key=value, for example rollout.top_p=0.95")
    try:
        value = _plain_number(yaml.safe_load(text)) if text else None
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None
    *sections, leaf = key.strip().split(".")
    node = tree
    model: type[BaseModel] | None = Config
    for depth, section in enumerate(sections):
        model = _section_type(model, section, ".".join(sections[: depth + 1]))
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        node = child
    node[leaf] = value


def _plain_number(value: Any) -> Any:
    """YAML 1.1 reads ``5e-7`` as a string; everybody here means the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE.") and value.strip()[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _section_type(model: type[BaseModel] | None, section: str, dotted: str) -> type[BaseModel] | None:
    if model is None or section not in model.model_fields:
        valid = model.model_fields if model is not None else ()
        raise UserError(f"unknown key {dotted!r}{nearest(section, valid) if valid else ''}")
    annotation = model.model_fields[section].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(location[-1], _fields_of(location[:-1]))}{more}"
    if first["type"] == "missing":
        return f"{key} is missing: give it in the file or as an override {key}=VALUE{more}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{key}={first['input']!r}: {message}{more}"


def _fields_of(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
