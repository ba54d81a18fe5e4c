"""From YAML files and ``key=value`` overrides to a ``Config``; every mistake becomes one line that names its mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megatron_oreal.config import Config, VerifierConfig
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


def parse_verifier(tree: dict[str, Any], overrides: Sequence[str] = ()) -> VerifierConfig:
    """Validate a ``verifier`` section by itself; overrides name its keys, such as ``judge.timeout_s=9``."""
    whole: dict[str, Any] = {"verifier": tree}
    for override in overrides:
        _apply_override(whole, f"verifier.{override}")
    try:
        return VerifierConfig.model_validate(whole["verifier"])
    except ValidationError as error:
        raise UserError(_explain(error, ["verifier"])) from None


def dump_config(config: Config) -> str:
    """The effective tree as YAML, in the order of definition; reads back to an equal ``Config``."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which by itself takes the last of two equal keys and forgets the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; a key that stands in it twice is an error at the second, ``<<`` aside."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in lines:
                problem = f"the key {key.value!r} stands in line {lines[key.tag, key.value]} already: join the two"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


def _parse_yaml(text: str) -> Any:
    """Plain values; raises ``yaml.YAMLError`` alone.

    PyYAML lets other errors out for scalars that look like a date or number and are none (``2024-13-45``, ``0b_``).
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(" ".join(str(error).split())[:200]) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {str(path)!r} is a directory: give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold keys and values at the top level, not {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"override {override!r} is not of the form key=value, for example rollout.top_p=0.95")
    try:
        value = _parse_yaml(text) if text else None
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None
    *sections, leaf = key.strip().split(".")
    node = tree
    model: type[BaseModel] = Config
    for depth, section in enumerate(sections):
        dotted = ".".join(sections[: depth + 1])
        if section not in model.model_fields:
            raise UserError(f"unknown key {dotted!r}{nearest(section, model.model_fields)}")
        if get_origin(model.model_fields[section].annotation) is dict and depth == len(sections) - 1:
            free = node[section] = dict(node.get(section) or {})
            free[leaf] = value
            return
        child_model = _section_type(model, section)
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if child_model is None or not isinstance(child, dict):
            raise UserError(f"override {override!r}: {dotted} is a value, not a section")
        model, node = child_model, child
    node[leaf] = value


def _section_type(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class of a section, None for a key that holds a value."""
    annotation = model.model_fields[key].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _explain(error: ValidationError, section: Sequence[str] = ()) -> str:
    first = error.errors()[0]
    location = [*section, *(str(part) for part in first["loc"])]
    key = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(location[-1], _model_at(location[:-1]).model_fields)}{more}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return f"{'.'.join(location[:-1])}={first['input']!r}: too few values{more}"
    if first["type"] == "missing":
        key = _required_leaf(location)
        return f"{key} is missing: give it in the file or as an override {key}=VALUE{more}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "string_type":
        message += ": put it in quotes"
    if first["type"] == "list_type" and isinstance(first["input"], str | int | float):
        message += f": write [{first['input']}]"
    return f"{key}={first['input']!r}: {message}{more}"


def _required_leaf(location: list[str]) -> str:
    """Of a missing section, the first key that must be given; a missing key itself."""
    section = _section_type(_model_at(location[:-1]), location[-1])
    if section is not None:
        location = [*location, next(name for name, field in section.model_fields.items() if field.is_required())]
    return ".".join(location)


def _model_at(location: list[str]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for key in location:
        section = _section_type(model, key)
        assert section is not None, location
        model = section
    return model
