"""Hyper-parameters that carry over: from a small run where they were measured to one that is wider, deeper or longer.

Every rule is a function of ratios to the base, and names its source. `training.learning_rate: auto` applies them all.
They are rules of thumb with measured exponents: they spare most of a search, and a run that matters deserves the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from config.schema import Config
from training.plan import Plan


@dataclass(frozen=True)
class Rates:
    """What is chosen. The rates are those of Muon, and of AdamW's tables, hidden matrices, head and scalars."""

    muon: float
    embedding: float
    hidden: float
    head: float
    scalar: float
    muon_decay: float
    adamw_decay: float
    init_std: float


@dataclass(frozen=True)
class Run:
    """What the choice depends on: width and depth of the model, tokens of a step, and tokens of the whole run."""

    width: int
    depth: int
    batch_tokens: int
    tokens: int


DEMO = Run(width=128, depth=4, batch_tokens=1024, tokens=2_560_000)
DEMO_RATES = Rates(
    muon=0.005,
    embedding=0.008,
    hidden=0.0035,
    head=0.008,
    scalar=0.008,
    muon_decay=0.0,
    adamw_decay=0.1,
    init_std=0.02,
)
"""config/recipes/demo.yaml, where they were found by search.

But `hidden`, which AdamW needs for the blocks where there is no Muon: the best rate of a model of this size on letters,
0.005 for 0.55M tokens in steps of 768, carried over by the rules below.
"""


def width_factor(width_ratio: float) -> float:
    """Of AdamW's rate for hidden matrices and the head: an element's step adds up over `width` inputs.

    Adam moves every element alike, so a layer's output moves by rate * inputs; Yang et al., 2022
    (https://arxiv.org/abs/2203.03466), table 3. Tables and scalars add up over nothing, and Muon's update has a fixed
    spectral norm already (Bernstein and Newhouse, 2024, https://arxiv.org/abs/2409.20325): theirs stay.
    """
    return 1.0 / width_ratio


def init_factor(width_ratio: float) -> float:
    """Of the initial deviation, so that outputs begin as large at any width; Yang et al., 2022, table 3."""
    return math.pow(width_ratio, -0.5)


def depth_factor(depth_ratio: float) -> float:
    """Of the rates of the blocks: their changes add up over the layers.

    The square root is that of Yang et al., 2023 (https://arxiv.org/abs/2310.02244).
    """
    return math.pow(depth_ratio, -0.5)


def batch_factor(batch_ratio: float) -> float:
    """Of every rate: a larger batch has less noise, and normalised steps may be longer by the root of its growth.

    Malladi et al., 2022 (https://arxiv.org/abs/2205.10287), for Adam; nanochat does so for Muon too.
    """
    return math.sqrt(batch_ratio)


def horizon_factor(tokens_ratio: float) -> float:
    """Of every rate: a longer run wants a lower one.

    The exponent is that of Bjorck et al., 2024 (https://arxiv.org/abs/2409.19913), measured with AdamW.
    """
    return math.pow(tokens_ratio, -0.32)


def decay_factor(steps_ratio: float, rate_ratio: float) -> float:
    """Of weight decay, so that a weight forgets over the same share of the run: steps * rate * decay stays.

    Wang and Aitchison, 2024 (https://arxiv.org/abs/2405.13698). Where the rate grows with the batch alone, as
    nanochat's, this is its batch**0.5 / tokens.
    """
    return 1.0 / (steps_ratio * rate_ratio)


def scaled(run: Run, base: Run = DEMO, rates: Rates = DEMO_RATES) -> Rates:
    """The `rates` that were good for the run `base`, carried over to `run`."""
    width, depth = run.width / base.width, run.depth / base.depth
    batch, tokens = run.batch_tokens / base.batch_tokens, run.tokens / base.tokens
    every = batch_factor(batch) * horizon_factor(tokens)
    decay = decay_factor(tokens / batch, every)
    return Rates(
        muon=rates.muon * every * depth_factor(depth),
        embedding=rates.embedding * every,
        hidden=rates.hidden * every * width_factor(width) * depth_factor(depth),
        head=rates.head * every * width_factor(width),
        scalar=rates.scalar * every,
        muon_decay=rates.muon_decay * decay,
        adamw_decay=rates.adamw_decay * decay,
        init_std=rates.init_std * init_factor(width),
    )


def choose_rates(config: Config, plan: Plan) -> Config:
    """`config` with rates, decays and initial deviation chosen for this run; as it is, unless `learning_rate: auto`."""
    if config.training.learning_rate != "auto":
        return config
    tokens = plan.sequences_through(plan.steps) * plan.sequence_length
    found = scaled(Run(config.model.d_model, config.model.n_layers, plan.tokens_per_step, tokens))
    training = config.training
    adamw = {
        "learning_rate": found.hidden,
        "embedding_learning_rate": found.embedding,
        "head_learning_rate": found.head,
        "scalar_learning_rate": found.scalar,
        "weight_decay": found.adamw_decay,
    }
    decay = found.muon_decay or training.muon.weight_decay  # the base has none that could be carried over
    changes = {
        "adamw": training.adamw.model_copy(update=adamw),
        "muon": training.muon.model_copy(update={"learning_rate": found.muon, "weight_decay": decay}),
    }
    model = config.model.model_copy(update={"init_std": found.init_std})
    return config.model_copy(update={"model": model, "training": training.model_copy(update=changes)})


def describe(config: Config) -> str | None:
    """What `learning_rate: auto` has chosen, in one line; None where the rates were given."""
    if config.training.learning_rate != "auto":
        return None
    adamw, muon = config.training.adamw, config.training.muon
    chosen = {
        "embedding": adamw.embedding_learning_rate,
        "head": adamw.head_learning_rate,
        "scalars": adamw.scalar_learning_rate,
        "matrices": muon.learning_rate if config.training.optimizer == "muon" else adamw.learning_rate,
        "decay": muon.weight_decay if config.training.optimizer == "muon" else adamw.weight_decay,
        "init_std": config.model.init_std,
    }
    return "learning_rate: auto chose " + ", ".join(f"{name} {value:.2g}" for name, value in chosen.items())
