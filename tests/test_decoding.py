"""The kernels that decode on a CPU: the model's own logits, whatever the weights are stored in and the batch is."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from config.load import load_config, with_vocab_size
from data.compiled import kernel
from inference.compiled import CompiledRunner
from inference.cpu import CPUModel
from inference.crew import Crew, called_again, meet
from inference.engine import Engine, Request
from inference.loading import load_for_generation
from inference.memory import settle_
from inference.multiplication import Operands, multiply, prepare
from inference.quantization import Quantize, quantize_
from inference.runners import BLOCK, Chunk, CPURunner, ModelRunner, make_runner
from inference.sampling import SamplingSettings
from model.cache import KVCache
from model.quantized import Kind, QuantizedLinear
from model.transformer import Transformer
from scripts.generate import generate
from tests.small_runs import ROOT
from tests.test_engine import KINDS as ENGINE_KINDS
from tests.workspace import LIVELY, SMALL, make_workspace

KINDS = {
    **ENGINE_KINDS,
    "odd widths": ["model.activation=swiglu", "model.d_ff=75", "model.d_model=40", "model.bias=true"],
}
VOCABULARY = 301
TOKENS = torch.randint(0, VOCABULARY, (32,), generator=torch.Generator().manual_seed(0))


def make_model(kind: str, quantize: Quantize = "none", dtype: torch.dtype = torch.float32) -> Transformer:
    """Random weights, and biases and scalars that are not what they begin with."""
    config = with_vocab_size(load_config([], [*SMALL, *LIVELY, *KINDS[kind]]), VOCABULARY)
    model = Transformer(config.model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    quantize_(model.to(dtype), quantize)
    return model


def run_all(model: Transformer, tokens: Tensor, *cuts: int) -> Tensor:
    """The logits after every token, which come to the kernels in pieces that end at `cuts` and at the end."""
    cache = KVCache(model.config, 3, dtype=model.token_embedding.weight.dtype)
    kernels, found, start = CPUModel(model, cache), [], 0
    for end in (*cuts, len(tokens)):
        count = end - start
        piece = kernels.run(tokens[start:end].tolist(), [1] * count, range(start, end), range(count))
        found.append(piece.clone())
        start = end
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@torch.inference_mode()
def test_the_logits_are_those_of_the_model(kind: str, quantize: Quantize) -> None:
    model = make_model(kind, quantize)
    assert isinstance(make_runner(model, KVCache(model.config, 1)), CPURunner)
    torch.testing.assert_close(run_all(model, TOKENS, 3, 4, 12), model(TOKENS[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_bfloat16_weights_are_read_as_they_are(kind: str) -> None:
    """The same weights in float32 give the same, but for the keys and values that the cache rounds."""
    model = make_model(kind, dtype=torch.bfloat16)
    expected = copy.deepcopy(model).float()(TOKENS[None])[0]
    found = run_all(model, TOKENS, 5, 6)
    assert (found - expected).abs().mean() < 0.02 * expected.std()
    assert (found - expected).abs().mean() < (model(TOKENS[None])[0] - expected).abs().mean()


def test_eight_bits_are_multiplied_as_precisely_as_float32_rounds() -> None:
    """Also where one element of a vector is a hundred times the others; one digit less would err 256 times as much."""
    random, width = np.random.default_rng(0), 768
    matrix = random.integers(-127, 128, (9, width), np.int8)
    x = random.standard_normal((3, width), np.float32)
    x[1:, 5] = 100, -100
    operands = Operands(x, np.zeros((1, 3, 3 * width), np.int8), np.zeros((1, 3, 2)))
    scales, found, kind = np.ones(9, np.float32), np.zeros((3, 9), np.float32), np.empty(0, np.int8)
    prepare(0, kind, operands, 3)
    addresses = np.array([matrix.ctypes.data, scales.ctypes.data, 0])
    queues = np.zeros((1, 1), np.int64)
    multiply(0, 1, queues, kind, addresses, np.empty(0, np.float32), operands, 3, found, 0, 9, False)
    error = np.abs(found - x.astype(np.float64) @ matrix.T.astype(np.float64)).max(axis=1)
    # Rounding `width` elements by up to half a unit each, times weights of that spread, gives 600 units or so.
    assert (error < 4000 * np.abs(x).max(axis=1) / 2**23).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_thread_does_what_the_others_do_not_come_to_and_nothing_twice(tokens: int) -> None:
    random, threads, rows = np.random.default_rng(0), 3, 50
    matrix, x = random.standard_normal((rows, 64), np.float32), random.standard_normal((tokens, 64), np.float32)
    digits, bias, kind = np.zeros((0, 0, 0), np.int8), np.zeros(0, np.float32), np.empty(0, np.float32)
    operands, queues = Operands(x, digits, np.zeros((0, 0, 0))), np.zeros((threads, 8), np.int64)
    addresses, found = np.array([matrix.ctypes.data, 0, 0]), np.zeros((tokens, rows), np.float32)
    for thread in (1, 0, 2):
        multiply(thread, threads, queues, kind, addresses, bias, operands, tokens, found, 0, rows, True)
        np.testing.assert_allclose(found, x @ matrix.T, atol=1e-4)


@kernel
def count_calls(thread: int, threads: int, counter: int, calls: Any) -> None:
    while True:
        calls[thread] += 1
        if not called_again(thread, threads, counter):
            return


@kernel
def count_once(thread: int, threads: int, counter: int, calls: Any) -> None:
    meet(thread, threads, counter)
    calls[thread] += 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_of_a_crew_does_every_call_once(threads: int) -> None:
    """Soon after one another or not, with the same arguments or others, with work that waits for more and that ends."""
    crew = Crew(threads)
    calls, expected = np.zeros((2, threads), np.int64), [0, 0]
    arrays = [*calls]
    for turn in range(300):
        which = turn // 5 % 2
        expected[which] += 1
        crew.run(count_once if turn % 50 == 20 else count_calls, arrays[which])
        assert calls.tolist() == [[count] * threads for count in expected]
        if turn % 60 == 0:
            time.sleep(0.05)


def test_a_crew_that_is_forgotten_leaves_the_next_one_alone() -> None:
    """Its threads still wait for a call, in memory that must not be another's yet."""
    for turn in range(100):
        crew, calls = Crew(2), np.zeros(2, np.int64)
        for call in range(1 + turn % 3):
            crew.run(count_calls, calls)
            assert calls.tolist() == [call + 1] * 2


