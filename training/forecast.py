"""`python scripts/plan.py training`: what `training.estimate` counts, for a number of GPUs, as tables for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from config.command import table_console
from config.errors import UserError
from config.load import CONFIG_DIR, load_config
from config.schema import Config
from training.console import count, duration
from training.estimate import GIB, GPUS, MACHINE, USABLE, Gpu, Sizes
from training.plan import make_plan

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
WORDS = ("model", "gpus", "gpu", "tokens", "mfu")


@dataclass(frozen=True, slots=True)
class Question:
    """A configuration on `gpus` GPUs of one kind, with `tokens` to see, at the model FLOPs utilisation `mfu`."""

    config: Config
    gpus: int
    gpu: str
    tokens: int | None
    mfu: float

    @property
    def kind(self) -> Gpu:
        """The GPU's data sheet."""
        return GPUS[self.gpu]


def read_question(words: Sequence[str], recipes: Sequence[Path] = ()) -> Question:
    """Take `model=modern-1b gpus=64 tokens=20B gpu=h100 mfu=0.4`, and settings such as training.batch_size=512.

    Without recipes, the one that is called as the model, if there is one, says how that is trained. Raises `UserError`
    for a word that is neither, for a value that is no number or unknown, and for tensor parallelism.
    """
    given = {"gpus": "1", "gpu": "h100", "mfu": "0.4"}
    overrides = []
    for word in words:
        name, _, value = word.partition("=")
        if name in WORDS:
            given[name] = value
        elif "." in name:
            overrides.append(word)
        else:
            words_there = ", ".join(f"{each}=..." for each in WORDS)
            raise UserError(f"{word}: say {words_there}, or a setting as SECTION.KEY=VALUE.")
    if "model" in given:
        overrides.insert(0, f"model.variant={given['model']}")
        of_that_name = CONFIG_DIR / "recipes" / f"{given['model']}.yaml"
        recipes = recipes or ([of_that_name] if of_that_name.is_file() else [])
    if given["gpu"].lower() not in GPUS:
        near = get_close_matches(given["gpu"].lower(), GPUS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"gpu={given['gpu']} is not known here; choose from {', '.join(GPUS)}.{meant}")
    config = load_config(recipes, overrides)
    if config.training.tensor_parallel > 1:
        raise UserError(
            f"training.tensor_parallel={config.training.tensor_parallel} is not counted here: leave it out, or set it "
            "to 1, and see what fsdp takes."
        )
    return Question(
        config=config,
        gpus=int(amount("gpus", given["gpus"])),
        gpu=given["gpu"].lower(),
        tokens=int(amount("tokens", given["tokens"])) if "tokens" in given else None,
        mfu=amount("mfu", given["mfu"], most=1.0),
    )


def amount(name: str, text: str, most: float = float("inf")) -> float:
    """The positive number `text` that is given for `name`; it may end in k, M, B or T. `UserError` if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmbgt]?)", text.lower())
    value = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < value <= most or (name == "gpus" and value % 1):
        raise UserError(
            f"{name}={text}: give a number above 0{'' if most > 1 else ' and at most 1'}, such as tokens=20B."
        )
    return value


def run_rows(question: Question, sizes: Sizes) -> list[tuple[str, str]]:
    """What the whole run comes to, line by line."""
    training = question.config.training
    tokens = question.tokens or (training.max_steps or 0) * training.batch_size * sizes.length
    if not tokens:
        raise UserError("How long the run is depends on the data where training.epochs is set: say tokens=20B.")
    per_step = training.batch_size * sizes.length
    flops = sizes.flops_per_token * tokens
    speed = question.gpus * question.kind.flops * question.mfu
    return [
        ("parameters", f"{sizes.parameters:,}"),
        ("FLOPs per token, forward and backward", f"{sizes.flops_per_token:.3g}"),
        ("compute-optimal tokens, 20 per parameter", count(sizes.optimal_tokens)),
        ("tokens of this run", f"{count(tokens)} ({tokens / sizes.optimal_tokens:.2g} times that)"),
        ("tokens of a step", f"{per_step:,}"),
        ("steps", f"{-(-tokens // per_step):,}"),
        ("FLOPs in all", f"{flops:.3g}"),
        (f"seconds per step at MFU {question.mfu:.0%}", f"{sizes.flops_per_token * per_step / speed:.3g}"),
        ("tokens per second", count(speed / sizes.flops_per_token)),
        ("time", f"{duration(flops / speed)} ({flops / speed / 86400:.2f} days)"),
        ("GPU-hours", f"{question.gpus * flops / speed / 3600:,.0f}"),
        ("checkpoint", _gib(sizes.checkpoint_bytes)),
    ]


def parallelisms(question: Question) -> dict[str, int]:
    """Among how many GPUs each kind of parallelism divides the model's state; hsdp where there are several groups."""
    group = question.config.training.shard_group or MACHINE
    return {"ddp": 1, "fsdp": question.gpus} | ({"hsdp": group} if question.gpus > group else {})


def memory_rows(question: Question, sizes: Sizes) -> list[tuple[str, ...]]:
    """The memory of one GPU by part, whether it fits, and the largest micro-batch that does, by parallelism."""
    plan = make_plan(question.config, 1, question.gpus)
    limit = USABLE * question.kind.memory
    kinds = parallelisms(question).values()
    largest = [sizes.largest_micro_batch(plan.rows, shards, question.gpus, limit) for shards in kinds]
    automatic = question.config.training.micro_batch_size == "auto"
    used = [(most or 1) if automatic else plan.micro_rows_of(plan.rows) for most in largest]
    memories = [sizes.memory(rows, shards, question.gpus) for rows, shards in zip(used, kinds)]
    return [
        ("sequences of a forward pass", *map(str, used)),
        *((part, *(_gib(memory.parts[part]) for memory in memories)) for part in memories[0].parts),
        ("in all", *(_gib(memory.total) for memory in memories)),
        ("fits", *("yes" if memory.total <= limit else "no" for memory in memories)),
        ("most sequences that fit", *(str(most or "none") for most in largest)),
    ]


def print_forecast(question: Question) -> None:
    """Print both tables."""
    from rich.table import Table

    sizes = Sizes(question.config)
    console = table_console()
    model, training = question.config.model, question.config.training
    table = Table("run", "")
    table.columns[1].justify = "right"
    for row in run_rows(question, sizes):
        table.add_row(*row)
    console.print(
        f"{model.variant} on {question.gpus} {question.gpu}, in {sizes.length}-token sequences", highlight=False
    )
    console.print(table)
    table = Table("memory of a GPU")
    for name in parallelisms(question):
        table.add_column(name, justify="right")
    for cells in memory_rows(question, sizes):
        table.add_row(*cells)
    console.print(table)
    print(
        f"A {question.gpu} has {_gib(question.kind.memory)}, of which {USABLE:.0%} are counted on. Products in "
        f"bfloat16; gradient_checkpointing={training.gradient_checkpointing}; compiled runs keep fewer activations. "
        f"FLOPs of the GPU by its data sheet: {question.kind.flops:.3g} a second, dense."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"
