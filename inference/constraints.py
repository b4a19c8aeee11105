"""Text that must have a form: JSON of a schema, any JSON object, or what a regular expression matches.

llguidance tells after every token which ones may follow, by running the grammar over the bytes of the vocabulary, so
tokens that cut a character, or span parts of the grammar, are as good as any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from config.errors import UserError
from data.tokenization.special import END

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from data.tokenization import Tokenizer

# Between the parts of JSON at most one of these, or a model without an idea could write spaces for ever.
_WHITESPACE = {"whitespace_flexible": True, "whitespace_pattern": "[ \\n]?"}

_vocabularies: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()


class Constraint:
    """A form that text must have, for one tokenizer; any number of sequences may share it.

    Made by `json_schema`, `json_object` and `regex`.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer, what: str) -> None:
        from llguidance import LLMatcher

        self.vocab_size = tokenizer.vocab_size
        self._matcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0)
        if self._matcher.is_error():
            fault = self._matcher.get_error().strip().splitlines()[0]
            raise UserError(f"{what} cannot be used: {fault}")

    def begin(self) -> Progress:
        """Where a new text stands: nothing written yet."""
        return Progress(self._matcher.deep_copy(), self.vocab_size)


class Progress:
    """How far a text has come in its form."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def failure(self) -> str | None:
        """Why the form could not be followed so far, as where it is too complex at this place; else None."""
        if not self._matcher.is_error():
            return None
        fault = self._matcher.get_error().strip().splitlines()[0]
        return f"The form of the text could not be followed to its end: {fault.rstrip('.')}."

    def fill(self, bits: Tensor) -> None:
        """Set in `bits` `(words,)` int32, on the CPU, the bit of every token that may come next, the others to 0.

        The end of the text is allowed exactly where the form is complete.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), 4 * self._words)

    def push(self, token: int) -> None:
        """Go on by `token`."""
        self._matcher.consume_token(token)

    def copy(self) -> Progress:
        """Another one that has come as far."""
        other = object.__new__(Progress)
        other._matcher, other._words = self._matcher.deep_copy(), self._words
        return other


def json_schema(schema: Mapping[str, Any] | bool | str, tokenizer: Tokenizer) -> Constraint:
    """JSON that `schema` describes: a JSON schema, parsed or as text.

    Raises `UserError` naming the fault where it is none, or holds what cannot be enforced.
    """
    return Constraint(_schema_grammar(schema), tokenizer, "The JSON schema")


def _schema_grammar(schema: Mapping[str, Any] | bool | str) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UserError(f"The JSON schema is no JSON: {error}.") from error
    if not isinstance(schema, (Mapping, bool)):
        raise UserError(f"A JSON schema must be an object, such as {{}}, not {json.dumps(schema)[:40]}.")
    grammar: str = LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides=_WHITESPACE  # type: ignore[arg-type]
    )
    return grammar


def check_regex(pattern: str) -> None:
    """Raise `UserError` for a pattern that `regex` refuses; needs no tokenizer."""
    from llguidance import LLMatcher

    _check(LLMatcher.grammar_from_regex(pattern), f"The regular expression {pattern!r}")


def check_json_schema(schema: str) -> None:
    """Raise `UserError` for a schema, as text, that `json_schema` refuses; needs no tokenizer."""
    _check(_schema_grammar(schema), "The JSON schema")


def _check(grammar: str, what: str) -> None:
    from llguidance import LLMatcher

    if fault := LLMatcher.validate_grammar(grammar):
        raise UserError(f"{what} cannot be used: {fault.strip().splitlines()[0]}")


def json_object(tokenizer: Tokenizer) -> Constraint:
    """Any JSON object."""
    return json_schema({"type": "object"}, tokenizer)


def regex(pattern: str, tokenizer: Tokenizer) -> Constraint:
    """Text that `pattern` matches as a whole, in the syntax of Rust's `regex`: no look-around, no references back.

    Raises `UserError` for a pattern that is none.
    """
    from llguidance import LLMatcher

    return Constraint(LLMatcher.grammar_from_regex(pattern), tokenizer, f"The regular expression {pattern!r}")


def unpack(bits: Tensor, vocab_size: int) -> Tensor:
    """`(batch, words)` int32 as `(batch, vocab_size)` bool."""
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, :vocab_size]


class _Wrapped:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {index: name.encode() for name, index in tokenizer.special_tokens.items()}
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.end_of_text_id
        self.bos_token_id = None
        self.tokens = [names.get(i) or tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        # What stands for no text, such as SentencePiece's <unk>, must never be written.
        self.special_token_ids = [index for index, size in enumerate(tokenizer.token_bytes()) if size == 0]
        self.tokens = [token or b"<|nothing|>" for token in self.tokens]

    def __call__(self, text: bytes | str) -> list[int]:
        said = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(said, continued=True)


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The vocabulary as llguidance keeps it, made once for each tokenizer; a turn of a chat may end a text, too."""
    if tokenizer not in _vocabularies:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = list(tokenizer.ending_ids)
        ends += [tokenizer.special_tokens[END]] if END in tokenizer.special_tokens else []
        wrapper = TokenizerWrapper(_Wrapped(tokenizer))
        _vocabularies[tokenizer] = LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=ends)
    return _vocabularies[tokenizer]
