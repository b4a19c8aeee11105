"""The held-out prompts that both checkpoints of a fine-tuning run answer, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.examples.encoding import encode_examples
from data.examples.reading import ChatExample, CompletionExample, Example, TextExample
from data.examples.samples import ExampleSamples
from evaluation.answering import write_before_after
from evaluation.before_after import BEFORE_AFTER, spread, summary
from evaluation.examples import evaluate_samples
from evaluation.run_report import read_run, write_report
from inference.answers import greedy_answers
from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from model.checkpoint import load_model
from tests.test_finetuning import QUICK, fresh, here, write_lines
from tests.test_report import Text, make_run
from tests.workspace import Workspace, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("answers"), "model.context_length=48", "model.init_std=0.05")


def held_out(workspace: Workspace, *examples: Example) -> ExampleSamples:
    encoded = encode_examples(workspace.tokenizer, examples, 48, "refuse").samples
    return ExampleSamples(encoded, workspace.tokenizer.pad_id, 48)


def answered(workspace: Workspace, samples: ExampleSamples, folder: Path, most: int = 9) -> list[dict[str, Any]]:
    """What both checkpoints, here one and the same, say to samples, ten tokens at most."""
    write_before_after(
        folder,
        (workspace.checkpoint, workspace.checkpoint),
        samples,
        spread(len(samples), most),
        workspace.tokenizer,
        lambda model, asked: greedy_answers(model, workspace.tokenizer, asked, 10),
        torch.device("cpu"),
        None,
    )
    cases: list[dict[str, Any]] = json.loads((folder / BEFORE_AFTER).read_text())["cases"]
    return cases


def test_prompts_are_spread_over_the_set() -> None:
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(3, 12) == [0, 1, 2]
    assert all(len(set(spread(total, 12))) == min(total, 12) for total in range(1, 99))


class TestAnswers:
    def test_each_format_is_asked_as_it_is_trained(self, workspace: Workspace, tmp_path: Path) -> None:
        """A conversation is asked for its last answer, a text for its second half."""
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d!")]
        messages = tuple({"role": role, "content": content} for role, content in turns)
        examples: list[Example] = [
            CompletionExample("s:1", "The dog", " sleeps"),
            ChatExample("s:2", messages),
            TextExample("s:3", "~" * 9),
        ]
        cases = answered(workspace, held_out(workspace, *examples), tmp_path)
        assert [(case["prompt"], case["reference"]) for case in cases] == [
            ("The dog", " sleeps"),
            ("<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>", "d!"),
            ("<|endoftext|>" + "~" * 5, "~" * 4),
        ]

    def test_what_stands_there_is_what_the_checkpoint_says_and_its_loss(
        self, workspace: Workspace, tmp_path: Path
    ) -> None:
        examples = [CompletionExample(f"s:{number}", "~" * number, " fox" * number) for number in range(1, 6)]
        samples = held_out(workspace, *examples)
        cases = answered(workspace, samples, tmp_path, most=2)
        model, _ = load_model(workspace.checkpoint)
        for case, number in zip(cases, spread(5, 2), strict=True):
            request = Request(workspace.tokenizer.encode("~" * (number + 1)), 10, SamplingSettings(temperature=0.0))
            pieces = list(Engine(model, workspace.tokenizer).generate([request]))
            one = held_out(workspace, examples[number])
            assert case["before"] == case["after"]
            assert case["before"]["text"] == "".join(piece.text for piece in pieces)
            assert case["before"]["ended"] == (pieces[-1].finish == "stop")
            loss = evaluate_samples(model, one, batch_size=1, device="cpu").loss
            assert case["before"]["loss"] == pytest.approx(loss, rel=1e-5)

    def test_the_token_that_ends_a_turn_ends_an_answer(self, workspace: Workspace) -> None:
        prompt = workspace.tokenizer.encode("The dog")
        model = workspace.model
        ((text, ended),) = greedy_answers(model, workspace.tokenizer, [(prompt, -1)], 5)
        first = Engine(model, workspace.tokenizer).generate([Request(prompt, 1, SamplingSettings(temperature=0.0))])
        assert greedy_answers(model, workspace.tokenizer, [(prompt, next(first).token)], 5) == [("", True)]
        assert text and not ended

    def test_an_answer_ends_with_the_context(self, workspace: Workspace) -> None:
        prompt = workspace.tokenizer.encode("~" * 44)
        room = 48 - len(prompt)
        assert 0 < room < 20
        answers = [greedy_answers(workspace.model, workspace.tokenizer, [(prompt, -1)], most) for most in (room, 100)]
        assert answers[0] == answers[1]


def said(text: str, ended: bool, loss: float) -> dict[str, Any]:
    return {"text": text, "ended": ended, "loss": loss}


CASES = [
    {
        "prompt": "<b>1</b>",
        "reference": "one",
        "before": said("<script>alert(1)</script>", False, 4.0),
        "after": said("one", True, 1.0),
    },
    {"prompt": "2", "reference": "two", "before": said("2 2 2", False, 6.0), "after": said("to", True, 2.0)},
]


def test_figures() -> None:
    assert [figures[1:] for figures in summary(CASES)] == [
        ("5.000", "1.500"),
        ("0 of 2", "1 of 2"),
        ("0 of 2", "2 of 2"),
    ]


def test_the_page_shows_them_and_never_runs_what_a_model_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tuned")
    without = write_report(read_run(run)).read_text(encoding="utf-8")
    assert "Before and after" not in without
    whole = {"before": "start.pt", "after": "tuned.pt", "held_out": 1234, "cases": CASES}
    (run / BEFORE_AFTER).write_text(json.dumps(whole))
    page = Text(write_report(read_run(run)).read_text(encoding="utf-8"))
    words = "".join(page.words)
    assert "script" not in page.tags and "b" in page.tags and not page.addresses
    assert "<script>alert(1)</script>" in page.words and "<b>1</b>" in page.words
    assert "2 of 1,234 held-out prompts" in words and words.count("✓ word for word") == 1
    assert words.count("cut off") == 2 and "loss 1.000" in words


def steps(number: int) -> list[str]:
    return ["training.epochs=null", f"training.max_steps={number}"]


class TestCommand:
    def test_a_run_ends_with_the_page_and_says_so(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        settings = [*QUICK, *steps(2), "training.run_name=tuned", "data.finetuning.before_after=2"]
        status, output, errors = here(folder, "--dataset", "animals.jsonl", *settings)
        assert status == 0, errors
        assert (
            "Wrote checkpoints/finetuned/model_step_2.pt and runs/tuned/report.html, with held-out prompts answered "
            "before and after.\n" in output
        )
        told = json.loads((folder / "runs/tuned" / BEFORE_AFTER).read_text())
        assert (told["before"], told["after"]) == (
            "checkpoints/model_step_7.pt",
            "checkpoints/finetuned/model_step_2.pt",
        )
        for case in told["cases"]:
            assert case["prompt"].startswith("The ") and case["reference"].endswith("!")
            assert case["after"]["loss"] < case["before"]["loss"]
        page = (folder / "runs/tuned/report.html").read_text()
        assert "Before and after" in page and told["cases"][0]["prompt"] in page

    def test_the_best_checkpoint_is_the_one_that_is_asked_and_recommended(self, tmp_path: Path) -> None:
        """At this rate the loss on prompts of another kind soon rises."""
        folder = fresh(tmp_path)
        others = [{"prompt": f"{number}", "completion": "~" * 9} for number in range(4)]
        write_lines(folder / "val.jsonl", *others)
        settings = [*QUICK, "training.epochs=12", "training.adamw.learning_rate=0.03", "training.run_name=tuned"]
        every = ["training.eval_interval=2", "training.checkpoint_interval=2"]
        status, output, errors = here(
            folder, "--dataset", "animals.jsonl", "--validation", "val.jsonl", *settings, *every
        )
        assert status == 0, errors
        best = json.loads((folder / "runs/tuned" / BEFORE_AFTER).read_text())["after"]
        assert best != "checkpoints/finetuned/model_step_12.pt" and (folder / best).exists()
        assert f"The best checkpoint is {best}: validation loss " in output
        assert output.splitlines()[-1].startswith(f"Next: python scripts/generate.py --checkpoint {best} --prompt ")

    def test_none_where_none_are_wanted_and_a_word_where_the_start_is_gone(self, tmp_path: Path) -> None:
        folder = fresh(tmp_path)
        settings = [*QUICK, *steps(1), "training.run_name=tuned", "data.finetuning.before_after=0"]
        status, output, _ = here(folder, "--dataset", "animals.jsonl", *settings)
        assert status == 0 and "runs/tuned/report.html.\n" in output
        assert not (folder / "runs/tuned" / BEFORE_AFTER).exists()
        (folder / "checkpoints/model_step_7.pt").unlink()
        more = ["training.max_steps=2", "data.finetuning.before_after=2"]
        status, output, errors = here(folder, "--resume", "latest", *more)
        assert status == 0, errors
        assert "No prompts were answered for the page of the run: There is no checkpoint" in output
        assert output.splitlines()[-1].startswith("Next: python scripts/generate.py")
