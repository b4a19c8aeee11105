"""Examples in Parquet, and in columns of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config.errors import UserError
from data.examples.columns import Columns
from data.examples.reading import ChatExample, CompletionExample, Example, read_examples


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
    return path


def read(path: Path, *words: str) -> list[Example]:
    return read_examples(path, columns=Columns(words))


def refusal(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        read(path, *words)
    return str(caught.value)


ROWS = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}", "score": 0.5} for number in range(5)]


class TestParquet:
    def test_a_file_holds_a_row_per_example(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "set.parquet", ROWS)
        assert read(path) == [
            CompletionExample(f"{path}:{number}", f"{number} + 1 =", f" {number + 1}") for number in range(5)
        ]

    def test_a_folder_is_read_in_the_order_of_its_names(self, tmp_path: Path) -> None:
        write_table(tmp_path / "data/train-00001-of-00002.parquet", ROWS[2:])
        write_table(tmp_path / "data/train-00000-of-00002.parquet", ROWS[:2])
        (tmp_path / "README.md").write_text("about the set")
        assert [example.given for example in read(tmp_path)] == [row["prompt"] for row in ROWS]

    @pytest.mark.parametrize("other", ["data/test-00000-of-00001.parquet", "validation/0000.parquet"])
    def test_a_test_set_in_the_same_folder_is_not_trained_on(self, tmp_path: Path, other: str) -> None:
        write_table(tmp_path / "data/train-00000-of-00001.parquet", ROWS[:2])
        write_table(tmp_path / other, ROWS[2:])
        assert "are of several splits (train, " in refusal(tmp_path)

    def test_messages_are_lists_of_structures(self, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
        path = write_table(tmp_path / "set.parquet", [{"messages": [{**message, "id": 1} for message in messages]}])
        assert read(path) == [ChatExample(f"{path}:0", tuple(messages))]

    def test_bad_rows_are_named_by_file_and_row(self, tmp_path: Path) -> None:
        rows = [ROWS[0], {**ROWS[1], "completion": None}, {**ROWS[2], "prompt": " "}, ROWS[3]]
        path = write_table(tmp_path / "set.parquet", rows)
        assert refusal(path).splitlines()[:3] == [
            f"2 of 4 rows of {path} cannot be used:",
            f'  {path}:1: has no "completion"',
            f'  {path}:2: "prompt" is empty',
        ]

    def test_a_row_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "set.parquet"
        texts = pa.array([b"one", b"gr\xfc\xdfe", b"three"], pa.binary())
        broken = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
        pq.write_table(pa.table({"text": broken}), path)
        assert refusal(path).splitlines()[:2] == [
            f"1 of 3 rows of {path} cannot be used:",
            f"  {path}:1: cannot be read: text that is not valid UTF-8 at byte 3",
        ]

    def test_a_column_of_another_type(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "set.parquet", [{"text": b"bytes"}])
        assert f'{path}:0: "text" is of type bytes, not a string' in refusal(path)

    def test_a_file_cut_short_and_one_of_another_kind(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "set.parquet", ROWS)
        path.write_bytes(path.read_bytes()[:-30])
        assert f"{path}:0: cannot be read: " in refusal(path)
        path.write_text('{"text": "no Parquet"}')
        assert f"{path}:0: cannot be read: " in refusal(path)

    def test_a_file_without_rows_or_that_is_missing(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "set.parquet", [], pa.schema({"text": pa.string()}))
        assert refusal(path).startswith(f"{path} holds no examples.")
        assert "There is no file" in refusal(tmp_path / "none.parquet")


QUESTIONS = [{"question": f"{number}?", "answer": {"text": f"{number}!", "by": "me"}} for number in range(3)]


class TestColumns:
    @pytest.fixture(params=["jsonl", "parquet"])
    def questions(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / f"set.{request.param}"
        if request.param == "parquet":
            return write_table(path, QUESTIONS)
        path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        return path

    def test_columns_and_fields_of_them_stand_for_the_keys(self, questions: Path) -> None:
        found = read(questions, "prompt=question", "completion=answer.text")
        assert [
            (example.prompt, example.completion) for example in found if isinstance(example, CompletionExample)
        ] == [
            ("0?", "0!"),
            ("1?", "1!"),
            ("2?", "2!"),
        ]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["prompt=questoin", "completion=answer.text"], "of --map prompt=questoin. Did you mean 'question'?"),
            (["prompt=question", "completion=answer.txt"], "Did you mean 'answer.text'?"),
            (["prompt=question", "completion=xyz"], "Choose from: question, answer"),
        ],
    )
    def test_a_column_that_is_nowhere_is_refused_with_the_nearest(
        self, questions: Path, words: list[str], message: str
    ) -> None:
        assert message in refusal(questions, *words)

    def test_a_row_without_the_column_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "set.jsonl"
        path.write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n')
        assert f'{path}:2: has no "answer"' in refusal(path, "prompt=question", "completion=answer")

    def test_a_renamed_column_is_no_longer_under_its_own_name(self, tmp_path: Path) -> None:
        """A set of preferences can so be used for the chosen answers alone."""
        path = tmp_path / "set.jsonl"
        path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        assert read(path, "completion=chosen") == [CompletionExample(f"{path}:1", "a", "b")]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["prompt"], "--map prompt: write KEY=COLUMN"),
            (["prompt="], "--map prompt=: write KEY=COLUMN"),
            (["promt=question"], "no key 'promt'. Did you mean 'prompt'?"),
            (["prompt=a", "prompt=b"], "--map prompt=b: prompt is a already"),
        ],
    )
    def test_words_that_make_no_sense(self, words: list[str], message: str) -> None:
        with pytest.raises(UserError) as caught:
            Columns(words)
        assert message in str(caught.value)
