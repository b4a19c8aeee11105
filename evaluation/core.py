"""The CORE score (DCLM, Li et al. 2024): the mean over 22 tasks of how far from chance to perfect the accuracy is.

The files are those of DCLM's evaluation bundle, which the user fetches: `core.yaml` (the tasks), `eval_meta_data.csv`
(what chance reaches) and `eval_data/`. Prompts, few-shot examples and their seeds are those of nanochat's evaluation,
so that the scores compare with its.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from config.errors import UserError
from evaluation.bootstrap import ratio_interval
from evaluation.downstream import Metric, TaskResult
from evaluation.likelihood import Score, common_length

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

CORE = "core"
TASKS = 22
_KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
_ORDER_SEED, _FEWSHOT_SEED = 1337, 1234

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CoreTask:
    """One task of the bundle. `baseline` is the accuracy of chance; `kind` says how an item becomes prompts."""

    label: str
    kind: str
    items: Sequence[Item]
    fewshot: int
    delimiter: str
    baseline: float


class _Asked(NamedTuple):
    """The ways in which an item may go on, as context and continuation, and which is right; None: the greedy one."""

    pairs: list[tuple[list[int], list[int]]]
    gold: int | None


def read_bundle(folder: Path, limit: int | None = None) -> list[CoreTask]:
    """The tasks of the bundle in `folder`, at most `limit` items of each; `UserError` where it is not whole."""
    import yaml

    try:
        listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            chance = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"--core-files {folder} is not DCLM's evaluation bundle, which holds core.yaml, eval_meta_data.csv and "
            f"eval_data/ ({type(error).__name__}: {error}). Where to get it: docs/evaluation.md."
        ) from error
    tasks = []
    for entry in listed:
        label, kind = entry["label"], entry["icl_task_type"]
        if kind not in _KEYS:
            raise UserError(f"{folder}/core.yaml: task {label} is of the kind {kind}; known are {', '.join(_KEYS)}.")
        if label not in chance:
            raise UserError(f"{folder}/eval_meta_data.csv has no random baseline for the task {label}.")
        items = _read_items(folder / "eval_data" / entry["dataset_uri"], kind)
        random.Random(_ORDER_SEED).shuffle(items)
        fewshot, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(label, kind, items[:limit], fewshot, delimiter, chance[label]))
    return tasks


def _read_items(path: Path, kind: str) -> list[Item]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        items: list[Item] = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}). Fetch the bundle again.") from error
    for number, item in enumerate(items, start=1):
        if missing := [key for key in _KEYS[kind] if key not in item]:
            raise UserError(f"{path}, line {number}: there is no {missing[0]!r}, which a {kind} task needs.")
    if not items:
        raise UserError(f"{path} is empty. Fetch the bundle again.")
    return items


def run_core(tasks: Sequence[CoreTask], tokenizer: Tokenizer, score: Score) -> list[TaskResult]:
    """The CORE score and the accuracy of each task; `score` computes likelihoods."""
    results = [_run(task, tokenizer, score) for task in tasks]
    centered = [result.metrics["centered"].value for result in results]
    whole = {"centered": Metric(sum(centered) / len(centered))}
    fingerprint = hashlib.sha256("".join(str(result.fingerprint) for result in results).encode()).hexdigest()[:16]
    documents = sum(result.documents for result in results)
    note = "" if len(tasks) == TASKS else f"These are {len(tasks)} of the {TASKS} tasks, so this is no CORE score yet."
    about = {"tasks": len(tasks)}
    return [TaskResult(CORE, whole, documents, None, fingerprint, about=about, note=note), *results]


def _run(task: CoreTask, tokenizer: Tokenizer, score: Score) -> TaskResult:
    asked = [_ask(task, number, tokenizer) for number in range(len(task.items))]
    found = iter(score([pair for one in asked for pair in one.pairs]))
    right = []
    for pairs, gold in asked:
        answers = [next(found) for _ in pairs]
        if gold is None:
            right.append(float(answers[0].greedy))
        else:
            losses = [-answer.logarithm / len(target) for answer, (_, target) in zip(answers, pairs, strict=True)]
            right.append(float(losses.index(min(losses)) == gold))
    accuracy = sum(right) / len(right)
    interval = ratio_interval(np.array(right), np.ones(len(right)))
    way = [(one - task.baseline) / (1 - task.baseline) for one in right]
    centered = sum(way) / len(way)
    text = json.dumps([task.kind, task.fewshot, task.delimiter, *task.items], sort_keys=True)
    return TaskResult(
        name=f"{CORE}/{task.label}",
        metrics={"acc": Metric(accuracy, interval, right), "centered": Metric(centered, None, way)},
        documents=len(right),
        fewshot=task.fewshot,
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
        group=CORE,
    )


def _ask(task: CoreTask, number: int, tokenizer: Tokenizer) -> _Asked:
    """Item `number` after its examples, which are drawn from the other items by a seed of its own."""
    others = [index for index in range(len(task.items)) if index != number]
    drawn = random.Random(_FEWSHOT_SEED + number).sample(others, min(task.fewshot, len(others)))
    item = task.items[number]
    before = "".join(_solved(task, task.items[index]) + "\n\n" for index in drawn)

    def encode(text: str) -> list[int]:
        return [*(tokenizer.prefix_ids or [tokenizer.end_of_text_id]), *tokenizer.encode(text)]

    if task.kind == "language_modeling":
        opening = f"{before}{str(item['context']).strip()}{task.delimiter}"
        whole, alone = encode(opening + item["continuation"]), encode(opening.strip())
        start = min(common_length(whole, alone), len(whole) - 1)
        return _Asked([(whole[:start], whole[start:])], None)
    if task.kind == "multiple_choice":
        rows = [encode(f"{before}{item['query']}{task.delimiter}{choice}") for choice in item["choices"]]
        start = min(common_length(*rows), min(map(len, rows)) - 1)
        return _Asked([(row[:start], row[start:]) for row in rows], item["gold"])
    rows = [encode(f"{before}{context}{task.delimiter}{item['continuation']}") for context in item["context_options"]]
    same = max(1, common_length(*(row[::-1] for row in rows)))
    same = min(same, min(map(len, rows)) - 1)
    return _Asked([(row[:-same], row[-same:]) for row in rows], item["gold"])


def _solved(task: CoreTask, item: Item) -> str:
    """An item with its right answer."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{str(item['context']).strip()}{task.delimiter}{item['continuation']}"
