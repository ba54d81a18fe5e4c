from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_oreal.data.prompts import Example, load_examples, load_prompts
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError

ROWS = [
    {"id": "a", "question": "1+1?", "gold_answer": "2", "pass_rate": 0.25},
    {"id": "b", "question": "½ of π?", "gold_answer": "\\frac{\\pi}{2}", "pass_rate": 1},
    {"id": "c", "question": "0?", "gold_answer": "0", "pass_rate": None, "extra": [1]},
]
PROMPTS = [
    Prompt("a", "1+1?", "2", 0.25),
    Prompt("b", "½ of π?", "\\frac{\\pi}{2}", 1.0),
    Prompt("c", "0?", "0", None),
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(source) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines_are_read(tmp_path, suffix):
    assert load_prompts(write_lines(tmp_path / f"p.{suffix}", ROWS)) == PROMPTS


def test_blank_lines_and_a_byte_order_mark_are_harmless(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\r\n" + json.dumps(ROWS[2]).encode())
    assert load_prompts(path) == [PROMPTS[0], PROMPTS[2]]


def test_parquet_is_read(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([{k: v for k, v in row.items() if k != "extra"} for row in ROWS]), tmp_path / "p.parquet"
    )
    assert load_prompts(tmp_path / "p.parquet") == PROMPTS


def test_a_saved_hugging_face_data_set_is_read_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "extra"} for row in ROWS])
    rows.save_to_disk(tmp_path / "one")
    assert load_prompts(tmp_path / "one") == PROMPTS
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "many")
    assert load_prompts(tmp_path / "many") == PROMPTS
    assert load_prompts(f"{tmp_path / 'many'}:test") == [PROMPTS[1]]
    assert "no split 'dev'" in refused(f"{tmp_path / 'many'}:dev")


def test_ids_default_to_the_name_and_line_and_do_not_change_between_reads(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [{k: v for k, v in row.items() if k != "id"} for row in ROWS])
    assert [p.id for p in load_prompts(path)] == ["train:1", "train:2", "train:3"]
    assert load_prompts(path) == load_prompts(path)


def test_integer_ids_become_text(tmp_path):
    assert load_prompts(write_lines(tmp_path / "p.jsonl", [ROWS[0] | {"id": 7}]))[0].id == "7"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": None}, ["'question' is missing", "gold_answer"]),
        ({"question": "  \n"}, ["'question' is blank"]),
        ({"question": 3}, ["'question' must be text", "int 3"]),
        ({"question": "\ud800"}, ["'question'", "surrogate"]),
        ({"gold_answer": 42}, ["'gold_answer' must be text", "int 42"]),
        ({"gold_answer": ""}, ["'gold_answer' is blank"]),
        ({"pass_rate": 1.5}, ["pass_rate=1.5", "[0, 1]"]),
        ({"pass_rate": -0.1}, ["pass_rate=-0.1", "[0, 1]"]),
        ({"pass_rate": float("nan")}, ["pass_rate=nan", "[0, 1]"]),
        ({"pass_rate": "0.5"}, ["'pass_rate' must be a number", "'0.5'"]),
        ({"pass_rate": True}, ["'pass_rate' must be a number", "bool"]),
        ({"id": "a"}, ["id 'a'", "line 1"]),
        ({"id": ""}, ["'id' is blank"]),
        ({"id": [1]}, ["'id' must be text or an integer"]),
    ],
)
def test_a_bad_column_is_refused_with_file_and_line(tmp_path, change, words):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0], ROWS[1] | change]))
    message = refused(path)
    assert f"{path} line 2" in message
    for word in words:
        assert word in message


def test_a_bad_column_in_parquet_is_refused_with_file_and_row(tmp_path):
    pq.write_table(pa.table({"question": ["q", "q"], "gold_answer": ["1", None]}), tmp_path / "p.parquet")
    assert f"{tmp_path / 'p.parquet'} row 2: column 'gold_answer' is missing" in refused(tmp_path / "p.parquet")


def test_malformed_json_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"question": "cut\n')
    assert f"{path} line 2: malformed JSON" in refused(path)
    path.write_text("[1, 2]\n")
    assert f"{path} line 1: expects a JSON object with named columns, found list" in refused(path)
    path.write_text("[" * 100_000 + "\n")
    assert f"{path} line 1: malformed JSON" in refused(path)
    path.write_bytes(b'{"question": "\xff"}\n')
    assert f"{path} line 1: not UTF-8" in refused(path)


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.jsonl")
    assert "no such file" in refused("train.parquet")
    assert "unknown kind of file '.csv'" in refused(write_lines(tmp_path / "p.csv", ROWS))
    (tmp_path / "p.parquet").write_text("not parquet")
    assert "not a readable parquet file" in refused(tmp_path / "p.parquet")
    assert "save_to_disk" in refused(tmp_path)
    assert "no prompts" in refused(write_lines(tmp_path / "empty.jsonl", []))
    assert "cannot be read (File name too long)" in refused("n" * 300 + ".jsonl")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    """Root may read everything; so the system call is refused instead."""
    path = write_lines(tmp_path / "p.jsonl", ROWS)
    opened = Path.open

    def refusing(self, *arguments, **options):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    assert refused(path) == f"{path}: cannot be read (Permission denied)"


def test_an_unreachable_hub_is_one_clear_line(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = refused("internlm/OREAL-RL-Prompts:dev")
    assert "'internlm/OREAL-RL-Prompts' (split 'dev')" in message
    assert "hub" in message
    assert "local file" in message


def test_examples_need_a_solution(tmp_path):
    path = write_lines(tmp_path / "sft.jsonl", [{"question": "q", "solution": "s"}])
    assert load_examples(path) == [Example("q", "s")]
    with pytest.raises(UserError, match="line 1: column 'solution' is missing"):
        load_examples(write_lines(tmp_path / "bad.jsonl", [{"question": "q"}]))
    with pytest.raises(UserError, match="no examples"):
        load_examples(write_lines(tmp_path / "empty.jsonl", []))
