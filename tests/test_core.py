"""The CORE score, against a plain computation over a small bundle of DCLM's layout."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config.errors import UserError
from evaluation.downstream import read_results
from scripts.eval import evaluate as eval_command
from tests.workspace import Workspace, make_workspace

EXACT = ["training.precision=fp32", "training.device=cpu"]
WORDS = ["fox", "dog", "the lazy dog", "Deich", "jumps over", "quick brown", "add(1, 2)", "def add", "print"]
TASKS: list[dict[str, Any]] = [
    {"label": "choice", "icl_task_type": "multiple_choice", "num_fewshot": [2], "continuation_delimiter": "\nAnswer: "},
    {"label": "schema", "icl_task_type": "schema", "num_fewshot": [0]},
    {"label": "words", "icl_task_type": "language_modeling", "num_fewshot": [3]},
]
BASELINE = {"choice": 25.0, "schema": 50.0, "words": 0.0}


def items(kind: str, workspace: Workspace) -> list[dict[str, Any]]:
    draw = random.Random(kind)
    made: list[dict[str, Any]] = []
    for number in range(20):
        some = draw.sample(WORDS, 4)
        if kind == "multiple_choice":
            made.append({"query": f"Which {some[0]}?", "choices": some, "gold": number % 4})
        elif kind == "schema":
            made.append({"context_options": some[:2], "continuation": f"and {some[2]} {some[3]}", "gold": number % 2})
        else:
            made.append({"context": f" {some[0]} {some[1]} \n", "continuation": some[2]})
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"))
    bundle = workspace.folder / "bundle"
    (bundle / "eval_data/some").mkdir(parents=True)
    for task in TASKS:
        task["dataset_uri"] = f"some/{task['label']}.jsonl"
        rows = items(task["icl_task_type"], workspace)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (bundle / "eval_data" / task["dataset_uri"]).write_text(text)
    (bundle / "core.yaml").write_text(json.dumps({"icl_tasks": TASKS}))
    chance = "".join(f"{name},some,{value}\n" for name, value in BASELINE.items())
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\n" + chance)
    return workspace


@pytest.fixture
def workspace(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(made.folder)
    return made


@torch.no_grad()
def losses(workspace: Workspace, text: str) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Ids of a prompt after end-of-text; the loss and the greedy choice at each but the first."""
    ids = [workspace.tokenizer.end_of_text_id, *workspace.tokenizer.encode(text)][-33:]
    logits = workspace.model(torch.tensor([ids[:-1]]))[0]
    return ids, torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"), logits.argmax(-1)


def plain(workspace: Workspace, task: dict[str, Any]) -> list[bool]:
    """Right or wrong for each item, one prompt at a time."""
    kind, between = task["icl_task_type"], task.get("continuation_delimiter", " ")
    rows = items(kind, workspace)
    random.Random(1337).shuffle(rows)
    right = []
    for number, row in enumerate(rows):
        rest = [index for index in range(len(rows)) if index != number]
        shown = [rows[index] for index in random.Random(1234 + number).sample(rest, task["num_fewshot"][0])]
        if kind == "multiple_choice":
            before = "".join(f"{one['query']}{between}{one['choices'][one['gold']]}\n\n" for one in shown)
            found = [losses(workspace, f"{before}{row['query']}{between}{choice}") for choice in row["choices"]]
            whole = [workspace.tokenizer.encode(f"{before}{row['query']}{between}{one}") for one in row["choices"]]
            same = 0
            while all(len(ids) > same + 1 and ids[same] == whole[0][same] for ids in whole):
                same += 1
            means = [loss[-(len(all_ids) - same) :].mean() for all_ids, (_, loss, _) in zip(whole, found)]
            right.append(int(torch.stack(means).argmin()) == row["gold"])
        elif kind == "schema":
            found = [losses(workspace, f"{option}{between}{row['continuation']}") for option in row["context_options"]]
            same = 0
            while found[0][0][-same - 1] == found[1][0][-same - 1]:
                same += 1
            right.append(int(torch.stack([loss[-same:].mean() for _, loss, _ in found]).argmin()) == row["gold"])
        else:
            before = "".join(f"{one['context'].strip()}{between}{one['continuation']}\n\n" for one in shown)
            opening = f"{before}{row['context'].strip()}{between}"
            ids, _, greedy = losses(workspace, opening + row["continuation"])
            wanted = len(workspace.tokenizer.encode(opening + row["continuation"])) - len(
                workspace.tokenizer.encode(opening.strip())
            )
            right.append(greedy[-wanted:].tolist() == ids[-wanted:])
    return right


