"""Decoding on a CPU or GPU: tokens a second, and their share of what the memory allows, beside the peers.

    python -m benchmarks.inference
    python -m benchmarks.inference model.variant=gpt2-small --rows 1 --rows 8 --rows 32
    python -m benchmarks.inference --device cuda --tokens 256
    python -m benchmarks.inference --llama ../llama/bin/python --gguf small-f32.gguf --gguf small-q8_0.gguf

All have the same random weights (a GGUF file is its maker's matter; the speed does not depend on the weights) and go on
greedily from a prompt of 32 tokens. In every round each takes its turn at writing `--tokens` of them, and beside it the
memory is read: 1 GiB in large pages, with all threads, straight on or in two or four places at a time or by PyTorch's
sum, whichever is fastest in the median. The share is that of the bytes of the weights that a token needs, times tokens
a second of one row, in the bytes that were read a second in the same round. Peers: Hugging Face's `generate` on the
exported model; the model's own forward pass on the same cache, which is what runs where there are no kernels; and
llama.cpp, through a Python that has llama-cpp-python.

On a GPU ours runs in compiled steps too, and its memory is read by PyTorch's sum and by its product of a matrix and a
vector.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from config.command import Overrides, Recipe, run
from config.load import load_config, with_vocab_size

if TYPE_CHECKING:
    from torch import Tensor

    from model.transformer import Transformer

PROMPT = list(range(100, 132))
LLAMA = """
import sys, time
from llama_cpp import Llama
file, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llama = Llama(file, n_ctx=context, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False)
for line in sys.stdin:
    llama.reset()
    llama.eval(list(range(100, 132)))
    begin = time.perf_counter()
    for _ in range(int(line)):
        llama.eval([llama.sample(temp=0.0)])
    print(time.perf_counter() - begin, flush=True)
