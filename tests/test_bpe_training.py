"""Training BPE: the same words and the same merges as the reference library's."""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from config.load import load_config
from config.schema import TokenizerConfig
from data.tokenization import train_tokenizer
from data.tokenization.byte_level import BYTE_OF, LLAMA3_PATTERN
from data.tokenization.probes import LANGUAGES, probe_texts
from data.tokenization.words import LONGEST_WORD, count_words, split_words

PATTERNS = ("gpt2", "llama3")
# Characters at which the patterns branch: contractions, white space, classes, the long s, marks without a class.
BRANCHING = "ab '\u2019sStTmMlLrReEvVdD\u017fK1\u0968\u00b2  \t\n\r\u2028\u3000.,(\u00e9\u0301日😀ß\0"


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")


def random_texts(count: int, most: int) -> list[str]:
    generator = random.Random(count)
    return ["".join(generator.choices(BRANCHING, k=generator.randint(0, most))) for _ in range(count)]


def reference_merges(texts: Iterable[str], config: TokenizerConfig) -> list[list[str]]:
    """What the trainer of `tokenizers` learns."""
    library = Tokenizer(models.BPE())
    split = pre_tokenizer(config.pattern)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if config.pattern == "gpt2":
        library.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=list(config.special_tokens),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    merges: list[list[str]] = json.loads(library.to_str())["model"]["merges"]
    return merges


@pytest.mark.parametrize("pattern", PATTERNS)
def test_words_are_the_reference_librarys(pattern: str) -> None:
    split = pre_tokenizer(pattern)
    for text in [*probe_texts(), *random_texts(4000, 30)]:
        expected = [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]
        assert split_words(text, pattern) == expected, text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_word_is_counted(pattern: str) -> None:
    texts = [
        *LANGUAGES,
        *random_texts(9000, 12),
        "x" * LONGEST_WORD + "y" * 10,
        "日" * (LONGEST_WORD + 1),
        inspect.getsource(json),
    ]
    expected = Counter(word[:LONGEST_WORD] for text in texts for word in split_words(text, pattern))
    words = count_words(texts, pattern)
    bounds = [0, *words.ends.tolist()]
    found = [words.data[start:end].tobytes().decode() for start, end in zip(bounds, bounds[1:])]
    assert list(zip(found, words.counts.tolist())) == list(expected.items())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [
        pytest.param([*LANGUAGES, inspect.getsource(inspect)], 1500, id="languages"),
        pytest.param(random_texts(5000, 30), 2500, id="random"),
        pytest.param(["aaaaaaaa bbbb aaaa aaa abab ababab bababa"] * 3, 400, id="overlapping"),
        pytest.param(["<|pad|> <|pad|>|><|pad|"] * 9, 400, id="special-token-as-text"),
    ],
)
def test_merges_are_the_reference_librarys(texts: list[str], vocab_size: int, pattern: str) -> None:
    config = load_config().data.tokenizer.model_copy(update={"vocab_size": vocab_size, "pattern": pattern})
    tokenizer = train_tokenizer(iter(texts), config)
    model = json.loads(getattr(tokenizer, "backend").serialized)["model"]
    assert model["merges"] == reference_merges(texts, config)
    assert np.array_equal(sorted(model["vocab"].values()), np.arange(tokenizer.vocab_size))
