"""Prompt look-up: tokens a second with guesses from the text itself, over those without.

    python -m benchmarks.lookup
    python -m benchmarks.lookup --checkpoint latest
    python -m benchmarks.lookup model.variant=gpt2-small --rows 4 --tokens 256

What it is worth depends on the text. So a model with random weights is made to write given ones: a form leaves it one
token in each place, and all the work of drawing is done. That shows what the look-up gives a model that writes
just this. Texts are this project's own files, as its tokenizer or that of `--checkpoint` has them: a file that is
copied with a changed line now and then, as an editor would have it, after a prompt with the file; the second half of a
file after the first; prose that goes on; and tokens by chance, in which nothing repeats itself. With `--checkpoint` the
model of that writes what it likes, too: the second half of a file, greedily and by the shipped settings.

With and without take turns; each number is the median over the rounds, with the lowest and highest ratio in one. The
share is that of the guesses that were right.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from config.command import Overrides, Recipe, run
from config.load import load_config, with_vocab_size

if TYPE_CHECKING:
    from torch import Tensor

    from data.tokenization import Tokenizer
    from inference.engine import Request
    from model.transformer import Transformer

ROOT = Path(__file__).parents[1]
CODE, PROSE = ROOT / "inference/slots.py", ROOT / "docs/model.md"
KINDS = ("fp32", "bf16", "int8", "int4")


class Dictated:
    """A form, as `inference.constraints.Constraint`, that lets nothing be written but the given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def begin(self) -> Dictation:
        """Where a new text stands."""
        return Dictation(self._tokens)


class Dictation:
    """How far a text has come in it; see `inference.constraints.Progress`."""

    failure = None

    def __init__(self, tokens: list[int]) -> None:
        self._tokens, self._done = tokens, 0

    @property
    def ended(self) -> bool:
        """Whether all is written."""
        return self._done == len(self._tokens)

    def fill(self, bits: Tensor) -> None:
        """Allow the next token alone."""
        word, bit = divmod(self._tokens[self._done], 32)
        bits.zero_()
        bits[word] = 1 << bit if bit < 31 else -(1 << 31)

    def push(self, token: int) -> None:
        """Go on; anything else than what was dictated is an error."""
        assert token == self._tokens[self._done]
        self._done += 1


@dataclass
class Turn:
    """What one run gave: seconds of decoding, tokens, and guesses."""

    seconds: float
    tokens: int
    proposed: int
    accepted: int


