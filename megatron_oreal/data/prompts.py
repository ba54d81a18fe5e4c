"""Prompt sets: JSON lines, parquet or a Hugging Face data set in; checked ``Prompt`` objects out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError, seen_from

JSON_SUFFIXES = (".jsonl", ".json")
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<split>\w[^/]*))?")


class _Row(NamedTuple):
    """One record as it was read, and where: ``unit`` is ``line`` or ``row``, ``number`` counts from 1."""

    source: str
    unit: str
    number: int
    value: Any

    @property
    def where(self) -> str:
        return f"{self.source} {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with a worked solution, for the supervised phase."""

    question: str
    solution: str


def load_prompts(source: str | Path) -> list[Prompt]:
    """Read a prompt set: columns ``question``, ``gold_answer`` and optionally ``pass_rate`` and ``id``.

    ``source`` is a ``.jsonl``/``.json`` file of JSON lines, a ``.parquet`` file, a directory written by
    ``datasets.Dataset.save_to_disk``, or a Hugging Face data set ``owner/name``; the last two take ``:split`` (default
    ``train``). A missing ``id`` becomes ``<name>:<line or row>``, which the file's order alone determines. Other
    columns are ignored.

    Raises ``UserError``, with the file and the line or row, for a missing source, malformed JSON, a column that is
    missing, blank or of the wrong type, a ``pass_rate`` outside [0, 1], a repeated ``id``, or a set without prompts.
    """
    prompts: list[Prompt] = []
    first_use: dict[str, str] = {}
    for row in _rows(str(source)):
        record, where = _mapping(row), row.where
        prompt = Prompt(
            id=_identifier(record, where) or f"{Path(row.source).stem}:{row.number}",
            question=_text(record, "question", where),
            gold_answer=_text(record, "gold_answer", where),
            pass_rate=_pass_rate(record, where),
        )
        if prompt.id in first_use:
            raise UserError(f"{where}: id {prompt.id!r} was used at {first_use[prompt.id]}: ids must be unique")
        first_use[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source}: the data set has no prompts")
    return prompts


def load_examples(source: str | Path) -> list[Example]:
    """Read ``question`` and ``solution`` from the same kinds of source as ``load_prompts``, with the same errors."""
    examples = []
    for row in _rows(str(source)):
        record, where = _mapping(row), row.where
        examples.append(Example(_text(record, "question", where), _text(record, "solution", where)))
    if not examples:
        raise UserError(f"{source}: the data set has no examples")
    return examples


# Sources


def _rows(source: str) -> Iterator[_Row]:
    """Yield the records of any supported source, each with the place it came from."""
    try:
        yield from _source(source)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or _one_line(error)})") from None


def _source(source: str) -> Iterator[_Row]:
    path = Path(source)
    if path.is_file():
        if path.suffix in JSON_SUFFIXES:
            return _json_lines(path)
        if path.suffix == ".parquet":
            return _parquet(path)
        raise UserError(f"{source}: unknown kind of file {path.suffix!r}: use .jsonl, .json or .parquet")
    directory, split = _split_suffix(source)
    if Path(directory).is_dir():
        return _saved_data_set(Path(directory), split)
    match = _HUB_NAME.fullmatch(source)
    if match is None or path.suffix in (*JSON_SUFFIXES, ".parquet"):
        raise UserError(f"{source}: no such file or directory{seen_from(path)}")
    return _hub_data_set(match["name"], match["split"] or "train")


def _split_suffix(source: str) -> tuple[str, str]:
    name, colon, split = source.rpartition(":")
    return (name, split) if colon else (source, "train")


def _json_lines(path: Path) -> Iterator[_Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _Row(str(path), "line", number, json.loads(line.decode("utf-8-sig")))
            except UnicodeDecodeError:
                raise UserError(f"{path} line {number}: not UTF-8 text") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path} line {number}: malformed JSON ({error}): expects one JSON object a line"
                ) from None


def _parquet(path: Path) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_one_line(error)})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield _Row(str(path), "row", number, row)


def _saved_data_set(path: Path, split: str) -> Iterator[_Row]:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise UserError(f"{path}: a directory, but not one written by datasets' save_to_disk: name a file in it")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{path}: not a readable data set ({_one_line(error)})") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{path}: has no split {split!r}: append one of {', '.join(':' + name for name in loaded)}")
        loaded = loaded[split]
    return _data_set_rows(loaded, str(path))


def _hub_data_set(name: str, split: str) -> Iterator[_Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # hub, network, cache and data-set scripts each raise types of their own
        raise UserError(
            f"data set {name!r} (split {split!r}) is no local file and could not be loaded from the Hugging Face hub "
            f"({_one_line(error)}): check the name and the network, or give a local file"
        ) from None
    return _data_set_rows(loaded, name)


def _data_set_rows(data_set: Any, name: str) -> Iterator[_Row]:
    for number, row in enumerate(data_set, start=1):
        yield _Row(name, "row", number, row)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# Columns


def _mapping(row: _Row) -> Mapping[str, Any]:
    if not isinstance(row.value, Mapping):
        raise UserError(f"{row.where}: expects a JSON object with named columns, found {type(row.value).__name__}")
    return row.value


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    if record.get(column) is None:
        raise UserError(
            f"{where}: column {column!r} is missing (columns here: {', '.join(map(str, record)) or 'none'})"
        )
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} must be text, found {type(value).__name__} {value!r}: quote it")
    if not value.strip():
        raise UserError(f"{where}: column {column!r} is blank")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{where}: column {column!r} has an unpaired surrogate, which no tokenizer can encode: remove it"
        )
    return value


def _pass_rate(record: Mapping[str, Any], where: str) -> float | None:
    value = record.get("pass_rate")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: column 'pass_rate' must be a number, found {type(value).__name__} {value!r}")
    if not 0.0 <= value <= 1.0:  # NaN fails too
        raise UserError(f"{where}: pass_rate={value} is outside [0, 1]")
    return float(value)


def _identifier(record: Mapping[str, Any], where: str) -> str | None:
    value = record.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: column 'id' must be text or an integer, found {type(value).__name__} {value!r}")
    if not str(value).strip():
        raise UserError(f"{where}: column 'id' is blank")
    return str(value)
