"""Perplexity: which tokens are scored, with what context, and that nothing else changes the figures."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from config.errors import UserError
from config.load import load_config
from data.tokens import TokenFiles
from evaluation.bootstrap import ratio_interval
from evaluation.perplexity import Evaluation, default_batch_size, evaluate_tokens
from inference.quantization import quantize_
from model.checkpoint import save_checkpoint
from model.transformer import Transformer
from scripts.eval import evaluate as eval_command
from tests.workspace import Workspace, command, make_workspace, small_tokenizer

VOCAB_SIZE = 50


def small_model() -> Transformer:
    config = load_config(
        [],
        ["model.n_layers=2", "model.d_model=32", "model.n_heads=2", "model.context_length=16"]
        + [f"model.vocab_size={VOCAB_SIZE}", "model.zero_init_projections=false", "model.init_std=0.3"],
    )
    return Transformer(config.model)


MODEL = small_model()
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 400).astype(np.uint16)


def evaluate(tokens: np.ndarray = TOKENS, model: nn.Module = MODEL, **options: Any) -> Evaluation:
    defaults: dict[str, Any] = {"context_length": 16, "stride": 8, "batch_size": 4, "device": "cpu"}
    return evaluate_tokens(model, tokens, **{**defaults, **options})


class Recorder(nn.Module):
    """Remembers the windows it was shown; knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += inputs.tolist()
        return torch.zeros(*inputs.shape, 100)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 90), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_scored_once_with_context(count: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    batch_size = data.draw(st.integers(1, 5))
    tokens = np.arange(count)
    model = Recorder()
    blocks = np.arange(1, count + 1)  # a block per token: its sums say how often it was scored
    found = evaluate(tokens, model, context_length=context, stride=stride, batch_size=batch_size, block_ends=blocks)
    assert found.block_sums[:, 1].tolist() == [0.0] + [1.0] * (count - 1)
    assert found.tokens == count - 1
    assert {len(window) for window in model.seen} == {min(context, count - 1)}
    ends = [window[-1] + 1 for window in model.seen]
    assert ends == sorted(set(ends)) and ends[-1] == count - 1
    assert all(later - earlier <= stride for earlier, later in zip(ends, ends[1:]))


def test_loss_is_that_of_a_plain_loop() -> None:
    losses = []
    with torch.no_grad():
        for target in range(1, 60):
            # The window of the stride's grid in which this target is scored for the first time.
            end = 16 if target <= 16 else 16 + -(-(target - 16) // 8) * 8
            end = min(end, 59)
            window = torch.from_numpy(TOKENS[max(0, end - 16) : target].astype(np.int64))[None]
            log_probabilities = MODEL(window)[0, -1].log_softmax(-1)
            losses.append(-float(log_probabilities[int(TOKENS[target])]))
    found = evaluate(TOKENS[:60])
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_with_masked_documents_a_token_is_predicted_from_its_own_alone() -> None:
    """But for the first of each, which is predicted from the end of the one before, as in training."""
    ends = np.array([3, 4, 30, 60], dtype=np.uint64)
    losses = []
    with torch.no_grad():
        for target in range(1, 60):
            last = 16 if target <= 16 else 16 + -(-(target - 16) // 8) * 8
            own = int(np.searchsorted(ends, np.uint64(target - 1), side="right"))
            start = max(0, min(last, 59) - 16)
            begin = max(start, int(ends[own - 1]) if own else 0)
            # Positions count from the window's start, which is why the rest of it stands there, as another document.
            window = torch.from_numpy(TOKENS[start:target].astype(np.int64))[None]
            documents = (torch.arange(start, target) >= begin).int()[None]
            log_probabilities = MODEL(window, documents=documents)[0, -1].log_softmax(-1)
            losses.append(-float(log_probabilities[int(TOKENS[target])]))
    found = evaluate(TOKENS[:60], document_ends=ends)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert abs(found.loss - evaluate(TOKENS[:60]).loss) > 1e-3


def test_more_context_helps_a_model_that_can_use_it() -> None:
    class Echo(nn.Module):
        """Knows a token's successor once it has seen it in the window."""

        def forward(self, inputs: Tensor) -> Tensor:
            logits = torch.zeros(*inputs.shape, VOCAB_SIZE)
            for row, window in enumerate(inputs.tolist()):
                known: dict[int, int] = {}
                for place, token in enumerate(window):
                    if place:
                        known[window[place - 1]] = token
                    if token in known:
                        logits[row, place, known[token]] = 10.0
            return logits

    tokens = np.tile(np.arange(6), 20)
    apart, strided = evaluate(tokens, Echo(), stride=16), evaluate(tokens, Echo(), stride=4)
    assert strided.tokens == apart.tokens
    assert strided.loss < 0.6 * apart.loss


def test_figures_do_not_depend_on_batch_size_or_number_of_processes() -> None:
    sizes = np.arange(VOCAB_SIZE, dtype=np.int32)
    ends = np.array([50, 51, 200, 390, 400])
    whole = evaluate(token_bytes=sizes, block_ends=ends)
    for batch_size in (1, 7, 100):
        other = evaluate(token_bytes=sizes, block_ends=ends, batch_size=batch_size)
        np.testing.assert_allclose(other.block_sums, whole.block_sums, rtol=1e-6)
        assert (other.tokens, other.bytes) == (whole.tokens, whole.bytes)
    for world_size in (2, 3, 70):
        total = np.zeros_like(whole.block_sums)

        def all_reduce(sums: Tensor) -> None:
            total[...] += sums.numpy()
            sums.copy_(torch.from_numpy(whole.block_sums))

        for rank in range(world_size):
            options: dict[str, Any] = {"rank": rank, "world_size": world_size, "all_reduce": all_reduce}
            assert evaluate(token_bytes=sizes, block_ends=ends, **options).loss == whole.loss
        np.testing.assert_allclose(total, whole.block_sums, rtol=1e-6)


def test_max_tokens_scores_exactly_the_first_ones() -> None:
    assert evaluate(max_tokens=100).block_sums.tolist() == evaluate(TOKENS[:101]).block_sums.tolist()
    assert evaluate(max_tokens=100).tokens == 100
    assert evaluate(max_tokens=10**9).tokens == 399


def test_bits_per_byte_counts_the_text_of_the_scored_tokens_alone() -> None:
    sizes = np.full(VOCAB_SIZE, 3, dtype=np.int32)
    special = int(TOKENS[7])
    sizes[special] = 0
    found = evaluate(TOKENS[:17], context_length=16, token_bytes=sizes)
    with torch.no_grad():
        log_probabilities = MODEL(torch.from_numpy(TOKENS[:16].astype(np.int64))[None])[0].log_softmax(-1)
    text = [(place, int(token)) for place, token in enumerate(TOKENS[1:17]) if token != special]
    nats = -sum(float(log_probabilities[place, token]) for place, token in text)
    assert found.bytes == 3 * len(text) < 3 * 16
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * len(text)), rel=1e-6)
    assert evaluate().bits_per_byte is None


def test_leaves_the_mode_of_the_model_and_turns_dropout_off() -> None:
    config = MODEL.config.model_copy(update={"dropout": 0.5})
    model = Transformer(config)
    model.load_state_dict(MODEL.state_dict())
    model.train()
    assert evaluate(model=model).loss == evaluate().loss
    assert model.training


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        sizes = generator.integers(5, 50, size=60).astype(np.float64)
        losses = generator.normal(2.0, 0.5, size=60) * sizes
        interval = ratio_interval(losses, sizes)
        assert interval is not None
        hits += interval[0] <= 2.0 <= interval[1]
    assert 0.85 <= hits / 60 <= 0.99


def test_interval_is_deterministic_and_absent_where_it_would_mean_nothing() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, size=5000)
    ones = np.ones(5000)
    interval = ratio_interval(values, ones)
    assert interval == ratio_interval(values, ones)
    assert interval is not None
    half_width = 1.96 / 5000**0.5
    assert interval[1] - interval[0] == pytest.approx(2 * half_width, rel=0.15)
    assert ratio_interval(values[:7], ones[:7]) is None
    assert ratio_interval(np.r_[values[:7], 0.0], np.r_[ones[:7], 0.0]) is None


