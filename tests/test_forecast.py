"""What a training run would take: held against published models, and against memory that a real step takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.load import load_config
from tests.commands import here
from training.estimate import Sizes
from training.forecast import memory_rows, read_question, run_rows

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "gpt2-small": ("variant=gpt2-small", 124_439_808),
    "gpt2-xl": ("variant=gpt2-xl", 1_557_611_200),
    "Llama 2 7B": (
        "variant=modern-1b vocab_size=32000 n_layers=32 n_heads=32 n_kv_heads=32 d_model=4096 d_ff=11008",
        6_738_415_616,
    ),
    "Llama 3 8B": (
        "variant=modern-1b vocab_size=128256 n_layers=32 n_heads=32 n_kv_heads=8 d_model=4096 d_ff=14336",
        8_030_261_248,
    ),
}


def sizes(*overrides: str) -> Sizes:
    return Sizes(load_config([], list(overrides)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    shape, parameters = PUBLISHED[name]
    assert sizes(*(f"model.{word}" for word in shape.split())).parameters == parameters


@pytest.mark.parametrize(
    ("shape", "tokens", "published"),
    [
        ("variant=gpt2-small n_layers=96 n_heads=96 d_model=12288 context_length=2048", 300e9, 3.14e23),
        (
            "variant=modern-1b vocab_size=128256 n_layers=126 n_heads=128 n_kv_heads=8 d_model=16384 d_ff=53248",
            15.6e12,
            3.8e25,
        ),
    ],
    ids=["GPT-3", "Llama 3 405B"],
)
def test_arithmetic_as_published(shape: str, tokens: float, published: float) -> None:
    """Brown et al., 2020, table D.1; Dubey et al., 2024, section 1: attention's own products are not counted."""
    model = sizes(*(f"model.{word}" for word in shape.split()))
    attention = 12 * model.model.n_layers * model.model.d_model * model.length
    assert (model.flops_per_token - attention) * tokens == pytest.approx(published, rel=0.01)


def test_arithmetic_of_gpt2_as_published() -> None:
    """nanoGPT's transformer_sizing.ipynb, by PaLM's formula: GPT-2 without biases on a sequence of 1,024 tokens."""
    assert sizes("model.variant=gpt2-small", "model.bias=false").flops_per_token * 1024 == 875_062_886_400