def test_the_score_is_that_of_a_plain_computation(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    eval_command(overrides=EXACT, tasks="core", core_files=Path("bundle"))
    found = read_results(Path("checkpoints/tasks.json"))
    centered = []
    for task in TASKS:
        right, one = plain(workspace, task), found[f"core/{task['label']}"]
        assert one["outcomes"]["acc"] == [float(each) for each in right]
        accuracy, chance = float(np.mean(right)), BASELINE[task["label"]] / 100
        assert one["metrics"]["acc"]["value"] == pytest.approx(accuracy)
        centered.append((accuracy - chance) / (1 - chance))
        assert one["metrics"]["centered"]["value"] == pytest.approx(centered[-1])
        assert (one["documents"], one["fewshot"], one["group"]) == (20, task["num_fewshot"][0], "core")
    assert found["core"]["metrics"]["centered"]["value"] == pytest.approx(np.mean(centered))
    assert found["core"]["tasks"] == 3
    printed = capsys.readouterr().out
    assert f"{np.mean(centered):.4f}" in printed and "3 of the 22 tasks" in printed


def test_a_model_that_knows_the_answers_has_the_full_score() -> None:
    from evaluation.core import CoreTask, run_core
    from evaluation.likelihood import Likelihood
    from tests.workspace import small_tokenizer

    tokenizer = small_tokenizer()
    rows: list[dict[str, Any]] = [
        {"query": f"{number} or", "choices": ["fox", "the dog", "Deich"], "gold": number % 3} for number in range(9)
    ]
    task = CoreTask("one", "multiple_choice", rows, 1, " ", 1 / 3)
    answers = {f"{row['query']} {row['choices'][row['gold']]}" for row in rows}

    def score(pairs: Any) -> list[Likelihood]:
        texts = [tokenizer.decode([*before, *after][1:]).split("\n\n")[-1] for before, after in pairs]
        return [
            Likelihood(-len(after) * (0.1 if text in answers else 2.0), False) for text, (_, after) in zip(texts, pairs)
        ]

    whole, alone = run_core([task], tokenizer, score)
    assert whole.metrics["centered"].value == pytest.approx(1.0) and alone.metrics["acc"].value == 1.0


def test_the_limit_takes_the_first_of_each_task(workspace: Workspace) -> None:
    eval_command(overrides=EXACT, tasks="core,quern_copying", core_files=Path("bundle"), limit=5)
    found = read_results(Path("checkpoints/tasks.json"))
    assert {one["documents"] for name, one in found.items() if "/" in name or name == "quern_copying"} == {5}


def cut(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_text((bundle / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda bundle: shutil.rmtree(bundle), "is not DCLM's evaluation bundle"),
        (cut("core.yaml", "icl_tasks", "tasks"), "is not DCLM's evaluation bundle"),
        (cut("core.yaml", '"schema"', '"riddle"'), "is of the kind riddle"),
        (cut("eval_meta_data.csv", "words", "other"), "no random baseline for the task words"),
        (lambda bundle: (bundle / "eval_data/some/words.jsonl").unlink(), "words.jsonl cannot be read"),
        (
            cut("eval_data/some/words.jsonl", "continuation", "answer"),
            "words.jsonl, line 1: there is no 'continuation'",
        ),
        (lambda bundle: (bundle / "eval_data/some/words.jsonl").write_text("{"), "words.jsonl cannot be read"),
        (lambda bundle: (bundle / "eval_data/some/words.jsonl").write_text("\n"), "words.jsonl is empty"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(
    made: Workspace, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(made.folder / "bundle", tmp_path / "bundle")
    spoil(tmp_path / "bundle")
    with pytest.raises(UserError) as refused:
        eval_command(tasks="core", core_files=tmp_path / "bundle", checkpoint="nowhere.pt")
    assert message in str(refused.value)