def compare(
    config: Recipe = None,
    overrides: Overrides = None,
    checkpoint: Annotated[str | None, typer.Option(help="A checkpoint that writes for itself, too.")] = None,
    tokenizer_dir: Annotated[Path, typer.Option(help="A tokenizer, where there is no checkpoint.")] = Path(
        "corpus/tokenizer"
    ),
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="fp32, bf16, int8, int4; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a turn, and at most of a prompt.")] = 192,
    lookup: Annotated[int | None, typer.Option(help="Guesses at most; by default what is shipped.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
) -> None:
    """Time look-up."""
    from model.waiting import watch_cores

    watch_cores()
    import torch

    from data.tokenization import load_tokenizer
    from inference.loading import load_for_generation
    from inference.memory import settle_
    from inference.quantization import quantize_
    from model.transformer import Transformer

    settings = load_config([config] if config else [], overrides or ["model.variant=gpt2-small"])
    if checkpoint is not None:
        loaded = load_for_generation(checkpoint, settings)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        tokenizer = load_tokenizer(tokenizer_dir)
        model = Transformer(with_vocab_size(settings, settings.model.vocab_size or 32768).model).eval()
    most = settings.generation.prompt_lookup_tokens if lookup is None else lookup
    texts = dictated_texts(tokenizer, tokens, rows)
    if checkpoint is not None:
        texts |= own_texts(tokenizer, tokens, rows)
    title = f"{rows} texts at once, up to {most} guesses, {torch.get_num_threads()} threads"
    table = Table("", "text", "tokens/s", "without", "ratio", "lowest to highest", "proposed", "right", title=title)
    for kind in kinds or ["fp32", "bf16", "int8"]:
        variant = copy.deepcopy(model)
        variant = variant.bfloat16() if kind == "bf16" else variant
        quantize_(variant, cast(Any, kind if kind.startswith("int") else "none"))
        settle_(variant)
        for name, requests in texts.items():
            table.add_row(kind, name, *measured(variant, tokenizer, requests, most, rounds))
    Console(width=130).print(table)


def dictated_texts(tokenizer: Tokenizer, tokens: int, rows: int) -> dict[str, list[Request]]:
    """Requests whose texts are given, of so many tokens at most."""
    from inference.engine import Request
    from inference.sampling import SamplingSettings

    code, prose, random_ = CODE.read_text(), PROSE.read_text(), random.Random(0)
    lines = tokenizer.decode(tokenizer.encode(code)[-tokens:]).splitlines(keepends=True)
    changed = [line.replace("slot", "place") if number % 8 == 3 else line for number, line in enumerate(lines)]
    by_chance = [random_.randrange(300, tokenizer.vocab_size) for _ in range(2 * tokens)]
    pairs = {
        "a file with changed lines": (tokenizer.encode("".join(lines)), tokenizer.encode("".join(changed))),
        "a file goes on": halves(tokenizer.encode(code), tokens),
        "prose goes on": halves(tokenizer.encode(prose), tokens),
        "tokens by chance": halves(by_chance, tokens),
    }
    sampling = SamplingSettings(temperature=0.8, top_p=0.95)
    return {
        name: [Request(prompt, len(text), sampling, row, constraint=cast(Any, Dictated(text))) for row in range(rows)]
        for name, (prompt, text) in pairs.items()
    }


def own_texts(tokenizer: Tokenizer, tokens: int, rows: int) -> dict[str, list[Request]]:
    """Requests to go on as the model likes."""
    from inference.engine import Request
    from inference.sampling import SamplingSettings

    found = {}
    for name, path in {"code": CODE, "prose": PROSE}.items():
        prompt, _ = halves(tokenizer.encode(path.read_text()), tokens)
        for how, sampling in {
            "greedily": SamplingSettings(temperature=0.0),
            "at 0.8": SamplingSettings(temperature=0.8, top_p=0.95),
        }.items():
            found[f"its own {how} after {name}"] = [Request(prompt, tokens, sampling, row) for row in range(rows)]
    return found


def halves(ids: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """What is read, and what is written after it."""
    return ids[:tokens], ids[tokens : 2 * tokens]


def measured(
    model: Transformer, tokenizer: Tokenizer, requests: list[Request], most: int, rounds: int
) -> tuple[str, ...]:
    """The cells of a row: rates with and without, their ratio, and what became of the guesses."""
    with_, without = list[Turn](), list[Turn]()
    for number in range(rounds + 1):  # the first is for getting warm
        for turns, count in ((with_, most), (without, 0)) if number % 2 else ((without, 0), (with_, most)):
            turns.append(written(model, tokenizer, [replace(each, prompt_lookup_tokens=count) for each in requests]))
    assert {turn.tokens for turn in with_} == {turn.tokens for turn in without}, "the texts are not the same"
    rates = [statistics.median(turn.tokens / turn.seconds for turn in turns[1:]) for turns in (with_, without)]
    ratios = sorted(other.seconds / own.seconds for own, other in zip(with_[1:], without[1:], strict=True))
    last = with_[-1]
    right = f"{100 * last.accepted / last.proposed:.0f} %" if last.proposed else ""
    middle = f"{statistics.median(ratios):.2f}"
    return *(f"{rate:.0f}" for rate in rates), middle, f"{ratios[0]:.2f} to {ratios[-1]:.2f}", str(last.proposed), right


def written(model: Transformer, tokenizer: Tokenizer, requests: list[Request]) -> Turn:
    """One run, timed from the step on after which every text has begun."""
    from inference.engine import Engine

    engine = Engine(model, tokenizer, len(requests))
    for request in requests:
        engine.submit(request)
    begun = set[int]()
    while len(begun) < len(requests):
        begun |= {piece.sequence for piece in engine.step()}
    tokens, begin = 0, time.perf_counter()
    while engine.busy:
        tokens += len(engine.step())
    return Turn(time.perf_counter() - begin, tokens, engine.proposed_tokens, engine.accepted_tokens)


def main() -> None:
    """Run the comparison as a command."""
    run(compare)


if __name__ == "__main__":
    main()
