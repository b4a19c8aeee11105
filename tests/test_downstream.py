"""Tasks of `lm-eval` on a checkpoint: the figures are the harness's own, and each run ends with some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config.errors import UserError
from config.load import load_config, with_vocab_size
from data.tokenization import Tokenizer, train_tokenizer
from evaluation.downstream import read_results
from evaluation.harness import HarnessModel
from evaluation.likelihood import Likelihood
from evaluation.tasks.build import held_out
from model.checkpoint import save_checkpoint
from model.transformer import Transformer
from scripts.eval import evaluate as eval_command
from tests.workspace import command

LLAMA = ["model.activation=swiglu", "model.qk_norm=false", "model.zero_init_projections=false"]
SMALL = ["model.n_layers=2", "model.n_heads=2", "model.d_model=48", "model.context_length=64"]
EXACT = ["training.precision=fp32", "training.device=cpu"]

MULTIPLE_CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 1
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LIKELIHOOD = """
task: own_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + choices[gold]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
task: own_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: own_writing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n", "the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = [MULTIPLE_CHOICE, LIKELIHOOD, ROLLING, WRITING]
NAMES = [task.split()[1] for task in TASKS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a checkpoint that has learnt a little, and task files over the built-in corpus."""
    from evaluation.tasks import build

    folder = tmp_path_factory.mktemp("trained")
    texts = held_out(None, ())
    config = load_config([], ["data.tokenizer.vocab_size=400", *SMALL, *LLAMA])
    tokenizer = train_tokenizer(iter(text[:20_000] for text in texts), config.data.tokenizer)
    tokenizer.save(folder / "corpus/tokenizer")
    config = with_vocab_size(config, tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config.model)
    learn(model, tokenizer, texts)
    state = {"model": model.state_dict(), "config": config.model_dump(), "step": 40, "run_name": "small-run"}
    state |= {"tokenizer_fingerprint": tokenizer.fingerprint, "validation_loss": None}
    save_checkpoint(folder / "checkpoints/model_step_40.pt", state)

    questions = [dict(one) for one in build.cloze()["test"].select(range(10))]
    questions[0]["context"] *= 12  # longer than the model sees
    lines(folder / "tasks/choice.jsonl", questions)
    lines(folder / "tasks/texts.jsonl", [{"text": text[:600]} for text in texts[:4]])
    for task in TASKS:
        (folder / f"tasks/{task.split()[1]}.yaml").write_text(task.replace("FOLDER", str(folder / "tasks")))
    return folder


def learn(model: Transformer, tokenizer: Tokenizer, texts: Any) -> None:
    tokens = np.concatenate([tokenizer.encode(text[:4000]) for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        starts = np.random.default_rng(step).integers(0, len(tokens) - 65, 8)
        rows = torch.from_numpy(np.stack([tokens[start : start + 65] for start in starts]))
        (model(rows[:, :-1], rows[:, 1:]) / 512).backward()
        optimizer.step()
        optimizer.zero_grad()


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return trained


def run(tasks: str, **options: Any) -> dict[str, Any]:
    eval_command(overrides=EXACT, tasks=tasks, **options)
    return read_results(Path("checkpoints/tasks.json"))


@pytest.mark.slow
@pytest.mark.parametrize("fewshot", [None, 3])
def test_figures_equal_those_of_lm_eval_on_the_exported_model(folder: Path, fewshot: int | None) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from data.tokenization import load_tokenizer
    from model.checkpoint import load_model
    from model.huggingface.exporting import to_huggingface

    model, _ = load_model(folder / "checkpoints/model_step_40.pt", torch.device("cpu"))
    to_huggingface(model).save_pretrained(folder / "exported")
    load_tokenizer(folder / "corpus/tokenizer").save(folder / "exported-tokenizer")
    theirs = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folder / "exported"),
            "tokenizer": str(folder / "exported-tokenizer"),
            "dtype": "float32",
        },
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        num_fewshot=fewshot,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    ours = run(",".join(NAMES), include_path=[folder / "tasks"], fewshot=fewshot)
    assert theirs is not None
    for name in NAMES:
        figures = {key.removesuffix(",none"): value for key, value in theirs["results"][name].items() if "," in key}
        figures = {key: value for key, value in figures.items() if not key.startswith(("alias", "acc_stderr"))}
        found = {key: one["value"] for key, one in ours[name]["metrics"].items()}
        assert found == pytest.approx({key: figures[key] for key in found}, rel=1e-4)
        assert set(found) == {key for key in figures if "_stderr" not in key}
        samples = sorted(theirs["samples"][name], key=lambda sample: int(sample["doc_id"]))
        for metric in ("acc", "acc_norm", "exact_match"):
            if metric in found:
                assert found[metric] == figures[metric]
                assert ours[name]["outcomes"][metric] == [sample[metric] for sample in samples]
        if name == "own_last_word":
            theirs_each = [float(sample["resps"][0][0][0]) for sample in samples]
            assert ours[name]["outcomes"]["perplexity"] == pytest.approx(theirs_each, abs=1e-3)
    assert ours["own_choice"]["fewshot"] == (1 if fewshot is None else fewshot)


def test_tasks_of_the_project_need_nothing_but_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("quern", limit=6)
    members = ["quern_arithmetic", "quern_cloze", "quern_copying", "quern_next_line"]
    assert sorted(name for name, one in found.items() if one["group"] == "quern") == members
    accuracies = [found[name]["metrics"]["acc"]["value"] for name in members]
    assert found["quern"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(accuracies))
    for name in members:
        assert np.mean(found[name]["outcomes"]["acc"]) == found[name]["metrics"]["acc"]["value"]
        assert (found[name]["documents"], found[name]["limit"], found[name]["step"]) == (6, 6, 40)
    assert read_results(Path("checkpoints/evaluations/step_40/tasks.json"))["quern"] == found["quern"]
    printed = capsys.readouterr().out
    assert "quern_cloze" in printed and "Written to checkpoints/tasks.json" in printed
    before = found["quern_cloze"]
    again = run("quern_cloze", limit=6, as_json=True)
    assert again["quern_cloze"] == {**before, "group": None} and again["quern"] == found["quern"]
    assert json.loads(capsys.readouterr().out) == {"quern_cloze": again["quern_cloze"]}


def test_questions_come_from_held_out_text_alone_and_are_always_the_same() -> None:
    from evaluation.tasks import build

    texts = held_out(None, ())
    for make in (build.cloze, build.next_line):
        questions = list(make()["test"])
        assert questions == list(make()["test"]) and len(questions) == build.QUESTIONS
        golds = [question["gold"] for question in questions]
        assert 0.15 < np.mean(np.array(golds) == 0) < 0.35
        flat = " ".join(" ".join(texts).split())
        for question in questions:
            right = question["choices"][question["gold"]]
            assert len(set(question["choices"])) == build.CHOICES
            said = question["context"].split() + right.split()
            assert make is build.next_line or " ".join(said) in flat
            assert make is build.cloze or any(right + "\n" in text + "\n" for text in texts)
    for question in build.arithmetic()["test"]:
        left, sign, right_number, _ = question["context"].split("\n")[-1].split()
        result = int(left) + int(right_number) * (1 if sign == "+" else -1)
        assert int(question["choices"][question["gold"]]) == result
    for question in build.copying()["test"]:
        listed, again = question["context"].split("\n")
        place = len(again.rstrip(",").split(", "))
        assert question["choices"][question["gold"]] == listed.rstrip(".").split(", ")[place]


def test_what_is_held_out_is_what_preprocessing_holds_out(tmp_path: Path) -> None:
    from data.download_datasets import download_datasets
    from data.preprocess import preprocess
    from data.tokenization import load_tokenizer
    from data.tokens import TokenFiles
    from tests.workspace import small_tokenizer

    small_tokenizer().save(tmp_path / "tokenizer")
    words = [f"data.corpus_dir={tmp_path}", "data.preprocess.workers=1", "data.preprocess.validation_fraction=0.02"]
    download_datasets(words=words)
    preprocess(overrides=words)
    files, tokenizer = TokenFiles(tmp_path / "tokens", "val"), load_tokenizer(tmp_path / "tokenizer")
    ends = [0, *files.document_ends.tolist()]
    texts = {tokenizer.decode(files.read(first, last - first - 1)) for first, last in zip(ends, ends[1:])}
    assert texts == set(held_out(0.02, ()))


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path) -> None:
    names, path = ",".join(NAMES), folder / "checkpoints/tasks.json"
    alone = run(names, include_path=[folder / "tasks"])
    path.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = command("scripts/eval.py", "--tasks", names, "--include-path", str(folder / "tasks"), *EXACT)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], cwd=folder, env=environment, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()
    together = read_results(path)
    for name in NAMES:
        values = {key: one["value"] for key, one in alone[name]["metrics"].items()}
        assert {key: one["value"] for key, one in together[name]["metrics"].items()} == pytest.approx(values, rel=1e-5)
        assert together[name]["fingerprint"] == alone[name]["fingerprint"]
    assert done.stdout.decode().count("Written to") == 1


def test_a_continuation_that_melts_into_the_context_is_scored_from_where_it_differs(folder: Path) -> None:
    from data.tokenization import load_tokenizer

    tokenizer = load_tokenizer(folder / "corpus/tokenizer")
    asked: list[tuple[Any, Any]] = []

    def score(pairs: Any) -> list[Likelihood]:
        asked.extend(pairs)
        return [Likelihood(-1.0, False) for _ in pairs]

    model = HarnessModel(tokenizer, 64, score, lambda writings: [])

    class Request:
        def __init__(self, *args: str) -> None:
            self.args = args

    pairs = [("", "a text"), ("  ", "the"), ("the ", "end"), ("retur", "n"), ("x = ", "1")]
    assert model.loglikelihood([Request(*pair) for pair in pairs]) == [(-1.0, False)] * len(pairs)
    for (context, continuation), (before, after) in zip(pairs, asked, strict=True):
        ids = tokenizer.encode(context + continuation)
        whole = [*before, *after] if before[0] != tokenizer.end_of_text_id else [*before, *after][1:]
        assert before and after and whole == ids


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tasks": "quern_clozee"}, "no task quern_clozee. Did you mean quern_cloze"),
    ({"tasks": "helaswag"}, "Did you mean hellaswag"),
    ({"tasks": "quern", "include_path": [Path("nowhere")]}, "nowhere is no folder"),
    ({"tasks": " ,"}, "--tasks names no task"),
    ({"tasks": "quern", "text": [Path("x")]}, "--text is for text"),
    ({"tasks": "quern", "stride": 3}, "--stride is for text"),
    ({"limit": 3}, "--limit goes with --tasks"),
    ({"tasks": "core"}, "go together"),
    ({"text": [Path("x")], "source": "sample"}, "two different texts"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused_before_the_checkpoint_is_looked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        eval_command(checkpoint="nowhere.pt", **options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("choice.jsonl", "nowhere.jsonl"), "cannot be loaded: .*nowhere.jsonl"),
        (lambda text: text + "unsafe_code: true\n", "runs programs that the model writes"),
        (lambda text: text.replace("max_gen_toks: 12", "num_beams: 4"), "asks for num_beams"),
    ],
)
def test_task_files_that_cannot_be_run_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    (tmp_path / "own.yaml").write_text(change(WRITING.replace("FOLDER", str(folder / "tasks"))))
    with pytest.raises(UserError, match=message):
        run("own_writing", include_path=[tmp_path])


def test_too_little_held_out_text_makes_no_questions() -> None:
    from evaluation.tasks import build

    with pytest.raises(UserError, match="validation_fraction of 0.01 or more"):
        build.cloze(validation_fraction=0.0001)
