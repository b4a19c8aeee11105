"""Fine-tuning: what is read, what is refused, what is trained, and the command from end to end."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config
from data.data_loader import IGNORED
from data.examples.docstrings import docstring_pairs, write_examples
from data.examples.encoding import Encoded, EncodedExamples, encode_example, encode_examples, split_answer
from data.examples.preview import render, segments
from data.examples.reading import ChatExample, CompletionExample, Example, TextExample, read_examples
from data.examples.samples import ExampleSamples, hold_out, refuse_shared_prompts
from data.tokenization import Tokenizer, train_tokenizer
from evaluation.examples import evaluate_samples
from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from model.checkpoint import load_checkpoint, load_model
from tests import commands
from tests.workspace import TEXTS, Workspace, make_workspace, small_tokenizer

ROOT = Path(__file__).parents[1]

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
            ("{}", '"messages", "chosen" with "rejected" (its keys: none; --map KEY=COLUMN'),
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
        (tmp_path / "folder").mkdir()
        assert "holds no Parquet files, and is no downloaded set" in refusal(tmp_path / "folder")
        assert ".jsonl, .jsonl.gz, .jsonl.zst and .parquet files" in refusal(tmp_path / "set.csv")

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


@pytest.fixture(scope="module", params=["bpe", "sentencepiece-unigram", "sentencepiece-bpe"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    size = 300 if request.param == "bpe" else 340
    overrides = [f"data.tokenizer.kind={request.param}", f"data.tokenizer.vocab_size={size}"]
    return train_tokenizer(iter(TEXTS), load_config([], overrides).data.tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def completion(prompt: str, completion: str, line: int = 1) -> CompletionExample:
    return CompletionExample(f"set.jsonl:{line}", prompt, completion)


def chat(*turns: str, system: str | None = None) -> ChatExample:
    """Turns of user and assistant by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return ChatExample("set.jsonl:1", tuple(messages))


