"""Serving: tokens a second and time to the first one under 1, 8 and 32 clients, beside `transformers serve`; a soak.

    python -m benchmarks.serving
    python -m benchmarks.serving model.variant=modern-350m --seconds 60 --soak 120

Both servers have the same random weights, exported for the peer, and the same tokenizer and chat template. Every client
asks for `--tokens` tokens of an answer at temperature 0 as a stream, again and again until its time is over; what has
been asked is waited for. Servers take turns at each number of clients, the peer as it starts by default and with its
continuous batching. Under the soak 32 clients ask ours; memory is the resident set of the server after a tenth of the
time and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from config.command import Overrides, Recipe, run, table_console
from config.load import load_config, with_vocab_size

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.variant=demo",
    "model.activation=swiglu",
    "model.qk_norm=false",
    "data.tokenizer.vocab_size=2048",
    "data.tokenizer.encoder=tokenizers",
]


@dataclass
class Load:
    """What clients saw: seconds to each first token, tokens, errors."""

    first: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: int = 0
    seconds: float = 0.0


def compare(
    config: Recipe = None,
    overrides: Overrides = None,
    clients: Annotated[list[int] | None, typer.Option(help="Clients at once; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    seconds: Annotated[float, typer.Option(help="How long each number of clients asks.")] = 20.0,
    soak: Annotated[float, typer.Option(help="Seconds of the soak; 0 leaves it out.")] = 120.0,
    peer: Annotated[bool, typer.Option(help="Ask the peer too.")] = True,
) -> None:
    """Compare the server with its peer on the same weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, [config] if config else [], [*SMALL, *(overrides or [])])
        starts = {"Quern": _ours}
        if peer:
            starts |= {"transformers serve": _theirs, "the same, --continuous-batching": _batching}
        table = Table("clients", "server", "tokens/s", "first token, ms", "95 %", "errors")
        for count in clients or [1, 8, 32]:
            for title, start in starts.items():
                with start(folder) as (address, _, model):
                    asyncio.run(_ask(address, model, 1, 0.0, tokens))  # the first request of a server is slow
                    load = asyncio.run(_ask(address, model, count, seconds, tokens))
                table.add_row(str(count), title, *_figures(load), str(load.errors))
        table_console().print(table)
        if soak:
            _soak(folder, soak, tokens)


def _figures(load: Load) -> list[str]:
    if not load.first:
        return ["-", "-", "-"]
    ranked = sorted(load.first)
    late = ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))]
    speed = f"{load.tokens / load.seconds:,.1f}"
    return [speed, f"{1000 * statistics.median(ranked):,.0f}", f"{1000 * late:,.0f}"]


def _soak(folder: Path, seconds: float, tokens: int) -> None:
    import psutil

    async def watched(address: str, model: str, process: psutil.Process) -> tuple[Load, int]:
        asking = asyncio.create_task(_ask(address, model, 32, seconds, tokens))
        await asyncio.sleep(seconds / 10)
        early = process.memory_info().rss
        return await asking, early

    with _ours(folder) as (address, pid, model):
        process = psutil.Process(pid)
        load, early = asyncio.run(watched(address, model, process))
        late = process.memory_info().rss
    print(
        f"Soak: 32 clients for {load.seconds:.0f} s: {len(load.first):,} answers, {load.errors} errors, memory "
        f"{early / 2**20:,.1f} MiB after a tenth of it, {late / 2**20:,.1f} MiB at the end."
    )


async def _ask(address: str, model: str, clients: int, seconds: float, tokens: int) -> Load:
    """Let `clients` ask until `seconds` are over, each once at least."""
    load, begin = Load(), time.perf_counter()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What does a parser of arguments do?"}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def client(http: httpx.AsyncClient) -> None:
        while True:
            try:
                await _one(http, f"{address}/v1/chat/completions", body, load)
            except (httpx.HTTPError, ValueError, KeyError):
                load.errors += 1
            if time.perf_counter() - begin >= seconds:
                return

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as http:
        await asyncio.gather(*[client(http) for _ in range(clients)])
    load.seconds = time.perf_counter() - begin
    return load


async def _one(http: httpx.AsyncClient, url: str, body: dict[str, Any], load: Load) -> None:
    """One answer; raises where it is none."""
    begin, first, usage = time.perf_counter(), None, None
    async with http.stream("POST", url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - begin
            usage = chunk.get("usage") or usage
    if first is None or usage is None:
        raise ValueError("an answer without text or usage")
    load.first.append(first)
    load.tokens += usage["completion_tokens"]


def _prepare(folder: Path, recipes: list[Path], overrides: list[str]) -> None:
    """Tokenizer and random weights, as a checkpoint and as a folder of Hugging Face's."""
    import torch

    from data.tokenization import train_tokenizer
    from model.checkpoint import save_checkpoint
    from model.checkpoint_folder import checkpoint_path
    from model.huggingface.exporting import to_huggingface
    from model.transformer import Transformer

    config = load_config(recipes, overrides)
    tokenizer = train_tokenizer(iter([inspect.getsource(argparse)]), config.data.tokenizer)
    config = with_vocab_size(config, tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config.model).eval()
    for parameter in model.parameters():  # projections that begin at zero would write one token for ever
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    state = {"model": model.state_dict(), "config": config.model_dump(), "step": 1, "run_name": "random"}
    fingerprint = {"tokenizer_fingerprint": tokenizer.fingerprint, "validation_loss": None}
    save_checkpoint(checkpoint_path(folder / "checkpoints", 1), {**state, **fingerprint})
    tokenizer.save(folder / "corpus/tokenizer")
    to_huggingface(model).save_pretrained(folder / "exported")
    tokenizer.save(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        (folder / "exported" / file.name).write_bytes(file.read_bytes())


Running = Iterator[tuple[str, int, str]]  # address, process, name of the model


@contextmanager
def _ours(folder: Path) -> Running:
    words = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", "0", "--chat", "--max-concurrent", "32"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline() + process.stdout.readline()
        yield re.findall(r"open (http://\S+),", said)[0], process.pid, "random/1"
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def _theirs(folder: Path, *options: str) -> Running:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program, name = str(Path(sys.executable).parent / "transformers"), str(folder / "exported")
    words = [program, "serve", name, "--device", "cpu", "--dtype", "float32", "--port", str(port), *options]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address, deadline = f"http://localhost:{port}", time.monotonic() + 300
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("transformers serve does not start")
            time.sleep(0.5)
        yield address, process.pid, name
    finally:
        process.kill()
        process.wait()


def _batching(folder: Path) -> Any:
    return _theirs(folder, "--continuous-batching")


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def main() -> None:
    """Run the benchmark."""
    run(compare)


if __name__ == "__main__":
    main()