def test_result_as_json() -> None:
    found = evaluate(token_bytes=np.ones(VOCAB_SIZE, dtype=np.int32))
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["perplexity"] == pytest.approx(math.exp(saved["loss"]))
    assert saved["loss_interval"][0] < saved["loss"] < saved["loss_interval"][1]
    assert saved["perplexity_interval"][0] == pytest.approx(math.exp(saved["loss_interval"][0]))
    assert saved["tokens"] == saved["bytes"] == 399


@pytest.mark.parametrize(("options", "reason"), [({"stride": 17}, "stride"), ({"stride": 0}, "stride")])
def test_a_stride_that_would_skip_tokens_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate(**options)


def test_one_token_is_too_few() -> None:
    with pytest.raises(ValueError, match="two tokens"):
        evaluate(TOKENS[:1])


def test_default_batch_keeps_the_logits_small() -> None:
    assert default_batch_size(256, 4096, "cpu") == 4
    assert default_batch_size(256, 4096, "cuda") == 64
    assert default_batch_size(1024, 50257, "cuda") == 2
    assert default_batch_size(8192, 200_000, "cuda") == default_batch_size(1024, 50257) == 1


EXACT = ["training.precision=fp32"]


def expected(workspace: Workspace, tokens: Any, stride: int = 16, **options: Any) -> Evaluation:
    settings: dict[str, Any] = {"context_length": 32, "stride": stride, "batch_size": 4, "device": "cpu"}
    sizes = workspace.tokenizer.token_bytes()
    return evaluate_tokens(workspace.model, tokens, **settings, token_bytes=sizes, **options)