def trained_text(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    return [text for text, trained in segments(tokenizer, encoded) if trained]


class TestEncoding:
    def test_only_the_completion_and_its_end_are_trained(self, any_tokenizer: Tokenizer) -> None:
        encoded = encode_example(any_tokenizer, completion("The quick brown", " fox jumps"))
        assert segments(any_tokenizer, encoded) == [("The quick brown", False), (" fox jumps<|endoftext|>", True)]
        assert encoded.ids[-1] == any_tokenizer.end_of_text_id

    def test_the_prompt_has_the_ids_it_has_when_asked(self, any_tokenizer: Tokenizer) -> None:
        """Encoded as one, prompt and completion might share a token, which no prompt ever ends in."""
        encoded = encode_example(any_tokenizer, completion("qui", "ck"))
        prompt, answer = split_answer(encoded)
        assert prompt.tolist() == any_tokenizer.encode("qui")
        assert answer[-1] == any_tokenizer.end_of_text_id

    def test_every_token_of_a_text_is_trained_the_first_one_too(self, any_tokenizer: Tokenizer) -> None:
        encoded = encode_example(any_tokenizer, TextExample("set.jsonl:1", "The quick brown fox"))
        assert segments(any_tokenizer, encoded) == [
            ("<|endoftext|>", False),
            ("The quick brown fox<|endoftext|>", True),
        ]

    def test_every_turn_of_the_assistant_and_its_end_are_trained(self, any_tokenizer: Tokenizer) -> None:
        encoded = encode_example(any_tokenizer, chat("Hello", "Good day", "Bye", "See you", "?", system="Be brief"))
        assert segments(any_tokenizer, encoded) == [
            ("<|system|>Be brief<|end|><|user|>Hello<|end|><|assistant|>", False),
            ("Good day<|end|>", True),
            ("<|user|>Bye<|end|><|assistant|>", False),
            ("See you<|end|>", True),
            ("<|user|>?<|end|>", False),
        ]
        prompt, answer = split_answer(encoded)
        assert any_tokenizer.decode(prompt).endswith("Bye<|end|><|assistant|>")
        assert any_tokenizer.decode(answer) == "See you<|end|>"

    def test_special_tokens_that_somebody_wrote_stay_text(self, tokenizer: Tokenizer) -> None:
        for example in (completion("a<|endoftext|>", "b<|end|>c"), chat("a<|assistant|>", "b<|end|>c")):
            encoded = encode_example(tokenizer, example)
            found = np.isin(encoded.ids, list(tokenizer.special_tokens.values()))
            assert found.sum() == (1 if isinstance(example, CompletionExample) else 4)

    @settings(max_examples=50, deadline=None)
    @given(prompt=st.text(min_size=1), answer=st.text(min_size=1))
    def test_any_text_comes_back_split_where_it_was(self, prompt: str, answer: str) -> None:
        tokenizer = _cached_tokenizer()
        given_, trained = segments(tokenizer, encode_example(tokenizer, completion(prompt, answer)))
        assert given_ == (prompt, False)
        assert trained == (answer + "<|endoftext|>", True)

    def test_preview_brackets_what_is_trained(self, tokenizer: Tokenizer) -> None:
        text = render(tokenizer, encode_example(tokenizer, completion("2 + 2 =", " 4")))
        assert text.plain == "2 + 2 =⟦ 4<|endoftext|>⟧"
        assert text.spans[0].style != text.spans[1].style


_CACHE: list[Tokenizer] = []


def _cached_tokenizer() -> Tokenizer:
    """Hypothesis does not go with fixtures of a function's scope; the tokenizer does not change."""
    if not _CACHE:
        _CACHE.append(small_tokenizer())
    return _CACHE[0]


class TestTooLong:
    """The context holds 20 tokens: inputs and targets of 20 each, so an example of 21."""

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], too_long: Any) -> EncodedExamples:
        return encode_examples(tokenizer, examples, 20, too_long)

    def exact(self, tokenizer: Tokenizer, tokens: int) -> CompletionExample:
        """A prompt of one token and a completion such that the example has `tokens`."""
        example = completion("x", "ü" * ((tokens - 2) // 2) + "~" * ((tokens - 2) % 2))
        assert len(encode_example(tokenizer, example).ids) == tokens
        return example

    @pytest.fixture
    def plain(self, tokenizer: Tokenizer) -> Tokenizer:
        """Texts of rare characters, so that a byte is a token."""
        assert len(tokenizer.encode("~ü~")) == 4
        return tokenizer

    def test_refused_by_default_with_count_longest_and_choices(self, plain: Tokenizer) -> None:
        examples = [self.exact(plain, size) for size in (21, 22, 30)]
        with pytest.raises(UserError) as caught:
            self.encode(plain, examples, load_config().data.finetuning.too_long)
        message = str(caught.value)
        assert message.startswith(
            "2 of 3 examples are longer than the model's context of 20 tokens; the longest has 30"
        )
        assert "too_long=truncate" in message and "too_long=drop" in message
        assert len(self.encode(plain, examples[:1], "refuse").samples) == 1

    def test_dropped_ones_are_named(self, plain: Tokenizer) -> None:
        examples = [completion("x", "~", line=1), completion("x", "~" * 40, line=2)]
        result = self.encode(plain, examples, "drop")
        assert (len(result.samples), result.too_long, result.dropped) == (1, 1, ["set.jsonl:2"])
        assert result.examples == examples[:1]

    @pytest.mark.parametrize("too_long", ["refuse", "drop", "truncate"])
    def test_when_none_fits(self, plain: Tokenizer, too_long: str) -> None:
        with pytest.raises(UserError, match="All 2 examples are longer than the model's context of 20 tokens"):
            self.encode(plain, [completion("x", "~" * 40), completion("y", "~" * 40)], too_long)

    def test_a_prompt_loses_its_beginning_the_completion_nothing(self, plain: Tokenizer) -> None:
        result = self.encode(plain, [completion("~" * 100 + "end", "ü!")], "truncate")
        (encoded,) = result.samples
        assert len(encoded.ids) == 21
        assert ("~" * 100 + "endü!<|endoftext|>").endswith(plain.decode(encoded.ids))
        assert trained_text(plain, encoded) == ["ü!<|endoftext|>"]
        assert (result.shortened, result.dropped) == (1, [])

    @pytest.mark.parametrize(("completion_tokens", "kept"), [(20, True), (21, False)])
    def test_a_completion_is_kept_whole_or_left_out(self, plain: Tokenizer, completion_tokens: int, kept: bool) -> None:
        example = completion("~" * 50, "~" * (completion_tokens - 1), line=9)
        result = self.encode(plain, [completion("a", "b"), example], "truncate")
        assert len(result.samples) == 1 + kept
        assert result.dropped == ([] if kept else ["set.jsonl:9"])
        if kept:
            assert trained_text(plain, result.samples[1]) == ["~" * (completion_tokens - 1) + "<|endoftext|>"]

    def test_every_token_of_a_long_text_is_trained_once(self, plain: Tokenizer) -> None:
        text = "".join(chr(0x100 + number) for number in range(50))
        result = self.encode(plain, [TextExample("set.jsonl:1", text)], "truncate")
        assert max(len(encoded.ids) for encoded in result.samples) == 21
        trained = [token for encoded in result.samples for token in encoded.ids[encoded.trained]]
        assert plain.decode(trained) == text + "<|endoftext|>"
        assert len(result.examples) == len(result.samples) == 6

    def test_a_conversation_loses_whole_turns_and_keeps_its_system_message(self, plain: Tokenizer) -> None:
        example = chat("~" * 9, "ü~", "a~~~", "b~~", "c~", "d~", system="!")
        result = self.encode(plain, [example], "truncate")
        (encoded,) = result.samples
        text = plain.decode(encoded.ids)
        assert text == "<|system|>!<|end|><|user|>c~<|end|><|assistant|>d~<|end|>"
        assert (result.shortened, result.untrained_turns) == (1, 2)
        impossible = chat("a", "b", "c", "~" * 30)
        assert self.encode(plain, [example, impossible], "truncate").dropped == ["set.jsonl:1"]


class TestSamples:
    def test_inputs_and_targets_are_shifted_masked_and_padded(self, tokenizer: Tokenizer) -> None:
        examples = [completion("~~~", "!!"), completion("~", "?")]
        encoded = encode_examples(tokenizer, examples, 32, "refuse").samples
        samples = ExampleSamples(encoded, tokenizer.pad_id, 32)
        tilde, mark, query = (tokenizer.encode(character)[0] for character in "~!?")
        end, pad = tokenizer.end_of_text_id, tokenizer.pad_id
        inputs, targets = samples.sample(0)
        assert inputs.tolist() == [tilde, tilde, tilde, mark, mark, pad, pad, pad]
        assert targets.tolist() == [IGNORED, IGNORED, mark, mark, end, IGNORED, IGNORED, IGNORED]
        inputs, targets = samples.sample(1)
        assert inputs.tolist() == [tilde, query] + [pad] * 6
        assert targets.tolist() == [query, end] + [IGNORED] * 6
        assert (len(samples), samples.tokens, samples.trained_tokens, samples.length) == (2, 9, 5, 8)

    def test_never_longer_than_the_context(self, tokenizer: Tokenizer) -> None:
        encoded = encode_examples(tokenizer, [completion("~" * 5, "!" * 5)], 10, "refuse").samples
        assert ExampleSamples(encoded, tokenizer.pad_id, 10).length == 10

    def test_the_fingerprint_tells_sets_apart(self, tokenizer: Tokenizer) -> None:
        def fingerprint(*pairs: tuple[str, str]) -> str:
            encoded = encode_examples(tokenizer, [completion(*pair) for pair in pairs], 32, "refuse").samples
            return ExampleSamples(encoded, tokenizer.pad_id, 32).fingerprint

        sets = [(("~", "!!"),), (("~!", "!"),), (("~", "!"), ("~", "!")), (("~", "!?"),)]
        assert len({fingerprint(*pairs) for pairs in sets}) == len(sets)
        assert fingerprint(*sets[0]) == fingerprint(*sets[0])


class TestHoldingOut:
    examples = [completion(f"prompt {number % 50}", f" {number}", number) for number in range(150)]

    def test_a_share_of_the_prompts_never_one_on_both_sides(self) -> None:
        held = hold_out(self.examples, 0.1)
        prompts = {example.given for example, out in zip(self.examples, held) if out}
        assert len(prompts) == 5
        assert held.sum() == 15, "all three examples of a prompt go together"

    def test_the_order_of_the_file_does_not_matter(self) -> None:
        shuffled = random.Random(3).sample(self.examples, len(self.examples))
        one = {example.location for example, out in zip(self.examples, hold_out(self.examples, 0.1)) if out}
        other = {example.location for example, out in zip(shuffled, hold_out(shuffled, 0.1)) if out}
        assert one == other

    def test_few_examples(self) -> None:
        assert hold_out(self.examples[:2], 0.1).sum() == 1
        assert hold_out(self.examples[:2], 0.99).sum() == 1
        for few in (self.examples[:1], [self.examples[0], self.examples[50]]):
            with pytest.raises(UserError, match="have one prompt between them.*--validation"):
                hold_out(few, 0.1)

    def test_a_validation_file_may_not_share_prompts(self) -> None:
        train, validation = self.examples[:10], self.examples[9:20]
        with pytest.raises(UserError, match="1 of 11 prompts in val.jsonl are trained on as well.*set.jsonl:9"):
            refuse_shared_prompts(train, validation, Path("val.jsonl"))
        refuse_shared_prompts(train, self.examples[10:20], Path("val.jsonl"))

    def test_what_belongs_together(self) -> None:
        assert chat("a", "b").given == chat("a", "c", "d", "e").given != chat("a", "b", system="s").given


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("finetuning"), "model.context_length=48", "model.init_std=0.05")


@pytest.fixture(scope="module")
def samples(workspace: Workspace) -> ExampleSamples:
    pairs = [completion("~" * (number % 7 + 1), "!?" * (number % 5 + 1)) for number in range(11)]
    encoded = encode_examples(workspace.tokenizer, pairs, 48, "refuse").samples
    return ExampleSamples(encoded, workspace.tokenizer.pad_id, 48)


class TestEvaluation:
    def reference(self, workspace: Workspace, samples: ExampleSamples) -> float:
        """Trained tokens of each example alone, without padding or batching."""
        total = 0.0
        for index in range(len(samples)):
            ids, trained = samples.encoded(index)
            with torch.no_grad():
                logits = workspace.model(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0].double()
            losses = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:]).long()]
            total += float(losses[torch.from_numpy(trained[1:])].sum())
        return total / samples.trained_tokens

    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_the_mean_over_trained_tokens_whatever_the_batch(
        self, workspace: Workspace, samples: ExampleSamples, batch_size: int
    ) -> None:
        found = evaluate_samples(workspace.model, samples, batch_size=batch_size, device="cpu")
        assert found.loss == pytest.approx(self.reference(workspace, samples), rel=1e-5)
        assert found.tokens == samples.trained_tokens
        assert found.loss_interval is not None and found.loss_interval[0] < found.loss < found.loss_interval[1]

    def test_processes_share_the_examples(self, workspace: Workspace, samples: ExampleSamples) -> None:
        shares: list[torch.Tensor] = []
        for rank in (0, 1):
            evaluate_samples(
                workspace.model,
                samples,
                batch_size=3,
                device="cpu",
                rank=rank,
                world_size=2,
                all_reduce=lambda sums: shares.append(sums.clone()),
            )
        assert ((shares[0] > 0) & (shares[1] > 0)).sum() == 0
        whole = evaluate_samples(workspace.model, samples, batch_size=3, device="cpu").block_sums
        assert np.allclose((shares[0] + shares[1]).numpy(), whole)

    def test_the_model_keeps_its_mode(self, workspace: Workspace, samples: ExampleSamples) -> None:
        workspace.model.train()
        evaluate_samples(workspace.model, samples, batch_size=3, device="cpu")
        assert workspace.model.training
        workspace.model.eval()