STEPS = """
import json, os, re, sys
import torch
from config.load import load_config
from model.transformer import Transformer
from training.optimizers import make_optimizers

def peak():
    # Not ru_maxrss, which begins with that of the process that this one was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def train(config, rows, length, steps):
    model = Transformer(config.model)
    model.set_gradient_checkpointing(config.training.gradient_checkpointing)
    optimizers = make_optimizers(model, config.training)
    for _ in range(steps):
        for _ in range(2):  # two micro-batches: the second finds gradients there
            tokens = torch.randint(0, config.model.vocab_size, (rows, length))
            model(tokens, tokens).backward()
        optimizers.step(torch.tensor(False))
        optimizers.zero_grad()

rows, length, ways = json.loads(sys.argv[1])
small = ["model.n_layers=1", "model.d_model=64", "model.d_ff=64", "model.vocab_size=128"]
train(load_config([], small), 1, 128, 1)  # what is loaded at first use is loaded once
for overrides in ways:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        train(load_config([], [*overrides, *small]), 1, 128, 1)  # maps the libraries again
        before = peak()
        train(load_config([], overrides), rows, length, 2)
        print(peak() - before, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
MEASURED = "variant=modern-125m vocab_size=8192 n_layers=4 n_heads=4 n_kv_heads=2 d_model=256 d_ff=1024"
WAYS = [(optimizer, kept) for optimizer in ("adamw", "muon") for kept in ("none", "selective", "full")]


def settings_of(optimizer: str, checkpointing: str) -> list[str]:
    words = [f"model.{word}" for word in MEASURED.split()]
    return [*words, f"training.optimizer={optimizer}", f"training.gradient_checkpointing={checkpointing}"]


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[str, str], int]:
    """The bytes that two steps over two sequences of 512 tokens took at their peak, in a process for each way."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, so that the peak is seen
    command = [sys.executable, "-c", STEPS, json.dumps([2, 512, [settings_of(*way) for way in WAYS]])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(WAYS, map(int, done.stdout.split()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "checkpointing"), WAYS)
def test_memory_as_measured(peaks: dict[tuple[str, str], int], optimizer: str, checkpointing: str) -> None:
    words = [*settings_of(optimizer, checkpointing), "training.sequence_length=512"]
    estimated = Sizes(load_config([], words)).memory(2, mixed=False)
    assert peaks[optimizer, checkpointing] == pytest.approx(estimated.total, rel=0.12)


def test_the_example_of_the_help() -> None:
    question = read_question(["model=modern-1b", "gpus=64", "tokens=20B", "gpu=h100"])
    counted = Sizes(question.config)
    run = dict(run_rows(question, counted))
    assert run["parameters"] == "1,136,732,160"
    assert run["tokens of this run"].startswith("20.0B")
    seconds = 20e9 * counted.flops_per_token / (64 * 989e12 * 0.4)
    assert f"({seconds / 86400:.2f} days)" in run["time"]
    table = {row[0]: row[1:] for row in memory_rows(question, counted)}
    assert table["fits"] == ("yes", "yes", "yes")
    ddp, fsdp, hsdp = (float(cell.split()[0]) for cell in table["optimizer"])
    assert hsdp == pytest.approx(ddp / 8, abs=0.01) and fsdp == pytest.approx(ddp / 64, abs=0.01)


def test_a_model_too_large_for_one_gpu_fits_when_it_is_divided() -> None:
    words = ["model=modern-1b", "gpus=16", "gpu=a100-40gb", "tokens=1B", "model.d_model=4096", "model.n_heads=32"]
    question = read_question([*words, "model.d_ff=12288", "training.batch_size=16", "training.micro_batch_size=1"])
    table = {row[0]: row[1:] for row in memory_rows(question, Sizes(question.config))}
    assert table["fits"] == ("no", "yes", "yes")
    assert table["most sequences that fit"] == ("none", "1", "1")


def test_what_is_outside_the_blocks_is_gathered_whole() -> None:
    small, large = (sizes("model.variant=modern-125m", f"model.vocab_size={words}") for words in (32768, 65536))
    more = large.outside_blocks - small.outside_blocks
    assert more == 32768 * small.model.d_model * (1 if small.model.tie_embeddings else 2)
    for shards in (2, 64):
        grown = {
            part: large.memory(1, shards, 64).parts[part] - size
            for part, size in small.memory(1, shards, 64).parts.items()
        }
        assert grown["gradients"] == 4 * more // shards, "reduced in every pass"
        assert grown["working copies"] >= 4 * more
        assert grown["or: gradients outside the blocks"] == 3 * 4 * more
    assert small.memory(1).parts["or: gradients outside the blocks"] == 0


def test_more_rows_more_activations_and_nothing_else() -> None:
    counted = sizes("model.variant=modern-125m")
    one, two = (counted.memory(rows).parts for rows in (2, 4))
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=1e-6)
    assert {part: size for part, size in one.items() if part != "activations"} == {
        part: size for part, size in two.items() if part != "activations"
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gpus=0"], "gpus=0: give a number above 0"),
        (["gpus=2.5"], "gpus=2.5"),
        (["mfu=2"], "at most 1"),
        (["gpu=h1000"], "Did you mean h100"),
        (["cards=8"], "cards=8: say model="),
        (["tokens=many"], "tokens=many"),
        (["model=modern-2b"], "modern-1b"),
        (["training.tensor_parallel=2"], "training.tensor_parallel=2 is not counted here: leave it out"),
    ],
)
def test_bad_words(words: list[str], told: str) -> None:
    from config.errors import UserError

    with pytest.raises(UserError, match=told):
        read_question(words)


def test_the_command() -> None:
    words = ["training", "model=gpt2-small", "gpus=8", "tokens=10B", "gpu=a100"]
    done = here(ROOT, "scripts/plan.py", *words)
    assert "124,439,808" in done.stdout and "fsdp" in done.stdout
