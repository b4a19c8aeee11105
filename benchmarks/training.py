"""Training beside its peers: the same tokens, the same machine, one run after the other in turns.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    git clone https://github.com/karpathy/nanochat ../nanochat
    python -m benchmarks.training speed --peer nanogpt=../nanoGPT --peer nanochat=../nanochat --peer transformers
    python -m benchmarks.training target --peer nanogpt=../nanoGPT --peer nanochat=../nanochat --seeds 3
    python -m benchmarks.training same-seconds --peer nanogpt=../nanoGPT --seeds 3

`speed`: tokens per second of everyone's own loop on a model of one shape, medians over rounds in which each has a turn;
ours once with nanoGPT's model and optimizer, and once as the configuration has it. MFU is against the fastest matrix
product measured on the device, in whatever type.
`target`: seconds of training until the losses at which nanoGPT (CPU settings of its README) and nanochat end.
`same-seconds`: the loss after as many seconds as our recipe takes.

Every model is scored by one function on every token of `val.bin`, with half a window of context or more. Seconds are
those of the updates alone, compiling not counted; memory is the device's. `--peer transformers` (Hugging Face's
Trainer, needs `accelerate`) and `--peer litgpt` need no checkout; `--python` is an interpreter that has what peers
import.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.training_peers import PEERS, Result, Task, score_model
from config.command import Overrides, Recipe, run
from config.errors import UserError
from config.load import load_config
from config.schema import Config
from data.tokens import load_tokens_manifest
from model.checkpoint import load_model
from model.checkpoint_folder import latest_checkpoint
from model.devices import choose_device
from training.plan import sequence_length
from training.throughput import measure_peak_flops

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "config/recipes/demo.yaml"
README: dict[str, Any] = {
    "n_layers": 4,
    "n_heads": 4,
    "d_model": 128,
    "rows": 12,
    "length": 64,
    "learning_rate": 1e-3,
    "steps": 2000,
}
OURS = "Quern"
# A process starts with the peak of the one that started it: a small one in between keeps ours out.
WATCH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""
WARM_UP = 3  # updates, which compile and fill caches
GPT2 = [
    "model.position=learned",
    "model.norm=layernorm",
    "model.activation=gelu",
    "model.bias=false",
    "model.tie_embeddings=true",
    "model.qk_norm=false",
    "model.zero_init_projections=false",
    "model.dropout=0.0",
    "training.optimizer=adamw",
    "training.adamw.learning_rate=1e-3",
    "training.schedule.name=cosine",
    "training.short_sequences.length=null",
]

Peers = Annotated[
    list[str], typer.Option("--peer", help="nanogpt=CHECKOUT, nanochat=CHECKOUT, transformers or litgpt; repeatable.")
]
Python = Annotated[str, typer.Option("--python", help="Interpreter for the peers.")]
Seeds = Annotated[int, typer.Option(help="Runs of every contender, each with a seed of its own.")]
FirstSeed = Annotated[int, typer.Option(help="The first of these seeds; the others count on from it.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Updates to try; may be given several times.")]


@dataclass(frozen=True)
class Contender:
    """A line of the table: its name, and one run of it with a seed."""

    name: str
    run: Callable[[int], Result]
    tokens_per_update: int
    updates: int


def speed(
    peers: Peers,
    config: Recipe = DEMO,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 3,
    steps: Annotated[int, typer.Option(help="Updates in a turn; the first few do not count.")] = 30,
    compile: Annotated[bool, typer.Option(help="Compile nanoGPT, the Trainer and ours; the others always do.")] = True,
    python: Python = sys.executable,
) -> None:
    """Tokens per second of everyone's loop on the shape that the configuration has."""
    words = [*(overrides or []), f"training.max_steps={steps}"]
    words += [f"training.compile={str(compile).lower()}", "training.schedule.warmup_steps=0"]
    settings, same = (load_config([config] if config else [], [*words, *more]) for more in ([], GPT2))
    checkouts = _checkouts(peers)
    contenders = [
        _ours("Quern, nanoGPT's model and AdamW", same, config, [*words, *GPT2], score=False),
        _ours("Quern, as configured", settings, config, words, score=False),
    ]
    for peer, checkout in checkouts.items():
        task = replace(_task(settings, peer, checkout), steps=steps, compile=compile, score=False)
        contenders.append(_peer(peer, task, python))
    _turns("Speed of training", contenders, range(1, rounds + 1), _peak(settings))