QUICK = [
    "training.batch_size=8",
    "training.micro_batch_size=8",
    "training.adamw.learning_rate=0.01",
    "training.schedule.warmup_steps=2",
    "training.wandb.mode=off",
    "training.device=cpu",
    "training.sample_interval=0",
    "data.finetuning.validation_fraction=0.2",
]
ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot", "bee": "buzz", "duck": "quack", "pig": "oink"}


def command(folder: Path, *arguments: str, script: str = "scripts/finetune.py") -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def here(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The same command line in this process: exit status, standard output and error."""
    done = commands.here(folder, "scripts/finetune.py", *arguments, status=None)
    return done.returncode, done.stdout, done.stderr


def fresh(folder: Path, *overrides: str) -> Path:
    """A pre-trained model in `folder`, and examples of its own."""
    make_workspace(folder, "model.context_length=48", "model.init_std=0.05", *overrides)
    pairs = [{"prompt": f"The {animal} says", "completion": f" {sound}!"} for animal, sound in ANIMALS.items()]
    write_lines(folder / "animals.jsonl", *pairs)
    return folder


UNEVEN = [{"prompt": f"{number}", "completion": "~" * (1 + 9 * (number % 4))} for number in range(20)]
"""One trained token beside many: each weighs the same, in whichever micro-batch or process it lies."""
# A large eps keeps AdamW from making a step of the sign of a rounding error.
EXACT = ["training.precision=fp32", "training.adamw.eps=0.01", "training.epochs=null", "training.max_steps=2"]


def assert_same_weights(left: Path, right: Path) -> None:
    """The same after two steps, but for rounding."""
    weights = [load_checkpoint(folder / "model_step_2.pt")["model"] for folder in (left, right)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder after fine-tuning, validated on other prompts, and what the command printed."""
    folder = fresh(tmp_path_factory.mktemp("tuned"))
    pairs = [{"prompt": f"So the {animal} said", "completion": f" {sound}!"} for animal, sound in ANIMALS.items()]
    write_lines(folder / "val.jsonl", *pairs)
    files = ["--dataset", "animals.jsonl", "--validation", "val.jsonl"]
    lasting = ["training.epochs=60", "training.checkpoint_interval=20", "training.keep_last=9"]
    status, output, errors = here(folder, *files, *QUICK, *lasting)
    assert status == 0, errors
    return folder, output


class TestCommand:
    def test_it_learns_to_answer_and_to_stop(self, tuned: tuple[Path, str]) -> None:
        folder, _ = tuned
        model, info = load_model(folder / "checkpoints/finetuned/model_step_60.pt")
        tokenizer = small_tokenizer()
        requests = [
            Request(tokenizer.encode(f"The {animal} says"), 20, SamplingSettings(temperature=0.0)) for animal in ANIMALS
        ]
        texts, ends = [""] * len(ANIMALS), [""] * len(ANIMALS)
        for piece in Engine(model, tokenizer, 8).generate(requests):
            texts[piece.sequence] += piece.text
            ends[piece.sequence] = piece.finish or ""
        assert texts == [f" {sound}!" for sound in ANIMALS.values()]
        assert set(ends) == {"stop"}
        assert info.finetuning is not None
        assert info.finetuning["format"] == "prompt-completion"
        assert info.finetuning["start"] == "checkpoints/model_step_7.pt"

    def test_it_says_what_it_learnt_wrote_and_what_comes_next(self, tuned: tuple[Path, str]) -> None:
        folder, output = tuned
        assert "7 examples to train on, 7 held out" in output
        match = re.search(r"Loss on 7 held-out examples: ([\d.]+) before, ([\d.]+) after", output)
        assert match is not None and float(match[2]) < float(match[1]) - 0.5
        assert output.splitlines()[-1] == (
            "Next: python scripts/generate.py --checkpoint checkpoints/finetuned/model_step_60.pt"
            " --prompt 'So the cat said'"
        )
        assert (folder / "checkpoints/model_step_7.pt").exists(), "the start stays where it was"

    def test_a_resumed_run_ends_in_the_same_weights(self, tuned: tuple[Path, str], tmp_path: Path) -> None:
        """Without naming set or settings again: a checkpoint knows them."""
        folder = tmp_path / "copy"
        shutil.copytree(tuned[0], folder)
        checkpoints = folder / "checkpoints/finetuned"
        whole = load_checkpoint(checkpoints / "model_step_60.pt")["model"]
        status, output, _ = here(folder, "--resume", "checkpoints/finetuned/model_step_20.pt")
        assert status == 0
        assert (checkpoints / "model_step_60.pt").stat().st_mtime > (tuned[0] / "animals.jsonl").stat().st_mtime
        resumed = load_checkpoint(checkpoints / "model_step_60.pt")["model"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        before = re.search(r"examples: ([\d.]+ before, [\d.]+ after)", tuned[1])
        assert before is not None and before[1] in output

    def test_another_set_is_refused_on_resume(self, tuned: tuple[Path, str]) -> None:
        folder, _ = tuned
        write_lines(folder / "other.jsonl", *[{"prompt": f"{animal}?", "completion": " no"} for animal in ANIMALS])
        status, _, errors = here(folder, "--resume", "latest", "--dataset", "other.jsonl")
        assert status == 1
        assert "training data is not what" in errors

    def test_chat_is_previewed_learnt_and_remembered(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        records = [{"messages": list(chat(f"{animal}?", f"{sound}!").messages)} for animal, sound in ANIMALS.items()]
        write_lines(folder / "chat.jsonl", *records)
        status, preview, _ = here(folder, "--dataset", "chat.jsonl", "--preview", "2")
        shown = [f"<|user|>{animal}?<|end|><|assistant|>⟦{sound}!<|end|>⟧" for animal, sound in ANIMALS.items()]
        assert status == 0
        assert sum(line in shown for line in preview.splitlines()) == 2
        assert not (folder / "runs").exists()

        once = ["training.epochs=1", "training.sample_interval=1"]
        status, output, errors = here(folder, "--dataset", "chat.jsonl", *QUICK, *once)
        assert status == 0
        assert output.splitlines()[-1].split(" --prompt ")[1].strip("'") in {f"{animal}?" for animal in ANIMALS}
        assert re.search(r"sample: (%s)\? => " % "|".join(ANIMALS), errors)
        info = load_model(folder / "checkpoints/finetuned/model_step_1.pt")[1]
        assert info.finetuning is not None and info.finetuning["format"] == "messages"

    def test_columns_of_other_names_are_remembered(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        rows = [{"animal": {"name": f"The {animal} says"}, "sound": f" {sound}"} for animal, sound in ANIMALS.items()]
        pq.write_table(pa.Table.from_pylist(rows), folder / "set.parquet")
        words = ["--map", "prompt=animal.name", "--map", "completion=sound"]
        status, output, _ = here(folder, "--dataset", "set.parquet", *words, *QUICK, "training.epochs=1")
        assert status == 0 and "--prompt 'The " in output.splitlines()[-1]
        assert here(folder, "--resume", "latest", "training.epochs=4")[0] == 0
        assert len(list((folder / "checkpoints/finetuned").glob("*.pt"))) > 1

    @pytest.mark.parametrize("packing", ["false", "true"])
    def test_the_same_update_with_and_without_accumulation(self, tmp_path: Path, packing: str) -> None:
        folder = fresh(tmp_path)
        write_lines(folder / "set.jsonl", *UNEVEN)
        for size in (8, 1):
            other = [f"training.micro_batch_size={size}", f"training.checkpoint_dir=size-{size}"]
            settings = [*QUICK, *EXACT, *other, f"data.finetuning.packing={packing}"]
            status, output, errors = here(folder, "--dataset", "set.jsonl", *settings)
            assert status == 0, errors
            assert ("packed into 8 sequences" in output) == (packing == "true")
        assert_same_weights(folder / "size-8", folder / "size-1")

    @pytest.mark.slow
    def test_two_processes_take_the_update_of_one_over_packed_examples(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        write_lines(folder / "set.jsonl", *UNEVEN)
        settings = ["--dataset", "set.jsonl", *QUICK, *EXACT, "training.micro_batch_size=1"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        alone = here(folder, *settings, "training.checkpoint_dir=one")
        together = subprocess.run(
            [sys.executable, *launcher, str(ROOT / "scripts/finetune.py"), *settings, "training.checkpoint_dir=two"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        done = (together.returncode, together.stdout, together.stderr)
        for status, output, errors in (alone, done):
            assert status == 0, errors
            assert output.count("packed into 8 sequences") == output.count("Next: python") == 1
        assert_same_weights(folder / "one", folder / "two")

    def test_text_and_what_was_cut(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        write_lines(folder / "text.jsonl", *[{"text": animal + "~" * 60} for animal in ANIMALS], {"text": "short"})
        few = ["training.epochs=1", "training.sample_interval=1", "data.finetuning.too_long=truncate"]
        status, output, _ = here(folder, "--dataset", "text.jsonl", *QUICK, *few)
        assert status == 0
        assert "7 examples were longer than the context: 7 shortened." in output
        assert output.splitlines()[-1].endswith(".pt"), "a model of plain text has no prompt to propose"

    def test_the_configuration_is_printed_with_the_model_of_the_checkpoint(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        status, output, _ = here(folder, "--print-config", "training.epochs=7", "model.dropout=0.1")
        config = yaml.safe_load(output)
        assert status == 0
        assert (config["training"]["epochs"], config["training"]["max_steps"]) == (7, None)
        assert (config["model"]["d_model"], config["model"]["dropout"]) == (32, 0.1)
        assert config["training"]["checkpoint_dir"] == "checkpoints/finetuned"

    @pytest.mark.slow
    def test_interrupted_by_ctrl_c(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        process = subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "scripts/finetune.py"), "--dataset", "animals.jsonl"),
                *(*QUICK, "training.epochs=100000", "training.log_interval=1"),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 130
        found = re.search(r"Go on with: python scripts/finetune.py --resume (checkpoints/finetuned/\S+.pt)", output)
        assert found is not None
        assert (folder / found[1]).exists()


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tmp_path_factory.mktemp("refusals"))


class TestRefusals:
    """Each is one message, before anything is computed."""

    def refused(self, folder: Path, *arguments: str) -> str:
        status, output, errors = here(folder, *arguments)
        assert status == 1, output + errors
        assert not (folder / "runs").exists() and not (folder / "checkpoints/finetuned").exists()
        return errors

    def test_malformed_lines(self, untouched: Path) -> None:
        write_lines(untouched / "bad.jsonl", {"prompt": "a", "completion": "b"}, "{", {"prompt": "a"})
        message = self.refused(untouched, "--dataset", "bad.jsonl")
        assert message.startswith("error: 2 of 3 lines of bad.jsonl cannot be used:\n  bad.jsonl:2: ")
        assert '  bad.jsonl:3: has no "completion"\n' in message

    def test_too_long_examples(self, untouched: Path) -> None:
        long = {"prompt": "~" * 99, "completion": "b"}
        write_lines(untouched / "long.jsonl", {"prompt": "a", "completion": "b"}, long)
        message = self.refused(untouched, "--dataset", "long.jsonl")
        assert "1 of 2 examples are longer than the model's context of 48 tokens" in message

    def test_another_model(self, untouched: Path) -> None:
        message = self.refused(untouched, "--dataset", "animals.jsonl", "model.n_layers=3")
        assert "model.n_layers is 2 there and 3 here" in message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "Name the examples to train on with --dataset"),
            (["--dataset", "none.jsonl"], "There is no file none.jsonl"),
            (["--dataset", "animals.jsonl", "--checkpoint", "none.pt"], "There is no checkpoint none.pt"),
            (["--dataset", "animals.jsonl", "--resume", "latest"], "There is no checkpoint in checkpoints/finetuned"),
            (["--dataset", "animals.jsonl", "--checkpoint", "latest", "--resume", "latest"], "Give one."),
            (
                ["--resume", "checkpoints/model_step_7.pt"],
                "is no checkpoint of fine-tuning. To start from it: --checkpoint checkpoints/model_step_7.pt",
            ),
            (["--dataset", "animals.jsonl", "--validation", "animals.jsonl"], "7 of 7 prompts in animals.jsonl"),
            (["--dataset", "animals.jsonl", "--map", "prompt=pormpt"], "Did you mean 'prompt'?"),
            (["--dataset", "animals.jsonl", "training.short_sequences.length=8"], "would cut examples apart"),
            (["--dataset", "animals.jsonl", "training.sequence_length=4"], "longer than the model's context of 4"),
            (["--dataset", "animals.jsonl", "data.finetuning.too_long=cut"], "'refuse', 'truncate' or 'drop'"),
        ],
    )
    def test_what_does_not_go_together(self, untouched: Path, arguments: list[str], message: str) -> None:
        assert message in self.refused(untouched, *arguments)

    def test_a_validation_set_of_another_format(self, untouched: Path) -> None:
        write_lines(untouched / "text.jsonl", {"text": "a"})
        message = self.refused(untouched, "--dataset", "animals.jsonl", "--validation", "text.jsonl")
        assert "text.jsonl has the format text, animals.jsonl has prompt-completion" in message

    def test_a_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        small_tokenizer("data.tokenizer.vocab_size=290").save(folder / "corpus/tokenizer")
        assert "trained with another tokenizer" in self.refused(folder, "--dataset", "animals.jsonl")

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "set.jsonl", {"text": "a"}, {"text": "b"})
        message = self.refused(tmp_path, "--dataset", "set.jsonl")
        assert "There is no checkpoint in checkpoints/. Train one with: python scripts/train.py" in message
