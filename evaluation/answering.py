"""Held-out prompts answered by two checkpoints: the one that fine-tuning began with, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from config.files import write_text
from data.examples.encoding import Encoded, split_answer
from data.examples.samples import ExampleSamples
from evaluation.before_after import BEFORE_AFTER
from evaluation.examples import evaluate_samples
from evaluation.perplexity import default_batch_size
from model.checkpoint import load_model
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

Question = tuple[list[int], int]  # the ids of a prompt, and the token that ends an answer besides end-of-text
Answer = Callable[[Transformer, list[Question]], Sequence[tuple[str, bool]]]  # the texts, and whether they were ended


def write_before_after(
    directory: Path,
    checkpoints: tuple[Path, Path],
    held_out: ExampleSamples,
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    answer: Answer,
    device: torch.device,
    autocast: torch.dtype | None,
) -> None:
    """Let both `checkpoints` answer the examples `numbers` of `held_out`; what they said goes into a run's `directory`.

    Beside it stand what the example says, and each model's loss of the example's trained tokens. Of plain text the
    first half is the prompt. Raises `UserError` where a checkpoint is not there any more, or is damaged.
    """
    parts = [_parted(held_out.encoded(number), tokenizer.end_of_text_id) for number in numbers]
    cases: list[dict[str, Any]] = [
        {"prompt": tokenizer.decode(prompt), "reference": tokenizer.decode(reference)} for prompt, reference, _ in parts
    ]
    for when, path in zip(("before", "after"), checkpoints, strict=True):
        model, _ = load_model(path, device)
        texts = answer(model, [(prompt.tolist(), end) for prompt, _, end in parts])
        sums = evaluate_samples(
            model,
            _Some(held_out, numbers),
            batch_size=default_batch_size(held_out.length, model.config.padded_vocab_size, device),
            device=device,
            autocast=autocast,
        ).block_sums
        for case, (text, ended), (loss, tokens, *_) in zip(cases, texts, sums, strict=True):
            case[when] = {"text": text, "ended": ended, "loss": float(loss / tokens)}
    before, after = map(str, checkpoints)
    whole = {"before": before, "after": after, "held_out": len(held_out), "cases": cases}
    write_text(directory / BEFORE_AFTER, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def _parted(encoded: Encoded, end_of_text: int) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """The prompt of an example, what it says then, without its end, and the token that ends it."""
    prompt, answer = split_answer(encoded)
    if len(prompt) > 1:
        return prompt, answer[:-1], int(answer[-1])
    half = (len(encoded.ids) + 1) // 2
    rest = encoded.ids[half:]
    return encoded.ids[:half], rest[: -1 if rest[-1:] == end_of_text else None], end_of_text


class _Some:
    """Some of the samples of a set."""

    def __init__(self, samples: ExampleSamples, numbers: Sequence[int]) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Inputs and targets."""
        return self._samples.sample(self._numbers[index])