def target(
    peers: Peers,
    config: Recipe = DEMO,
    overrides: Overrides = None,
    seeds: Seeds = 3,
    first_seed: FirstSeed = 1,
    steps: Lengths = None,
    tuned: Lengths = None,
    nanochat_steps: Lengths = None,
    tuned_rate: Annotated[float, typer.Option(help="A learning rate that suits nanoGPT better than its own.")] = 3e-3,
    python: Python = sys.executable,
) -> None:
    """Seconds of training until the loss at which each run of a peer ends; every schedule ends with its run.

    --steps, --tuned and --nanochat-steps are updates of ours, of nanoGPT at the better rate, and of nanochat. nanoGPT
    with the CPU settings of its README takes 2,000.
    """
    words = overrides or []
    settings = load_config([config] if config else [], words)
    checkouts = _checkouts(peers, "nanogpt")
    readme = replace(_task(settings, "nanogpt", checkouts["nanogpt"]), **README, compile=False)
    contenders = [_peer("nanoGPT, README CPU settings", readme, python)]
    for number in tuned or [1000, 1250]:
        task = replace(readme, steps=number, learning_rate=tuned_rate)
        contenders.append(_peer(f"nanoGPT, learning rate {tuned_rate:g}", task, python))
    for number in nanochat_steps or ([250, 500] if "nanochat" in checkouts else []):
        task = replace(readme, peer="nanochat", checkout=checkouts["nanochat"], steps=number)
        contenders.append(_peer("nanochat", task, python))
    for number in steps or [settings.training.max_steps or 0]:
        contenders.append(_ours(OURS, settings, config, [*words, f"training.max_steps={number}"], score=True))
    results = _turns("Loss and seconds", contenders, range(first_seed, first_seed + seeds), _peak(settings))
    _print_seconds_to(contenders, results)


def same_seconds(
    peers: Peers,
    config: Recipe = DEMO,
    overrides: Overrides = None,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 1,
    python: Python = sys.executable,
) -> None:
    """The loss of nanoGPT after the seconds that our recipe takes: with its README's settings, and at 3e-3."""
    words = overrides or []
    settings = load_config([config] if config else [], words)
    ours = _ours(OURS, settings, config, words, score=True)
    print("One run of ours and a short one of nanoGPT, to see how many updates fit ...")
    budget = _seconds(ours.run(0))
    readme = replace(_task(settings, "nanogpt", _checkouts(peers, "nanogpt")["nanogpt"]), **README, compile=False)
    trial = _peer("trial", replace(readme, steps=60, score=False), python).run(0)
    updates = int(budget / statistics.median(trial.seconds))
    contenders = [ours]
    for rate in (1e-3, 3e-3):
        task = replace(readme, steps=updates, learning_rate=rate)
        contenders.append(_peer(f"nanoGPT, README CPU settings at {rate:g}", task, python))
    _turns("Loss after the same seconds", contenders, range(first_seed, first_seed + seeds), _peak(settings))


def _checkouts(peers: list[str], needed: str | None = None) -> dict[str, str]:
    """The folder of each peer, empty for those that are packages."""
    checkouts = {}
    for peer in peers:
        name, _, folder = peer.partition("=")
        if name not in PEERS:
            raise UserError(f"--peer {peer}: choose from {', '.join(PEERS)}.")
        if name.startswith("nano") and not (Path(folder) / "README.md").is_file():
            raise UserError(f"--peer {peer}: give the folder of its checkout, such as --peer {name}=../{name}.")
        checkouts[name] = str(Path(folder).resolve()) if folder else ""
    if needed is not None and needed not in checkouts:
        raise UserError(f"This compares with {needed}: give --peer {needed}=../CHECKOUT.")
    return checkouts


def _task(settings: Config, peer: str, checkout: str) -> Task:
    """What a peer is told, in the shape of `settings`."""
    if settings.model.d_head is not None:
        raise UserError("The peers' heads are d_model / n_heads wide. Leave model.d_head out.")
    tokens_dir = Path(settings.data.tokens_dir).resolve()
    return Task(
        peer=peer,
        checkout=checkout,
        tokens_dir=str(tokens_dir),
        tokenizer_dir=str(Path(settings.data.tokenizer_dir).resolve()),
        vocab_size=load_tokens_manifest(tokens_dir).vocab_size,
        n_layers=settings.model.n_layers,
        n_heads=settings.model.n_heads,
        d_model=settings.model.d_model,
        rows=settings.training.batch_size,
        length=sequence_length(settings.model, settings.training),
        steps=settings.training.max_steps or 0,
        learning_rate=1e-3,
        seed=0,
        device=choose_device(settings.training.device).type,
        compile=False,
        score=True,
        folder="",
    )