@torch.inference_mode()
def test_what_is_no_number_stays_none() -> None:
    model = make_model("rope, grouped queries", "int8")
    final_norm: Any = model.final_norm
    for bad in (torch.nan, torch.inf):
        final_norm.weight[3] = bad
        assert not run_all(model, TOKENS[:5], 4).isfinite().any()


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages to be had")
@pytest.mark.parametrize("quantize", ["none", "int8"])
@torch.inference_mode()
def test_weights_that_are_settled_lie_together_and_are_the_same(quantize: Quantize) -> None:
    wide = [*SMALL, *LIVELY, "model.d_model=512", "model.n_layers=2", "model.tie_embeddings=true"]
    model = Transformer(with_vocab_size(load_config([], wide), VOCABULARY).model).eval()
    quantize_(model, quantize)
    expected, tensors = model(TOKENS[None]), [*model.parameters(), *model.buffers()]
    settle_(model)
    assert torch.equal(model(TOKENS[None]), expected) and torch.equal(copy.deepcopy(model)(TOKENS[None]), expected)
    begin = min(tensor.data_ptr() for tensor in tensors)
    assert begin % 2**21 == 0
    assert max(tensor.data_ptr() + tensor.nbytes for tensor in tensors) - begin < sum(t.nbytes + 64 for t in tensors)
    areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
    starts = [int(area.splitlines()[1 if place else 0].split("-")[0], 16) for place, area in enumerate(areas[:-1])]
    flags = {start: area.split("\n", 1)[0].split() for start, area in zip(starts, areas[1:])}
    assert "hg" in flags[max(start for start in starts if start <= begin)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
@torch.inference_mode()
def test_no_bit_depends_on_the_batch_the_cuts_or_the_threads(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([MODELS["rope, grouped queries"], MODELS["windows and skips"]]))
    alone = run_all(model, TOKENS)
    cuts = sorted(data.draw(st.sets(st.integers(1, 31), max_size=6)))
    assert torch.equal(run_all(model, TOKENS, *cuts), alone)

    lengths = data.draw(st.lists(st.integers(1, 31), min_size=1, max_size=9))
    cache, before = KVCache(model.config, len(lengths)), torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    try:
        runner = CPURunner(model, cache)
    finally:
        torch.set_num_threads(before)
    first = [Chunk(row, 0, TOKENS[:length].tolist()) for row, length in enumerate(lengths)]
    assert torch.equal(runner.run(first), alone[[length - 1 for length in lengths]])
    then = [Chunk(row, length, TOKENS[length : length + 1].tolist()) for row, length in enumerate(lengths)]
    assert torch.equal(runner.run(then), alone[lengths])


MODELS = {kind: make_model(kind) for kind in KINDS}


@torch.inference_mode()
def test_a_long_text_goes_through_the_model_in_blocks_that_change_little() -> None:
    wide = [*SMALL, *LIVELY, "model.context_length=600", "model.window=40", "model.window_pattern=SL"]
    model = Transformer(with_vocab_size(load_config([], wide), VOCABULARY).model).eval()
    tokens = torch.randint(0, VOCABULARY, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = KVCache(model.config, 2)
    runner = CPURunner(model, cache)
    for start in (0, BLOCK):
        runner.run([Chunk(1, start, tokens[start : start + BLOCK]), Chunk(0, start, tokens[start : start + 1])])
    found = runner.run([Chunk(1, 2 * BLOCK, tokens[2 * BLOCK :])])
    torch.testing.assert_close(found, model(torch.tensor([tokens]))[:, -1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_window_reads_nothing_beyond_it() -> None:
    config = with_vocab_size(
        load_config([], [*SMALL, *LIVELY, "model.n_layers=2", "model.window=5", "model.window_pattern=S"]), VOCABULARY
    )
    model = Transformer(config.model).eval()
    cache = KVCache(model.config, 1)
    runner = CPURunner(model, cache)
    runner.run([Chunk(0, 0, TOKENS[:20].tolist())])
    expected = runner.run([Chunk(0, 20, TOKENS[20:21].tolist())]).clone()
    cache.keys[0, :, :, :16], cache.values[0, :, :, :16] = torch.nan, torch.nan
    assert torch.equal(runner.run([Chunk(0, 20, TOKENS[20:21].tolist())]), expected)


@torch.inference_mode()
def test_what_the_kernels_do_not_know_is_run_by_the_model() -> None:
    model = make_model("rope, grouped queries")
    expected = model(TOKENS[None])[0]
    attention: Any = model.get_submodule("blocks.0.attention")
    attention.query = nn.Sequential(attention.query)
    cache = KVCache(model.config, 3)
    runner = make_runner(model, cache)
    assert isinstance(runner, ModelRunner)
    found = runner.run([Chunk(0, 0, TOKENS[:7].tolist()), Chunk(1, 0, TOKENS[:3].tolist())])
    torch.testing.assert_close(found, expected[[6, 2]])
    found = runner.run([Chunk(1, 3, TOKENS[3:6].tolist()), Chunk(0, 7, TOKENS[7:8].tolist())])
    torch.testing.assert_close(found, expected[[5, 7]])


@pytest.mark.parametrize(("kind", "largest"), [("int8", 127), ("int4", -8)])
def test_weights_on_the_grid_come_back_as_they_were(kind: Kind, largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-7, 8, (70, 64), generator=generator).float()
    grid[:, ::32] = largest
    layer = QuantizedLinear(grid * 0.25, None, kind)
    assert torch.equal(layer.whole(), grid * 0.25)
    assert kind != "int8" or layer.numbers.abs().max() == 127


def test_four_bits_err_less_than_the_largest_weight_would_have_them() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    groups = weight.view(64, -1, 32)
    scales = groups.abs().amax(dim=2, keepdim=True) / 7
    plain = ((groups / scales).round() * scales).view_as(weight)
    found = QuantizedLinear(weight, None, "int4").whole()
    assert (found - weight).square().mean() < 0.85 * (plain - weight).square().mean()
    assert (QuantizedLinear(weight, None, "int8").whole() - weight).square().mean() < 1e-4


def test_a_checkpoint_is_loaded_in_the_type_and_bits_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    plain = load_for_generation("latest", load_config([], []))
    assert plain.model.token_embedding.weight.dtype == torch.float32 and not plain.chat and plain.info.step == 7
    half = load_for_generation("latest", load_config([], ["generation.precision=bf16"]))
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    quantize_(workspace.model, "int8")
    settings = SamplingSettings(temperature=0.0)
    engine = Engine(workspace.model, workspace.tokenizer)
    text = "".join(piece.text for piece in engine.generate([Request(workspace.tokenizer.encode("The"), 20, settings)]))
    generate(prompt="The", quantize="int8", temperature=0.0, max_new_tokens=20)
    assert capsys.readouterr().out == f"The{text}\n"


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_steps_give_the_same_and_compile_once() -> None:
    """Texts that join, leave a gap, fill more than a block, reach the end of the cache, and borrow a beginning."""
    wide = [*SMALL, *LIVELY, "model.context_length=600", "model.n_kv_heads=1", "model.window=40"]
    model = Transformer(with_vocab_size(load_config([], [*wide, "model.window_pattern=SL"]), VOCABULARY).model).eval()
    tokens = torch.randint(0, VOCABULARY, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    caches = [KVCache(model.config, 3) for _ in range(2)]
    runner, plain = CompiledRunner(model, caches[0], backend="aot_eager"), CPURunner(model, caches[1])
    for chunks in (
        [Chunk(2, 0, tokens[:5])],
        [Chunk(2, 5, tokens[5:6]), Chunk(0, 0, tokens[:BLOCK])],
        [Chunk(0, BLOCK, tokens[BLOCK : BLOCK + 7]), Chunk(2, 6, tokens[6:7])],
        [Chunk(2, 7, tokens[7:8]), Chunk(0, BLOCK + 7, tokens[BLOCK + 7 : 2 * BLOCK])],
        [Chunk(0, 2 * BLOCK, tokens[2 * BLOCK : 599])],
        [Chunk(2, 8, tokens[8:9]), Chunk(0, 599, tokens[599:])],
        [Chunk(2, 9, tokens[9:10])],
    ):
        torch.testing.assert_close(runner.run(chunks), plain.run(chunks), rtol=1e-4, atol=1e-4)
    for cache in caches:
        cache.copy_row(2, 1, 8)
    borrowed = [Chunk(2, 10, tokens[10:11]), Chunk(1, 8, tokens[20:27])]
    torch.testing.assert_close(runner.run(borrowed), plain.run(borrowed), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


def test_machine_code_is_there_when_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, where nothing else has brought it in."""
    monkeypatch.chdir(tmp_path)
    make_workspace(tmp_path)
    program = """
from config.load import load_config
from inference.decoding import step
from inference.loading import load_for_generation
assert not step.signatures
load_for_generation("latest", load_config([], []))
assert len(step.signatures) == 1
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=900)