def test_the_command_evaluates_the_validation_tokens(workspace: Workspace) -> None:
    run_dir = workspace.folder / "runs/small-run"
    run_dir.mkdir(parents=True)
    done = subprocess.run(
        command("scripts/eval.py", *EXACT), cwd=workspace.folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    files = TokenFiles(Path("corpus/tokens"), "val")
    wanted = expected(workspace, files)
    saved = json.loads((run_dir / "evaluation.json").read_text())
    assert saved["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert saved["tokens"] == len(files) - 1
    # Every byte of the texts is scored but those of the very first token.
    assert (
        saved["bytes"] == sum(file.bytes for file in files.files) - workspace.tokenizer.token_bytes()[files.read(0, 1)]
    )
    about = {key: saved[key] for key in ("checkpoint", "step", "text", "context_length", "stride", "precision")}
    assert about == {
        "checkpoint": "checkpoints/model_step_7.pt",
        "step": 7,
        "text": "corpus/tokens/val.bin",
        "context_length": 32,
        "stride": 16,
        "precision": "fp32",
    }
    for figure in (f"{wanted.loss:.4f}", f"{wanted.bits_per_byte:.4f}", f"{wanted.tokens:,}", f"{saved['bytes']:,}"):
        assert figure in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Written to runs/small-run/evaluation.json. Next: python scripts/generate.py --prompt ")


def test_a_model_of_masked_documents_is_evaluated_as_it_was_trained(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = workspace.config.model_copy(
        update={"training": workspace.config.training.model_copy(update={"documents": "masked"})}
    )
    state = torch.load(workspace.checkpoint, weights_only=True)
    save_checkpoint(workspace.checkpoint, {**state, "config": masked.model_dump()})
    eval_command(overrides=EXACT, as_json=True)
    files = TokenFiles(Path("corpus/tokens"), "val")
    wanted = expected(workspace, files, document_ends=files.document_ends)
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert abs(wanted.loss - expected(workspace, files).loss) > 1e-3


def test_a_text_file_is_scored_to_the_last_byte(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    text = "A text of its own, mit Umlauten äöü und 😀.\n" * 20
    path = workspace.folder / "own.txt"
    path.write_bytes(text.encode())
    eval_command(overrides=[*EXACT, "training.runs_dir=elsewhere"], text=[path], stride=8, batch_size=3, as_json=True)
    printed = capsys.readouterr()
    saved = json.loads(printed.out)
    ids = workspace.tokenizer.encode(text)
    wanted = expected(workspace, np.array([workspace.tokenizer.end_of_text_id, *ids]), stride=8)
    assert saved["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert (saved["tokens"], saved["bytes"]) == (len(ids), len(text.encode()))
    assert json.loads((workspace.folder / "checkpoints/evaluation-own.json").read_text()) == saved
    assert "checkpoints/evaluation-own.json" in printed.err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_fewer_bits_cost_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    workspace = make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    eval_command(overrides=[*EXACT, "training.runs_dir=elsewhere"], quantize=kind, as_json=True)
    printed = capsys.readouterr()
    before, saved = expected(workspace, TokenFiles(Path("corpus/tokens"), "val")), json.loads(printed.out)
    assert saved["quantize"] == kind
    line = f"Weights in {kind} instead of as they were saved: loss {before.loss:.4f} -> {saved['loss']:.4f} "
    assert line in printed.err
    quantized = copy.deepcopy(workspace.model)
    quantize_(quantized, kind)  # type: ignore[arg-type]
    wanted = expected(replace(workspace, model=quantized), TokenFiles(Path("corpus/tokens"), "val"))
    assert saved["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert abs(saved["loss"] - before.loss) > 1e-5


@pytest.mark.slow
def test_two_processes_find_what_one_does(workspace: Workspace) -> None:
    path = workspace.folder / "checkpoints/evaluation.json"
    options = [*EXACT, "training.runs_dir=elsewhere", "training.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    eval_command(overrides=options)
    alone = json.loads(path.read_text())
    path.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = command("scripts/eval.py", *options)[1:]
    done = subprocess.run([*launcher, *script], cwd=workspace.folder, env=environment, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()
    together = json.loads(path.read_text())
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert together["tokens"] == alone["tokens"]
    assert done.stdout.decode().count("Written to") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 33}, "would skip tokens: the model sees 32"),
        ({"text": [Path("nowhere.txt")]}, "nowhere.txt is not a file"),
        ({"text": [Path("empty.txt")]}, "empty.txt is empty"),
        ({"text": [Path("latin.txt")]}, "not UTF-8"),
        ({"checkpoint": "nowhere.pt"}, "no checkpoint nowhere.pt"),
        ({"overrides": ["training.checkpoint_dir=nowhere"]}, "python scripts/train.py"),
        ({"overrides": ["data.tokens_dir=nowhere"]}, "python data/preprocess.py"),
    ],
)
def test_what_is_refused(workspace: Workspace, options: dict[str, Any], message: str) -> None:
    (workspace.folder / "empty.txt").write_bytes(b"")
    (workspace.folder / "latin.txt").write_bytes("Zwölf".encode("latin-1"))
    with pytest.raises(UserError) as refused:
        eval_command(**options)
    assert message in str(refused.value)


def test_what_was_made_by_another_tokenizer_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    foreign = make_workspace(tmp_path / "foreign", tokenizer_fingerprint="b" * 64)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        eval_command(checkpoint=str(foreign.checkpoint))
    newer = small_tokenizer("data.tokenizer.vocab_size=290")
    newer.save(tmp_path / "tokenizer")
    other = make_workspace(tmp_path / "other", tokenizer_fingerprint=newer.fingerprint)
    with pytest.raises(UserError, match="token files were made by"):
        eval_command(checkpoint=str(other.checkpoint), overrides=[f"data.tokenizer_dir={tmp_path / 'tokenizer'}"])


def test_too_few_documents_fall_back_to_windows_as_blocks(workspace: Workspace) -> None:
    """Four documents say little by themselves, but their 29 windows do."""
    eval_command(overrides=[*EXACT, "training.runs_dir=elsewhere"])
    saved = json.loads((workspace.folder / "checkpoints/evaluation.json").read_text())
    low, high = saved["loss_interval"]
    assert low < saved["loss"] < high
