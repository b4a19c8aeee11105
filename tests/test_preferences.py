"""Preference pairs: the forms they come in, what is trained of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import UserError
from config.load import load_config
from data.data_loader import IGNORED
from data.examples.encoding import EncodedExamples, encode_examples, encode_pair
from data.examples.pairs import PairSamples
from data.examples.preferences import PreferenceExample
from data.examples.preview import render_pair, segments
from data.examples.reading import ChatExample, read_examples
from data.examples.samples import ExampleSamples, hold_out
from data.tokenization import Tokenizer, load_tokenizer
from tests.workspace import small_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "What colour is the sky?"}
AGAIN = {"role": "user", "content": "And at night?"}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read_one(folder: Path, **record: Any) -> PreferenceExample:
    path = folder / "set.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (example,) = read_examples(path)
    assert isinstance(example, PreferenceExample)
    return example


def parts(example: PreferenceExample) -> tuple[Any, Any, Any]:
    return tuple(
        list(part) if isinstance(part, tuple) else part for part in (example.prompt, example.chosen, example.rejected)
    )  # type: ignore[return-value]


class TestForms:
    def test_three_texts(self, tmp_path: Path) -> None:
        assert parts(read_one(tmp_path, prompt="2 + 2 =", chosen=" 4", rejected=" 5", score=1)) == (
            "2 + 2 =",
            " 4",
            " 5",
        )

    def test_texts_that_begin_alike_share_their_prompt_up_to_a_whole_word(self, tmp_path: Path) -> None:
        chosen, rejected = "Human: Can you?\n\nAssistant: I can't.", "Human: Can you?\n\nAssistant: I can do that."
        prompt = "Human: Can you?\n\nAssistant: I"
        assert parts(read_one(tmp_path, chosen=chosen, rejected=rejected)) == (prompt, " can't.", " can do that.")

    def test_a_text_that_is_the_beginning_of_the_other_keeps_a_word(self, tmp_path: Path) -> None:
        assert parts(read_one(tmp_path, chosen="So it is", rejected="So it is not")) == ("So it", " is", " is not")

    @pytest.mark.parametrize("prompt", [None, "What colour is the sky?"])
    def test_whole_conversations_share_their_beginning(self, tmp_path: Path, prompt: str | None) -> None:
        head = [SYSTEM, ASKED]
        found = read_one(tmp_path, prompt=prompt, chosen=[*head, says("Blue.")], rejected=[*head, says("Green.")])
        assert parts(found) == (head, [says("Blue.")], [says("Green.")])

    @pytest.mark.parametrize("repeated", [False, True])
    def test_answers_in_messages_go_on_where_the_prompt_ends(self, tmp_path: Path, repeated: bool) -> None:
        prompt = [ASKED, says("Blue."), AGAIN]
        head = prompt if repeated else []
        found = read_one(tmp_path, prompt=prompt, chosen=[*head, says("Black.")], rejected=[*head, says("Blue.")])
        assert parts(found) == (prompt, [says("Black.")], [says("Blue.")])

    def test_texts_and_messages_beside_one_another(self, tmp_path: Path) -> None:
        expected = ([ASKED], [says("Blue.")], [says("Green.")])
        assert parts(read_one(tmp_path, prompt=[ASKED], chosen="Blue.", rejected="Green.")) == expected
        given = ASKED["content"]
        assert parts(read_one(tmp_path, prompt=given, chosen=[says("Blue.")], rejected=[says("Green.")])) == expected

    def test_a_conversation_that_is_the_beginning_of_the_other(self, tmp_path: Path) -> None:
        one = [ASKED, says("Blue.")]
        found = read_one(tmp_path, chosen=one, rejected=[*one, AGAIN, says("No.")])
        assert parts(found) == ([ASKED], [says("Blue.")], [says("Blue."), AGAIN, says("No.")])

    def test_the_messages_of_a_preference_set_are_passed_over(self, tmp_path: Path) -> None:
        assert read_one(tmp_path, prompt="a", chosen="b", rejected="c", messages=[ASKED, says("b")]).chosen == "b"

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ({"prompt": "a", "chosen": "b", "rejected": "b"}, '"chosen" and "rejected" are the same'),
            ({"chosen": [ASKED, says("b")], "rejected": [ASKED, says("b")]}, '"chosen" and "rejected" are the same'),
            ({"prompt": "a", "chosen": "b"}, 'has no "rejected"'),
            ({"prompt": "a", "rejected": "b"}, 'has no "chosen"'),
            ({"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" is empty'),
            ({"prompt": "", "chosen": "b", "rejected": "c"}, '"prompt" is empty'),
            ({"prompt": "a", "chosen": "b", "rejected": None}, '"rejected" is null, not a string'),
            ({"prompt": "a", "chosen": "b", "rejected": [says("c")]}, "one is a string and the other a list"),
            ({"chosen": "one way", "rejected": "another"}, '"chosen" and "rejected" do not begin alike'),
            ({"chosen": [says("b")], "rejected": [says("c")]}, "do not begin with the same messages"),
            ({"prompt": "a", "chosen": [says("b")], "rejected": [{"content": "c"}]}, 'rejected[0] has no "role"'),
            ({"prompt": [ASKED], "chosen": [says("b")], "rejected": [AGAIN]}, '"rejected" has no assistant message'),
            (
                {"prompt": [ASKED], "chosen": [SYSTEM, says("b")], "rejected": [says("c")]},
                '"chosen" begins with a system message',
            ),
        ],
    )
    def test_what_is_no_pair_is_named_with_its_reason(self, tmp_path: Path, record: Any, reason: str) -> None:
        with pytest.raises(UserError) as caught:
            read_one(tmp_path, **record)
        message = str(caught.value)
        assert message.startswith(f"1 of 1 lines of {tmp_path}/set.jsonl cannot be used:\n  {tmp_path}/set.jsonl:1: ")
        assert reason in message

    def test_texts_and_messages_are_two_formats(self, tmp_path: Path) -> None:
        path = tmp_path / "set.jsonl"
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": [ASKED], "chosen": "b", "rejected": "c"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match="1 are preferences .*; 1 are preferences in messages"):
            read_examples(path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def texts(prompt: str, chosen: str, rejected: str, line: int = 1) -> PreferenceExample:
    return PreferenceExample(f"set.jsonl:{line}", prompt, chosen, rejected)


def chats(prompt: list[dict[str, str]], chosen: str, rejected: str) -> PreferenceExample:
    return PreferenceExample("set.jsonl:1", tuple(prompt), (says(chosen),), (says(rejected),))


class TestEncoding:
    def test_each_side_is_trained_and_ends(self, tokenizer: Tokenizer) -> None:
        sides = encode_pair(tokenizer, texts("The sky is", " blue", " green!"))
        assert [segments(tokenizer, side) for side in sides] == [
            [("The sky is", False), (" blue<|endoftext|>", True)],
            [("The sky is", False), (" green!<|endoftext|>", True)],
        ]

    def test_earlier_answers_belong_to_the_prompt(self, tokenizer: Tokenizer) -> None:
        chosen, rejected = encode_pair(tokenizer, chats([ASKED, says("Blue."), AGAIN], "Black.", "Blue."))
        prompt = (
            "<|user|>What colour is the sky?<|end|><|assistant|>Blue.<|end|><|user|>And at night?<|end|><|assistant|>"
        )
        assert segments(tokenizer, chosen) == [(prompt, False), ("Black.<|end|>", True)]
        assert segments(tokenizer, rejected) == [(prompt, False), ("Blue.<|end|>", True)]

    def test_the_preview_tells_chosen_from_rejected(self, tokenizer: Tokenizer) -> None:
        text = render_pair(tokenizer, *encode_pair(tokenizer, texts("The sky is", " blue", " green!")))
        assert text.plain == "The sky is⟦ blue<|endoftext|>⟧\nrejected: ⟦ green!<|endoftext|>⟧"
        assert [str(span.style) for span in text.spans] == ["dim", "bold green", "bold red"]

    def test_a_pair_is_held_out_whole(self, tokenizer: Tokenizer) -> None:
        pairs = [texts(f"prompt {number // 2}", " a", " b", number) for number in range(20)]
        found = encode_examples(tokenizer, pairs, 64, "refuse")
        held = hold_out(found.examples, 0.3)
        assert (held[::2] == held[1::2]).all() and held.sum() == 2 * 2 * 3

    def shortened(self, tokenizer: Tokenizer, example: PreferenceExample) -> EncodedExamples:
        """To sides of 21 tokens, beside a pair that fits."""
        return encode_examples(tokenizer, [texts("x", "y", "z", 7), example], 20, "truncate")

    def test_both_sides_lose_the_same_beginning_of_a_long_prompt(self, tokenizer: Tokenizer) -> None:
        result = self.shortened(tokenizer, texts("~" * 40 + "!", "ü", "?" * 5))
        chosen, rejected = result.samples[2:]
        assert tokenizer.decode(chosen.ids) == "~" * 14 + "!ü<|endoftext|>"
        assert tokenizer.decode(rejected.ids) == "~" * 14 + "!?????<|endoftext|>"
        assert (result.shortened, result.dropped) == (1, [])

    def test_an_answer_is_kept_whole_or_the_pair_left_out(self, tokenizer: Tokenizer) -> None:
        result = self.shortened(tokenizer, texts("~" * 40, "ü", "?" * 20))
        assert (len(result.samples), result.dropped) == (2, ["set.jsonl:1"])

    def test_a_long_conversation_loses_its_oldest_turns(self, tokenizer: Tokenizer) -> None:
        system, asked = {**SYSTEM, "content": "!"}, {**ASKED, "content": "c~"}
        result = self.shortened(
            tokenizer, chats([system, {**ASKED, "content": "~" * 9}, says("~~~"), asked], "d", "??")
        )
        texts_left = [tokenizer.decode(side.ids) for side in result.samples[2:]]
        assert texts_left == [
            f"<|system|>!<|end|><|user|>c~<|end|><|assistant|>{answer}<|end|>" for answer in ("d", "??")
        ]

    def test_pairs_too_long_are_refused_as_examples_are(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="1 of 2 examples are longer than the model's context of 20 tokens"):
            encode_examples(
                tokenizer,
                [texts("x", "y", "z"), texts("~" * 40, "a", "b")],
                20,
                load_config().data.finetuning.too_long,
            )

    def test_an_example_of_which_nothing_is_trained_is_refused_by_name(self, tmp_path: Path) -> None:
        """A template may mark what is trained, and mark nothing of some conversations."""
        template = (
            "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% generation %}{% if loop.last and "
            "message['role'] == 'assistant' %}{{ message['content'] }}{% endif %}{% endgeneration %}"
            "{% if not loop.last or message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}{% endfor %}"
        )
        small_tokenizer().save(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        own = load_tokenizer(tmp_path)
        good = ChatExample("set.jsonl:1", (ASKED, says("Blue.")))
        bad = ChatExample("set.jsonl:2", (ASKED, says("Blue."), AGAIN))
        assert len(encode_examples(own, [good], 200, "refuse").samples) == 1
        with pytest.raises(UserError, match="1 of 2 examples have nothing to train on.*: set.jsonl:2. "):
            encode_examples(own, [good, bad], 200, "refuse")


class TestSamples:
    @pytest.mark.parametrize("packing", [False, True])
    def test_both_sides_of_a_pair_take_the_same_places_of_two_rows(self, tokenizer: Tokenizer, packing: bool) -> None:
        pairs = [texts("~" * (number % 5 + 1), "!" * (number % 3 + 1), "?" * (7 - number % 7)) for number in range(20)]
        found = encode_examples(tokenizer, pairs, 32, "refuse")
        sides = ExampleSamples(found.samples, tokenizer.pad_id, 32)
        samples = PairSamples(sides, 32, packing)
        assert (samples.pairs, len(samples) < 20) == (20, packing)
        seen = []
        for index in range(len(samples)):
            inputs, targets, documents = (part.reshape(2, -1) for part in samples.sample(index))
            assert inputs.shape[1] <= 32 and (documents[0] == documents[1]).all()
            for number in sorted(set(documents[0][documents[0] >= 0].tolist())):
                places = np.flatnonzero(documents[0] == number)
                assert (np.diff(places) == 1).all()
                for row, (ids, trained) in enumerate(samples.pair(number)):
                    here = places[: len(ids) - 1]
                    assert (inputs[row, here] == ids[:-1]).all()
                    assert (targets[row, here] == np.where(trained[1:], ids[1:], IGNORED)).all()
                    assert (targets[row, places[len(ids) - 1 :]] == IGNORED).all()
                seen.append(number)
            assert (targets[documents < 0] == IGNORED).all()
        assert sorted(seen) == list(range(20))
