"""A checkpoint as `lm-eval` (EleutherAI's evaluation harness) sees a model: likelihoods and texts on demand.

How text becomes requests, and where context and continuation meet, is the harness's own, so that the figures are those
that it gives for the same model exported to Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from config.errors import UserError
from evaluation.likelihood import Score, common_length

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

_MAX_NEW_TOKENS = 256  # where a task does not say; the harness's own default
_KNOWN = {"do_sample", "temperature", "top_k", "top_p", "min_p"}


@dataclass(frozen=True, slots=True)
class Writing:
    """A text to be written: `prompt` token ids, continued up to a text of `stop` or `max_new_tokens`; 0 is greedy."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


Write = Callable[[Sequence[Writing]], list[str]]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """`score` and `write` do the computing; with several processes each gives every process the whole answer.

    So the harness runs in each as if that were alone, and its figures do not depend on their number.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, score: Score, write: Write) -> None:
        super().__init__()
        self._text = tokenizer
        self.max_length = context_length
        self._score = score
        self._write = write
        self._encode = lru_cache(maxsize=64)(tokenizer.encode)  # a context comes once for each of its continuations

    @property
    def eot_token_id(self) -> int:
        """The token that precedes every text that is scored from its beginning."""
        return [*self._text.prefix_ids, self._text.end_of_text_id][0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of `string`; a special token written in it is text."""
        return list(self._encode(string))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after:
            # The continuation has become a part of the context's last token: score from where the two part on.
            whole = self.tok_encode(context + continuation)
            same = min(common_length(before, whole), len(whole) - 1)
            before, after = whole[:same], whole[same:]
        return [*self._text.prefix_ids, *before] or [self.eot_token_id], after

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As `lm-eval` defines it; it has no progress bar of its own here."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [
            (one.logarithm, one.greedy) for one in self._score([(context, target) for _, context, target in requests])
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, each read through windows that overlap as little as may be."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = [*self._text.prefix_ids, *self.tok_encode(request.args[0])]  # scored too, as the harness does
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs += map(make_disjoint_window, windows)
            counts.append(len(pairs))
        scores = [one.logarithm for one in self._score(pairs)]
        return [sum(scores[first:last]) for first, last in zip([0, *counts], counts)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The texts that the model writes; a prompt that leaves no room for `max_gen_toks` loses its beginning."""
        writings, stops = [], []
        for request in requests:
            context, settings = request.args
            settings = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
            stop = handle_stop_sequences(settings.pop("until", None), eos=None)
            new_tokens = settings.pop("max_gen_toks")
            if unknown := sorted(set(settings) - _KNOWN):
                raise UserError(f"The task {request.task_name} asks for {unknown[0]}, which generation here has not.")
            room = max(self.max_length - new_tokens, self.max_length // 2)
            first = list(self._text.prefix_ids)
            ids = self.tok_encode(context)[-(room - len(first)) :]
            prompt = [*first, *ids] or [self.eot_token_id]
            how = {key: settings[key] for key in _KNOWN - {"do_sample"} if settings.get(key) is not None}
            writings.append(Writing(tuple(prompt), new_tokens, tuple(text for text in stop if text), **how))
            stops.append(stop)
        texts = self._write(writings)
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]
