"""Every model size and every recipe that ships: it loads, its model builds, and it has as many weights as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from config.load import CONFIG_DIR, load_config
from config.model import ModelConfig
from config.schema import Config
from model.transformer import Transformer

RECIPES = sorted((CONFIG_DIR / "recipes").glob("*.yaml"))

# GPT-2's are the published counts; the others were worked out by hand from the shapes, as `by_hand` does again.
PARAMETERS = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "modern-125m": 125_848_320,
    "modern-350m": 350_274_560,
    "modern-1b": 1_136_732_160,
}


def build(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def by_hand(config: ModelConfig) -> int:
    """Number of weights from the shapes, biases and padding apart: right for models without biases."""
    width, keys = config.d_model, config.kv_heads * config.head_dim
    assert config.vocab_size is not None and not config.bias and config.norm == "rmsnorm" and config.position == "rope"
    matrices = 3 if config.activation == "swiglu" else 2
    block = 2 * width * width + 2 * width * keys + matrices * width * config.feed_forward_dim + 2 * width
    tables = 1 if config.tie_embeddings else 2
    return config.n_layers * block + width + tables * config.vocab_size * width


def shipped_variants() -> list[str]:
    return list(yaml.safe_load((CONFIG_DIR / "model_config.yaml").read_text())["variants"])


@pytest.mark.parametrize("variant", [name for name in shipped_variants() if name != "demo"])
def test_variant_has_its_published_size(variant: str) -> None:
    config = load_config([], [f"model.variant={variant}"]).model
    model = build(config)
    assert model.num_parameters() == PARAMETERS[variant]
    assert all(parameter.is_meta for parameter in model.parameters())
    if not variant.startswith("gpt2"):
        assert by_hand(config) == PARAMETERS[variant]


@pytest.mark.parametrize("vocab_size", [4096, 4097])
def test_demo_counts_no_padding(vocab_size: int) -> None:
    config = load_config([], [f"model.vocab_size={vocab_size}"]).model
    model = build(config)
    assert model.num_parameters() == by_hand(config)
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert stored - model.num_parameters() == 2 * config.d_model * (config.padded_vocab_size - vocab_size)
    assert config.padded_vocab_size % 128 == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_model_builds(recipe: Path) -> None:
    config = load_config([recipe])
    model = config.model
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": config.data.tokenizer.vocab_size})
    expected = PARAMETERS.get(model.variant) or by_hand(model)
    assert build(model).num_parameters() == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_hangs_together(recipe: Path) -> None:
    config = load_config([recipe])
    assert config.model.vocab_size in (None, config.data.tokenizer.vocab_size)
    assert set(config.data.use) <= config.data.sources.keys()
    assert config.training.schedule.warmup_steps < (config.training.max_steps or 10**9)
    assert tokens_per_step(config) % 1024 == 0


def test_recipes_of_gpus_see_the_tokens_they_promise() -> None:
    promised = {"gpt2-small": 10e9, "modern-350m": 10e9, "modern-1b": 26e9}
    for name, tokens in promised.items():
        config = load_config([CONFIG_DIR / "recipes" / f"{name}.yaml"])
        assert config.training.max_steps is not None
        assert config.training.max_steps * tokens_per_step(config) == pytest.approx(tokens, rel=0.01)


def test_the_promised_recipes_ship() -> None:
    assert {"demo", "gpt2-small", "modern-350m", "modern-1b"} <= {path.stem for path in RECIPES}


def tokens_per_step(config: Config) -> int:
    return config.training.batch_size * (config.training.sequence_length or config.model.context_length)