"""

Write = Callable[[int], float]  # writes so many tokens in every row; seconds that took


def compare(
    config: Recipe = None,
    overrides: Overrides = None,
    rows: Annotated[list[int] | None, typer.Option(help="Texts at once; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a turn.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    llama: Annotated[str | None, typer.Option(help="A Python with llama-cpp-python.")] = None,
    gguf: Annotated[list[Path] | None, typer.Option(help="A file for it; may be repeated.")] = None,
) -> None:
    """Time decoding."""
    from model.waiting import watch_cores

    watch_cores()
    import torch

    from inference.memory import settle_
    from inference.quantization import quantize_
    from model.transformer import Transformer

    settings = load_config([config] if config else [], overrides or ["model.variant=gpt2-small"])
    model = Transformer(with_vocab_size(settings, settings.model.vocab_size or 32768).model).eval().to(device)
    variants: dict[str, Transformer] = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16()}
    compiling = (False,) if device == "cpu" else (False, True)
    for kind in ("int8", "int4") if device == "cpu" else ():
        variants[kind] = copy.deepcopy(model)
        quantize_(variants[kind], kind)
    for variant in variants.values():
        settle_(variant)
    memory = Memory() if device == "cpu" else DeviceMemory(device)
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    for count in rows or [1]:
        contenders: dict[str, tuple[Write, int]] = {
            f"Quern, {name}{', compiled' * compiled}": (ours(variant, count, compiled), weight_bytes(variant))
            for name, variant in variants.items()
            for compiled in compiling
        }
        contenders["the model itself, fp32"] = forward(model, count), weight_bytes(model)
        for name in ("fp32", "bf16"):
            contenders[f"Hugging Face, {name}"] = hugging_face(variants[name], count), weight_bytes(variants[name])
        if llama is not None and count == 1:
            for file in gguf or []:
                contenders[f"llama.cpp, {file.stem}"] = (
                    llama_cpp(llama, file, model.config.context_length),
                    file.stat().st_size,
                )
        _report(contenders, count, tokens, rounds, memory, where)


def _report(
    contenders: dict[str, tuple[Write, int]],
    rows: int,
    tokens: int,
    rounds: int,
    memory: Memory | DeviceMemory,
    where: str,
) -> None:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    reads: dict[str, list[list[float]]] = {name: [] for name in contenders}
    memory.rates()
    for write, _ in contenders.values():
        write(2)
    for _ in range(rounds):
        for name, (write, _) in contenders.items():
            reads[name].append(memory.rates())
            rates[name].append(rows * tokens / write(tokens))
    ways = [statistics.median(way) for way in zip(*(read for part in reads.values() for read in part))]
    best = ways.index(max(ways))
    title = f"{rows} rows, {where}, {ways[best] / 1e9:.1f} GB/s read"
    table = Table("", "tokens/s", "lowest", "highest", "MB per token", "share of the memory", title=title)
    for name, values in rates.items():
        size = contenders[name][1]
        shares = [rate * size / read[best] for rate, read in zip(values, reads[name])]
        share = f"{100 * statistics.median(shares):.0f} %" if rows == 1 else ""
        numbers = [f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))]
        table.add_row(name, *numbers, f"{size / 1e6:.0f}", share)
    Console(width=110).print(table)


class Memory:
    """1 GiB in large pages, and threads that read it."""

    def __init__(self) -> None:
        import torch

        from inference.memory import settle_

        holder = torch.nn.Module()
        holder.register_buffer("numbers", torch.ones(2**28))
        settle_(holder)
        self._numbers = cast(Any, holder).numbers
        self._sums = np.zeros(torch.get_num_threads(), np.float32)

    def rates(self) -> list[float]:
        """Bytes a second that all threads together read, in several ways."""
        from benchmarks.reading import read
        from inference.crew import Crew

        crew = Crew(len(self._sums))  # which PyTorch's threads sleep for, so it goes before others have their turn
        seconds = []
        for apart in (1, 2, 4):
            begin = time.perf_counter()
            crew.run(read, self._numbers.data_ptr(), len(self._numbers), apart, self._sums)
            seconds.append(time.perf_counter() - begin)
            assert self._sums.sum() == len(self._numbers), "not every number was read once"
        begin = time.perf_counter()
        self._numbers.sum()
        return [self._numbers.nbytes / taken for taken in (*seconds, time.perf_counter() - begin)]


class DeviceMemory:
    """4 GiB on a GPU, or another device that PyTorch knows."""

    def __init__(self, device: str) -> None:
        import torch

        self._numbers = torch.ones(2**15, 2**16, dtype=torch.bfloat16, device=device)
        self._vector = torch.ones(2**16, dtype=torch.bfloat16, device=device)

    def rates(self) -> list[float]:
        """Bytes a second that are read, in several ways."""
        from training.throughput import wait_for

        ways: list[Callable[[], Tensor]] = [lambda: self._numbers.sum(), lambda: self._numbers @ self._vector]
        seconds = []
        for way in ways:
            way()
            wait_for(self._numbers.device)
            begin = time.perf_counter()
            way()
            wait_for(self._numbers.device)
            seconds.append(time.perf_counter() - begin)
        return [self._numbers.nbytes / taken for taken in seconds]


def weight_bytes(model: Transformer) -> int:
    """What of the weights a token needs: all but the rows of embeddings that it does not look up."""
    tensors = [*model.blocks.parameters(), *model.blocks.buffers()]
    tensors += (
        [model.token_embedding.weight] if model.head is None else [*model.head.parameters(), *model.head.buffers()]
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ours(model: Transformer, rows: int, compiled: bool = False) -> Write:
    """The engine, as every command uses it."""
    from inference.engine import Engine, Request
    from inference.sampling import SamplingSettings

    greedy = SamplingSettings(temperature=0.0)
    tokenizer: Any = _NoText(cast(int, model.config.vocab_size))

    kept = Engine(model, tokenizer, rows, compiled=True) if compiled else None  # to compile takes minutes

    def write(tokens: int) -> float:
        engine = kept or Engine(model, tokenizer, rows)
        for row in range(rows):
            engine.submit(Request([*PROMPT[:-1], 200 + row], tokens + 1, greedy))
        while len(engine.step()) < rows:
            pass
        begin = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        assert not engine.busy, "a text went on"
        return time.perf_counter() - begin

    return write


class _NoText:
    """What the engine needs of a tokenizer, without texts, which cost next to nothing; no token ends one."""

    ending_ids = ()
    special_tokens: dict[str, int] = {}
    drops_first_space = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode_bytes(self, ids: Any, skip_special_tokens: bool = False) -> bytes:
        """No text."""
        return b""


def forward(model: Transformer, rows: int) -> Write:
    """The model's own forward pass, on the engine's cache."""
    import torch

    from inference.runners import Chunk, ModelRunner
    from model.cache import KVCache

    @torch.inference_mode()
    def write(tokens: int) -> float:
        weight = model.token_embedding.weight
        runner = ModelRunner(model, KVCache(model.config, rows, device=weight.device, dtype=weight.dtype))
        logits = runner.run([Chunk(row, 0, PROMPT) for row in range(rows)])
        begin = time.perf_counter()
        for step in range(tokens):
            last = logits.argmax(dim=-1).tolist()
            logits = runner.run([Chunk(row, len(PROMPT) + step, [last[row]]) for row in range(rows)])
        return time.perf_counter() - begin

    return write


def hugging_face(model: Transformer, rows: int) -> Write:
    """`generate` with its own defaults; the time of a prompt and one token is taken off."""
    import torch
    import transformers

    from model.huggingface.exporting import to_huggingface
    from training.throughput import wait_for

    cast(Any, transformers).logging.set_verbosity_error()
    device = model.token_embedding.weight.device
    theirs = to_huggingface(model).eval().to(device)
    prompt = torch.tensor([PROMPT] * rows, device=device)

    def timed(tokens: int) -> float:
        begin = time.perf_counter()
        how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, **how)
        wait_for(device)
        return time.perf_counter() - begin

    return lambda tokens: timed(tokens + 1) - timed(1)


def llama_cpp(python: str, file: Path, context: int) -> Write:
    """llama.cpp in a process of its own, with as many threads."""
    import torch

    command = [python, "-c", LLAMA, str(file), str(torch.get_num_threads()), str(context)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def write(tokens: int) -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{tokens}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return write


def main() -> None:
    """Run the comparison as a command."""
    run(compare)


if __name__ == "__main__":
    main()
