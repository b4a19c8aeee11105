"""The questions of the project put to a model in training: one accuracy, for its curve and its best checkpoint."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from config.schema import DataConfig
from evaluation.likelihood import likelihoods
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

GROUP = "quern"


class Ask(Protocol):
    """The share of the questions that a model answers rightly, worked out by `world_size` processes together."""

    def __call__(self, model: Transformer, rank: int, world_size: int, autocast: torch.dtype | None) -> float: ...


def questions(data: DataConfig, tokenizer: Tokenizer, number: int) -> Ask:
    """The first `number` questions of each task of the project, as `scripts/eval.py --tasks quern` has them.

    `data` is the section of the run's configuration, which says what of the built-in corpus it holds out. Raises
    `UserError` where that is too little to make questions of.
    """
    from evaluation.task_names import find_tasks, question_settings

    tasks = find_tasks([GROUP], **question_settings(data.model_dump()))

    def ask(model: Transformer, rank: int, world_size: int, autocast: torch.dtype | None) -> float:
        from evaluation.downstream import run_tasks
        from evaluation.harness import HarnessModel

        score = partial(likelihoods, model, rank=rank, world_size=world_size, autocast=autocast)
        asked = HarnessModel(tokenizer, model.config.context_length, score, lambda writings: [])
        results = {result.name: result for result in run_tasks(asked, tasks, limit=number)}
        return results[GROUP].metrics["acc"].value

    return ask