def _peer(name: str, task: Task, python: str) -> Contender:
    def run_once(seed: int) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            given, result = Path(folder) / "task.json", Path(folder) / "result.json"
            work = Path(folder) / "work"
            work.mkdir()
            given.write_text(json.dumps(asdict(replace(task, seed=seed, folder=str(work)))), encoding="utf-8")
            command = [python, "-m", "benchmarks.training_peers", str(given), str(result)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{name} failed:\n{done.stderr[-3000:]}")
            return Result(**json.loads(result.read_text(encoding="utf-8")))

    return Contender(name, run_once, task.rows * task.length, task.steps)


def _ours(name: str, settings: Config, recipe: Path | None, overrides: list[str], score: bool) -> Contender:
    """A run of `scripts/train.py`; the updates that it logs together count as equally long."""
    length = sequence_length(settings.model, settings.training)

    def run_once(seed: int) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, str(ROOT / "scripts/train.py"), *(["--config", str(recipe)] if recipe else [])]
            words += [*overrides, f"training.seed={seed}", "training.run_name=ours", "training.wandb.mode=off"]
            words += [f"training.checkpoint_dir={folder}/checkpoints", f"training.runs_dir={folder}/runs"]
            words += ["training.log_interval=1", "training.sample_interval=0"]
            peak = Path(folder) / "peak"
            words = [sys.executable, "-c", WATCH, str(peak), *words]
            done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"{name} failed:\n{done.stderr[-3000:]}")
            log = (Path(folder) / "runs/ours/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in log]
            per_update = rows[0]["tokens"]
            seconds = [per_update / row["tokens_per_second"] for row in rows]
            device = choose_device(settings.training.device)
            memory = peak_memory(device, [row["memory_bytes"] for row in rows], 1024 * int(peak.read_text()))
            model, _ = load_model(latest_checkpoint(Path(folder) / "checkpoints"))
            flops = model.flops_per_token(length)
            loss, bits = score_model(model, replace(_task(settings, "", ""), device="cpu")) if score else (None, None)
            return Result(seconds, flops, memory, loss, bits)

    final = load_config([recipe] if recipe else [], overrides).training
    return Contender(name, run_once, final.batch_size * length, final.max_steps or 0)


def peak_memory(device: torch.device, logged: list[int], process: int) -> int:
    """Bytes that the device held at most, as `training_peers` measures it: on a CPU those of the whole `process`."""
    return max(logged) if device.type == "cuda" else process


def _peak(settings: Config) -> float:
    """FLOPs per second of the device's fastest matrix product."""
    device = choose_device(settings.training.device)
    return max(measure_peak_flops(device, dtype) for dtype in (torch.float32, torch.bfloat16))


def _seconds(result: Result) -> float:
    """Of all updates, each of the first few counted as an average one."""
    steady = result.seconds[WARM_UP:]
    return sum(steady) * len(result.seconds) / len(steady)


def _turns(title: str, contenders: list[Contender], seeds: range, peak: float) -> list[list[Result]]:
    """Run every contender once for each seed, in turns; print the table, and return the results by contender."""
    results: list[list[Result]] = [[] for _ in contenders]
    for seed in seeds:
        for contender, found in zip(contenders, results):
            found.append(contender.run(seed))
            loss = "" if found[-1].loss is None else f", loss {found[-1].loss:.4f}"
            line = f"{contender.name}, {contender.updates} updates, seed {seed}: {_seconds(found[-1]):.1f} s{loss}"
            print(line, file=sys.stderr, flush=True)
    table = Table(title=f"{title} ({torch.get_num_threads()} CPU threads)")
    scored = results[0][0].loss is not None
    headings = ["run", "updates", "seconds", "tokens/s", "ratio", "MFU", "peak memory"]
    for heading in headings + (["loss", "spread", "bits/byte"] if scored else []):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    first = _rate(contenders[0], results[0])
    for contender, found in zip(contenders, results):
        rate = _rate(contender, found)
        cells = [
            contender.name,
            str(contender.updates),
            f"{statistics.median(map(_seconds, found)):.1f}",
            f"{rate:,.0f}",
            f"{rate / first:.2f}",
            f"{rate * found[0].flops_per_token / peak:.0%}",
            f"{max(result.peak_memory for result in found) / 2**20:,.0f} MiB",
        ]
        if scored:
            losses = [result.loss or 0.0 for result in found]
            bits = statistics.median(result.bits_per_byte or 0.0 for result in found)
            cells += [f"{statistics.median(losses):.3f}", f"{max(losses) - min(losses):.3f}", f"{bits:.3f}"]
        table.add_row(*cells)
    Console(width=140).print(table)
    return results


def _rate(contender: Contender, found: list[Result]) -> float:
    """Tokens per second: of the median update of the median turn."""
    return contender.tokens_per_update / statistics.median(statistics.median(r.seconds[WARM_UP:]) for r in found)


def _print_seconds_to(contenders: list[Contender], results: list[list[Result]]) -> None:
    """For every run of a peer, our shortest run that reaches its loss, by the medians over seeds."""
    losses = [statistics.median(result.loss or 0 for result in found) for found in results]
    seconds = [statistics.median(map(_seconds, found)) for found in results]
    ours = [n for n, contender in enumerate(contenders) if contender.name == OURS]
    for n, contender in enumerate(contenders):
        if n in ours:
            continue
        reached = [seconds[m] for m in ours if losses[m] <= losses[n]]
        took = (
            f"{min(reached):.1f} s, {min(reached) / seconds[n]:.2f} of that" if reached else "no run of ours gets there"
        )
        print(f"{contender.name}, {contender.updates} updates: {losses[n]:.3f} after {seconds[n]:.1f} s; ours: {took}")


def main() -> None:
    """Run the command line."""
    run({"speed": speed, "target": target, "same-seconds": same_seconds})


if __name__ == "__main__":
    main()
