"""Fine-tuning: what is read, what is refused, what is trained, and the command from end to end."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard

from config.errors import UserError
from data.examples.docstrings import docstring_pairs, write_examples
from data.examples.reading import ChatExample, CompletionExample, TextExample, read_examples

CHAT = {
    "messages": [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "What does gcd do?"},
        {"role": "assistant", "content": "It finds the greatest common divisor."},
    ]
}


def write_lines(path: Path, *records: Any) -> Path:
    """Records as JSON lines; a string goes in as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_examples(path)
    return str(caught.value)


class TestReading:
    def test_each_format(self, tmp_path: Path) -> None:
        text = write_lines(tmp_path / "text.jsonl", {"text": "Once upon a time.", "id": 7})
        completion = write_lines(tmp_path / "completion.jsonl", {"prompt": "2 + 2 =", "completion": " 4"})
        chat = write_lines(tmp_path / "chat.jsonl", CHAT)
        assert read_examples(text) == [TextExample(f"{text}:1", "Once upon a time.")]
        assert read_examples(completion) == [CompletionExample(f"{completion}:1", "2 + 2 =", " 4")]
        assert read_examples(chat) == [ChatExample(f"{chat}:1", tuple(CHAT["messages"]))]

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
    def test_compressed_files_blank_lines_and_what_windows_writes(self, tmp_path: Path, suffix: str) -> None:
        content = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "\xc3\xbc"}'
        if suffix.endswith(".gz"):
            content = gzip.compress(content)
        elif suffix.endswith(".zst"):
            content = zstandard.compress(content)
        path = tmp_path / f"set{suffix}"
        path.write_bytes(content)
        assert read_examples(path) == [TextExample(f"{path}:1", "one"), TextExample(f"{path}:3", "ü")]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"text": "cut', "not valid JSON: "),
            ('{"text": "a"} {"text": "b"}', "not valid JSON: "),
            ("[1, 2]", "not an object but a list"),
            ('"text"', "not an object but a string"),
            ("null", "not an object but null"),
            ("{}", 'has none of "text", "prompt" with "completion", "messages" (its keys: none)'),
            ('{"instruction": "a", "output": "b"}', "its keys: instruction, output"),
            ('{"prompt": "a"}', 'has no "completion"'),
            ('{"completion": "a"}', 'has no "prompt"'),
            ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
            ('{"prompt": "a", "completion": " \\n"}', '"completion" is empty'),
            ('{"prompt": "", "completion": "a"}', '"prompt" is empty'),
            ('{"prompt": ["a"], "completion": "b"}', '"prompt" is a list, not a string'),
            ('{"text": 3}', '"text" is a number, not a string'),
            ('{"text": null}', '"text" is null, not a string'),
            ('{"text": "a", "messages": []}', "has the keys of two formats, text and messages"),
            ('{"messages": {}}', '"messages" is an object, not a list'),
            ('{"messages": []}', '"messages" is empty'),
            ('{"messages": ["hello"]}', "messages[0] is a string, not an object"),
            ('{"messages": [{"content": "a"}]}', 'messages[0] has no "role"'),
            ('{"messages": [{"role": "user"}]}', 'messages[0] has no "content"'),
            ('{"messages": [{"role": "human", "content": "a"}]}', "the role 'human'; the roles are system, user"),
            ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
            (
                '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
                'messages[1] "content" is empty',
            ),
            (
                '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
                "messages[1] is a system message; only the first",
            ),
        ],
    )
    def test_an_unusable_line_is_named_with_its_reason(self, tmp_path: Path, line: str, reason: str) -> None:
        path = write_lines(tmp_path / "set.jsonl", {"text": "good"}, line, {"text": "good"})
        message = refusal(path)
        assert message.startswith(f"1 of 3 lines of {path} cannot be used:\n  {path}:2: ")
        assert reason in message.splitlines()[1]

    def test_invalid_utf8_is_named_by_its_byte(self, tmp_path: Path) -> None:
        path = tmp_path / "set.jsonl"
        path.write_bytes(b'{"text": "gr\xfc\xdfe"}\n')
        assert f"{path}:1: not valid UTF-8 at byte 13" in refusal(path)

    def test_the_number_comes_first_and_ten_are_shown(self, tmp_path: Path) -> None:
        lines = [{"text": "good"} if number % 3 else "{bad" for number in range(60)]
        message = refusal(write_lines(tmp_path / "set.jsonl", *lines)).splitlines()
        assert message[0].startswith("20 of 60 lines")
        assert [line.split(":")[1] for line in message[1:11]] == [str(number) for number in range(1, 31, 3)]
        assert message[11] == "  and 10 more"
        assert "docs/finetuning.md" in message[12]
        assert len(message) == 13

    def test_a_huge_line_is_refused_without_being_held(self, tmp_path: Path) -> None:
        path = tmp_path / "set.jsonl"
        with open(path, "wb") as file:
            file.write(b'{"text": "')
            file.seek(40 << 20)
            file.write(b'"}\n{"text": "good"}\n')
        assert f"1 of 2 lines of {path} cannot be used:\n  {path}:1: the line is longer than 32 MiB" in refusal(path)

    def test_mixed_formats_are_counted_and_located(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "set.jsonl", {"text": "a"}, CHAT, {"text": "b"})
        message = refusal(path)
        assert f"{path} mixes formats: 2 are text (first: {path}:1); 1 are messages (first: {path}:2)" in message

    @pytest.mark.parametrize("content", ["", "\n \n\t\n"])
    def test_a_file_without_examples(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "set.jsonl"
        path.write_text(content)
        assert refusal(path).startswith(f"{path} holds no examples.")

    def test_a_file_that_is_missing_or_of_another_kind(self, tmp_path: Path) -> None:
        assert "There is no file" in refusal(tmp_path / "set.jsonl")
        (tmp_path / "folder.jsonl").mkdir()
        assert "There is no file" in refusal(tmp_path / "folder.jsonl")
        assert ".jsonl, .jsonl.gz, .jsonl.zst" in refusal(tmp_path / "set.csv")

    @pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
    def test_a_compressed_file_that_is_cut_short(self, tmp_path: Path, suffix: str) -> None:
        content = b"".join(b'{"text": "%d"}\n' % (number**9) for number in range(2000))
        packed = gzip.compress(content) if suffix.endswith("gz") else zstandard.compress(content)
        path = tmp_path / f"set{suffix}"
        path.write_bytes(packed[: len(packed) // 2])
        assert "is truncated" in refusal(path)


class TestDocstringExamples:
    def test_signature_and_first_sentence_of_public_functions(self, tmp_path: Path) -> None:
        module = tmp_path / "module.py"
        module.write_text(
            'def area(width: int, height=1, *more) -> int:\n    """Return the area.  Slowly.\n\n    More."""\n'
            'def _hidden():\n    """Return what nobody needs to know."""\n'
            'def bare(): ...\ndef half():\n    """This sentence goes on\n    and on."""\n'
            'class Box:\n    async def open(self):\n        """Open the box at once."""\n'
            '    def area(self):\n        """Return the area of the box."""\n'
            'def area(width: int, height=1, *more):\n    """Return something else entirely."""\n'
        )
        (tmp_path / "broken.py").write_text("def f(:\n")
        assert sorted(docstring_pairs([tmp_path / "broken.py", module])) == [
            ("def area(self):", "Return the area of the box."),
            ("def area(width: int, height=1, *more):", "Return the area.  Slowly."),
            ("def open(self):", "Open the box at once."),
        ]

    @pytest.mark.parametrize("form", ["prompt-completion", "messages"])
    def test_what_is_written_can_be_read(self, tmp_path: Path, form: Any) -> None:
        path = tmp_path / "set.jsonl"
        count = write_examples([Path(random.__file__)], form, path)
        examples = read_examples(path)
        assert len(examples) == count >= 5
        assert any("def shuffle(" in example.given for example in examples)
