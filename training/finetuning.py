"""What a fine-tuning run starts from: examples, the checkpoint whose weights it takes, and the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config.errors import UserError
from config.load import CONFIG_DIR, load_config
from config.schema import Config
from data.examples.columns import Columns
from data.examples.encoding import EncodedExamples, encode_examples
from data.examples.packed import PackedExamples
from data.examples.pairs import PairSamples
from data.examples.reading import ANSWERS, Example, format_of, read_examples
from data.examples.samples import ExampleSamples, hold_out, refuse_shared_prompts
from data.tokenization import Tokenizer
from data.tokenization.build import current_fingerprint
from data.tokenization.matching import matching_tokenizer
from model.checkpoint import checkpoint_model_config, load_checkpoint, require_same_model
from model.checkpoint_folder import resolve_checkpoint
from training.plan import sequence_length
from training.resume import run_config

Watch = Callable[[Sequence[Example], str], Iterable[Example]]
RECIPE = CONFIG_DIR / "recipes" / "finetune.yaml"


@dataclass(frozen=True, slots=True)
class Asked:
    """What stands on the command line. `start` and `resume` exclude each other; the other fields are as typed."""

    dataset: Path | None
    validation: Path | None
    start: str | None
    resume: str | None
    recipes: Sequence[Path]
    overrides: Sequence[str]
    columns: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Finetuning:
    """`about` is what every checkpoint of the run is to tell; `start` holds the first weights, `resume` later ones.

    `source` is `train` as the training loop reads it; of pairs, `train` and `validation` hold both sides in turn.
    `probe` is the first held-out example. `encoded` is the account of the set, and of the validation set where that is
    a file of its own.
    """

    config: Config
    tokenizer: Tokenizer
    source: ExampleSamples | PackedExamples | PairSamples
    train: ExampleSamples
    validation: ExampleSamples
    probe: Example
    encoded: Sequence[EncodedExamples]
    about: dict[str, Any]
    start: Path
    resume: Path | None

    @property
    def newest(self) -> Path:
        """The checkpoint with the weights that the run begins with now."""
        return self.resume or self.start

    @property
    def pairs(self) -> PairSamples | None:
        """The pairs to train on, where the set is of preferences."""
        return self.source if isinstance(self.source, PairSamples) else None

    @property
    def questions(self) -> ExampleSamples:
        """The held-out examples that a model may be asked: of pairs, the chosen sides."""
        if self.pairs is None:
            return self.validation
        chosen = [self.validation.encoded(number) for number in range(0, len(self.validation), 2)]
        return ExampleSamples(chosen, self.validation.pad_id, self.about["context_length"])


def starting_config(asked: Asked) -> tuple[Config, Path, Path | None]:
    """The configuration, the checkpoint fine-tuning begins or began with, and the one it goes on from, if any.

    The model is that of the checkpoint, where only dropout may be changed. Raises `UserError` where there is no
    checkpoint, or the configuration makes another model.
    """
    if asked.resume is not None:
        if asked.start is not None:
            raise UserError("--resume goes on with its own weights, so --checkpoint does not go with it. Give one.")
        config, resume = run_config(asked.recipes, asked.overrides, asked.resume, base=[RECIPE])
        assert resume is not None
        about = load_checkpoint(resume).get("finetuning")
        if about is None or "start" not in about:
            raise UserError(f"{resume} is no checkpoint of fine-tuning. To start from it: --checkpoint {resume}")
        return config, Path(about["start"]), resume
    start = resolve_checkpoint(asked.start or "latest", Path(load_config().training.checkpoint_dir))
    state = load_checkpoint(start)
    saved = checkpoint_model_config(start, state)
    config = load_config([RECIPE, *asked.recipes], asked.overrides, saved=(str(start), {"model": saved.model_dump()}))
    require_same_model(saved, config.model, start)
    return config, start, None


def open_finetuning(asked: Asked, watch: Watch = lambda examples, what: examples) -> Finetuning:
    """Read, encode and split the examples that were asked for; a resumed run has those of its checkpoint by default.

    `watch` stands between the examples and their encoding, for a progress bar. Raises `UserError`, before anything is
    computed, where examples are unusable, too long or too few, or do not go with the configuration or the checkpoint.
    """
    config, start, resume = starting_config(asked)
    if config.training.short_sequences.length is not None:
        raise UserError("training.short_sequences would cut examples apart. Set training.short_sequences.length=null.")
    if config.training.batch_warmup.sequences is not None:
        raise UserError("training.batch_warmup is for pre-training alone. Set training.batch_warmup.sequences=null.")
    state = load_checkpoint(resume or start)
    before: dict[str, Any] = state["finetuning"] if resume else {}
    dataset = asked.dataset or _path(before.get("dataset"))
    if dataset is None:
        raise UserError("Name the examples to train on with --dataset FILE.jsonl; docs/finetuning.md shows their form.")
    validation = asked.validation or _path(before.get("validation"))
    unusable = config.data.preprocess.max_bad_fraction
    words = asked.columns or before.get("columns", ())
    examples = read_examples(dataset, unusable, Columns(words))
    held_out = read_examples(validation, unusable, Columns(words)) if validation else []
    if validation:
        if format_of(held_out[0]) != format_of(examples[0]):
            raise UserError(
                f"{validation} has the format {format_of(held_out[0])}, {dataset} has {format_of(examples[0])}. "
                "Validate on examples of the format that is trained."
            )
        refuse_shared_prompts(examples, held_out, validation)

    places = [config.data.tokenizer_dir, state["config"]["data"]["tokenizer_dir"]]
    tokenizer = matching_tokenizer(state["tokenizer_fingerprint"], [Path(place) for place in places])
    place = next(place for place in places if current_fingerprint(Path(place)) == tokenizer.fingerprint)
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer_dir": place})})
    length = before.get("context_length") or sequence_length(config.model, config.training)
    too_long = config.data.finetuning.too_long
    found = encode_examples(tokenizer, watch(examples, "Encoding the examples"), length, too_long)
    if validation:
        others = encode_examples(tokenizer, watch(held_out, "Encoding the validation set"), length, too_long)
        parts, probe = [found.samples, others.samples], others.examples[0]
        trained = found.examples
    else:
        held = hold_out(found.examples, config.data.finetuning.validation_fraction)
        parts = [[found.samples[row] for row in np.flatnonzero(held == side)] for side in (False, True)]
        probe = found.examples[int(np.argmax(held))]
        trained = [example for example, out in zip(found.examples, held, strict=True) if not out]
    train = ExampleSamples(parts[0], tokenizer.pad_id, length, [example.location for example in trained])
    source = _source(format_of(examples[0]), train, length, config.data.finetuning.packing)
    heldout = ExampleSamples(parts[1], tokenizer.pad_id, length)

    about = {
        "format": ANSWERS.get(format_of(examples[0]), format_of(examples[0])),
        "columns": list(words),
        "dataset": str(dataset),
        "validation": str(validation) if validation else None,
        "start": str(start),
        "context_length": length,
    }
    return Finetuning(
        config=_fitted(config, source.length),
        tokenizer=tokenizer,
        source=source,
        train=train,
        validation=heldout,
        probe=probe,
        encoded=[found, others] if validation else [found],
        about={**before, **about},
        start=start,
        resume=resume,
    )


def _source(
    form: str, train: ExampleSamples, length: int, packing: bool
) -> ExampleSamples | PackedExamples | PairSamples:
    """The examples as the training loop reads them."""
    if form in ANSWERS:
        return PairSamples(train, length, packing)
    return PackedExamples(train, length) if packing else train


def _path(saved: str | None) -> Path | None:
    return Path(saved) if saved else None


def _fitted(config: Config, length: int) -> Config:
    """`config` for sequences of `length`, under a name that tells fine-tuning from pre-training."""
    name = config.training.run_name or f"{config.model.variant}-finetuned-{time.strftime('%Y%m%d-%H%M%S')}"
    training = config.training.model_copy(update={"sequence_length": length, "run_name": name})
    return config.model_copy(update={"training": training})
