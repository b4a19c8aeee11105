"""Tokenizers of Llama 2's kind, imported: the ids and texts of `transformers`, whatever the text."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from data.examples.encoding import encode_example
from data.examples.reading import CompletionExample
from data.tokenization import Tokenizer, load_tokenizer
from data.tokenization.chat import encode_messages
from data.tokenization.imported import adopt_tokenizer
from data.tokenization.probes import EDGES, LANGUAGES
from inference.text import Detokenizer
from tests.llama_folders import LLAMA2, MARK, PHI3, SWALLOWING, TINY_LLAMA, tokenizer_json, write_tokenizer

KINDS = ["prepend", "first", "always", "never", "model"]
SPECIAL = ["<s>", "</s>", "<unk>", *SWALLOWING]
PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "\0",
    "\x1f",
    "\u2581",
    "a",
    "The",
    "the end",
    "1999",
    "é",
    "🙂",
    "\ufffd",
    "日本",
    "<0x41>",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES + SPECIAL + ["<think>"]), st.text(max_size=5)), max_size=8).map(
    "".join
)
EXAMPLES = [*EDGES, *LANGUAGES, *SPECIAL, "x <s> y", " <|end|> \n x", "a<think> b", "  two", "\u2581x", "👩‍👩‍👧 🇫🇷"]


def both(folder: Path) -> tuple[Any, Tokenizer]:
    """The tokenizer in `folder` by `transformers`, and imported, saved and loaded."""
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder)
    adopt_tokenizer(theirs, (), None).save(folder / "ours")
    return theirs, load_tokenizer(folder / "ours")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, request.param)
    return both(folder)


def check(theirs: Any, ours: Tokenizer, text: str) -> None:
    plain = theirs(text, split_special_tokens=True)["input_ids"]
    assert [*ours.prefix_ids, *ours.encode(text)] == plain
    assert ours.encode_batch([text])[0].tolist() == ours.encode(text)
    assert not set(ours.encode(text)) & set(ours.special_tokens.values())
    special = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, allow_special=True) == special
    for ids in (plain, special):
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded
        stream = Detokenizer(ours, own_text=True)
        assert "".join([*map(stream.push, ids), stream.flush()]) == theirs.decode(ids, skip_special_tokens=True)


def test_ids_and_texts_are_those_of_transformers(pair: tuple[Any, Tokenizer]) -> None:
    for text in EXAMPLES:
        check(*pair, text)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def whatever(text: str) -> None:
        check(*pair, text)

    whatever()


def test_a_character_comes_out_when_its_last_byte_is_there(pair: tuple[Any, Tokenizer]) -> None:
    ours = pair[1]
    stream = Detokenizer(ours, own_text=True)
    ids = ours.encode("🙂")
    *parts, last = map(stream.push, ids)
    assert len(parts) >= 3 and set(parts) == {""} and last == "🙂"
    cut = Detokenizer(ours, own_text=True)
    assert "".join(map(cut.push, ids[:-1])) + cut.flush() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def goes_on(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text, continued=True)
    assert ours.decode_bytes(ids) == text.replace(MARK, " ").encode()


def test_a_text_that_goes_on_has_no_space_in_front(pair: tuple[Any, Tokenizer]) -> None:
    ours = pair[1]
    goes_on(ours)
    example = CompletionExample("somewhere", "What is two and two?", " It is four.")
    ids, trained = encode_example(ours, example)
    assert ids[~trained].tolist() == [*ours.prefix_ids, *ours.encode(example.prompt)]
    assert ids[-1] == ours.end_of_text_id
    assert ours.decode_bytes(ids[trained][:-1]) == example.completion.encode()


MESSAGES = st.lists(
    st.tuples(st.text(max_size=8) | st.sampled_from(PIECES), st.text(max_size=8)), min_size=1, max_size=2
).map(
    lambda turns: [
        {"role": role, "content": text}
        for asked, said in turns
        for role, text in (("user", f"q{asked}"), ("assistant", f"{said}a"))
    ]
)


@pytest.mark.parametrize("template", [LLAMA2, TINY_LLAMA, PHI3], ids=["llama2", "tinyllama", "phi3"])
@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_conversation_has_the_ids_of_transformers(tmp_path: Path, kind: str, template: str) -> None:
    write_tokenizer(tmp_path, kind, template)
    theirs, ours = both(tmp_path)

    @settings(max_examples=60, deadline=None)
    @given(messages=MESSAGES, prompt=st.booleans())
    def whatever(messages: list[dict[str, str]], prompt: bool) -> None:
        ids, trained = encode_messages(ours, messages, add_generation_prompt=prompt)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert len(trained) == len(ids)

    whatever()
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"I {MARK} 🙂, they."}]
    ids, trained = encode_messages(ours, said)
    learned = ours.decode_bytes([index for index, flag in zip(ids, trained) if flag]).decode()
    assert learned.strip().removesuffix("</s>").removesuffix("<|end|>").strip() == said[1]["content"].replace(MARK, " ")
    quoted = [{"role": "user", "content": "<s> </s> <|end|>"}]
    plain = [{"role": "user", "content": "x"}]
    reserved = set(ours.special_tokens.values())
    found = [[index for index in encode_messages(ours, talk)[0] if index in reserved] for talk in (quoted, plain)]
    assert found[0] == found[1]


def test_it_is_the_same_in_another_process(pair: tuple[Any, Tokenizer]) -> None:
    again = pickle.loads(pickle.dumps(pair[1]))
    assert again.fingerprint == pair[1].fingerprint
    assert again.encode("The end of it") == pair[1].encode("The end of it")


def _without(step: str) -> Any:
    def change(whole: dict[str, Any]) -> None:
        whole["decoder"]["decoders"] = [one for one in whole["decoder"]["decoders"] if one["type"] != step]

    return change


def _no_byte(whole: dict[str, Any]) -> None:
    del whole["model"]["vocab"]["<0x41>"]


def _lower(whole: dict[str, Any]) -> None:
    whole["normalizer"]["normalizers"].append({"type": "Lowercase"})


def _no_fallback(whole: dict[str, Any]) -> None:
    whole["model"]["byte_fallback"] = False


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_no_byte, "no token for the byte 0x41"),
        (_lower, "changes the text before it encodes it .Lowercase"),
        (_without("ByteFallback"), "a decoder .Replace, Fuse, Strip. that is not that of SentencePiece"),
        (_no_fallback, "changes the text before it encodes it"),
    ],
)
def test_what_would_give_other_texts_is_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    write_tokenizer(tmp_path, "prepend")
    whole = tokenizer_json("prepend")
    change(whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=sentence):
        both(tmp_path)
