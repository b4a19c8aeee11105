"""The configuration: precedence, inheritance, snapshots, and what a user reads after a mistake."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config.earlier import with_keys_added_since
from config.errors import UserError
from config.load import CONFIG_DIR, SECTIONS, config_from_dict, load_config, save_config, with_vocab_size
from config.schema import Config

RECIPES = sorted((CONFIG_DIR / "recipes").glob("*.yaml"))
plain_text = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: "${" not in text)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def message_of(*overrides: str, recipes: tuple[Path, ...] = ()) -> str:
    """What the user reads when this configuration is refused."""
    with pytest.raises(UserError) as caught:
        load_config(recipes, overrides)
    return str(caught.value)


class TestPrecedence:
    def test_defaults_stand_in_the_yaml_files(self) -> None:
        shipped = yaml.safe_load((CONFIG_DIR / "training_config.yaml").read_text())
        config = load_config()
        assert config.training.batch_size == shipped["batch_size"]
        assert config.training.muon.learning_rate == shipped["muon"]["learning_rate"]

    def test_each_layer_wins_over_the_one_below(self, tmp_path: Path) -> None:
        """Defaults < extends < recipe < command line: four keys, each set first in one more layer."""
        default = load_config().training
        write(
            tmp_path / "base.yaml",
            "training: {log_interval: 101, eval_interval: 101, checkpoint_interval: 101, adamw: {beta1: 0.5}}",
        )
        recipe = write(
            tmp_path / "recipe.yaml", "extends: base.yaml\ntraining: {eval_interval: 102, checkpoint_interval: 102}"
        )
        training = load_config([recipe], ["training.checkpoint_interval=103"]).training
        assert training.batch_size == default.batch_size
        assert training.log_interval == 101
        assert training.eval_interval == 102
        assert training.checkpoint_interval == 103
        assert training.adamw.beta1 == 0.5, "a nested key of the extended recipe is kept"
        assert training.adamw.beta2 == default.adamw.beta2, "its neighbours keep their defaults"

    def test_a_later_parent_wins_over_an_earlier_one(self, tmp_path: Path) -> None:
        write(tmp_path / "one.yaml", "training: {seed: 1, log_interval: 1}")
        write(tmp_path / "two.yaml", "training: {seed: 2}")
        recipe = write(tmp_path / "recipe.yaml", "extends: [one.yaml, two.yaml]")
        training = load_config([recipe]).training
        assert (training.seed, training.log_interval) == (2, 1)

    def test_a_later_recipe_and_a_later_override_win(self, tmp_path: Path) -> None:
        one = write(tmp_path / "one.yaml", "training: {seed: 1}")
        two = write(tmp_path / "two.yaml", "training: {seed: 2}")
        assert load_config([one, two]).training.seed == 2
        assert load_config([], ["training.seed=3", "training.seed=4"]).training.seed == 4

    def test_a_list_is_replaced_not_extended(self) -> None:
        assert load_config([], ["data.use=[tinystories]"]).data.use == ["tinystories"]

    def test_null_takes_a_default_away(self) -> None:
        training = load_config([], ["training.max_steps=null", "training.epochs=2"]).training
        assert training.max_steps is None
        assert training.epochs == 2

    def test_a_section_with_all_its_lines_commented_out_changes_nothing(self, tmp_path: Path) -> None:
        assert load_config([write(tmp_path / "recipe.yaml", "training:\n  # seed: 3\n")]) == load_config()

    def test_interpolation_follows_an_override(self) -> None:
        assert load_config([], ["data.corpus_dir=elsewhere"]).data.tokens_dir == "elsewhere/tokens"

    def test_a_recipe_is_found_by_its_bare_name(self) -> None:
        assert load_config([Path(RECIPES[0].stem)]) == load_config([RECIPES[0]])


class TestVariants:
    def test_a_variant_inherits_what_it_extends(self) -> None:
        small = load_config([], ["model.variant=gpt2-small"]).model
        medium = load_config([], ["model.variant=gpt2-medium"]).model
        assert (medium.variant, medium.n_layers, medium.d_model) == ("gpt2-medium", 24, 1024)
        assert (medium.position, medium.tie_embeddings, medium.vocab_size) == ("learned", True, 50257)
        assert small.n_layers == 12

    def test_an_override_wins_over_the_variant(self) -> None:
        model = load_config([], ["model.variant=gpt2-small", "model.n_layers=2"]).model
        assert (model.n_layers, model.d_model) == (2, 768)

    def test_a_recipe_may_add_a_variant_of_its_own(self, tmp_path: Path) -> None:
        recipe = write(
            tmp_path / "recipe.yaml",
            "model: {variant: wide, variants: {wide: {extends: demo, d_model: 512}}}",
        )
        assert load_config([recipe]).model.d_model == 512
        assert load_config([recipe], ["model.variant=gpt2-small"]).model.d_model == 768

    @pytest.mark.parametrize("variant", yaml.safe_load((CONFIG_DIR / "model_config.yaml").read_text())["variants"])
    def test_every_variant_that_ships_resolves(self, variant: str) -> None:
        assert load_config([], [f"model.variant={variant}"]).model.variant == variant

    def test_a_circle_is_named(self, tmp_path: Path) -> None:
        recipe = write(tmp_path / "recipe.yaml", "model: {variant: a, variants: {a: {extends: b}, b: {extends: a}}}")
        assert "a -> b -> a" in message_of(recipes=(recipe,))

    def test_an_unknown_variant_names_where_it_was_asked_for_and_the_nearest(self, tmp_path: Path) -> None:
        recipe = write(tmp_path / "recipe.yaml", "model: {variant: gpt2-smal}")
        message = message_of(recipes=(recipe,))
        assert str(recipe) in message
        assert "'gpt2-small'" in message


class TestSnapshots:
    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
    def test_every_recipe_loads_and_its_snapshot_gives_it_back(self, recipe: Path, tmp_path: Path) -> None:
        config = load_config([recipe])
        save_config(config, tmp_path / "config.yaml")
        assert load_config([tmp_path / "config.yaml"]) == config
        assert config_from_dict(config.model_dump(), "checkpoint") == config

    @settings(max_examples=15, deadline=None)
    @given(
        name=st.one_of(st.sampled_from(["1e5", "3", "null", "yes", "a: b", "#", "- x", "..."]), plain_text),
        rate=st.floats(1e-30, 1e30, allow_nan=False),
        layers=st.integers(1, 10**6),
        stop=st.lists(st.one_of(st.sampled_from(["\r", "\x85", "a\u2028b", "\u2029"]), plain_text), max_size=3),
    )
    def test_any_value_survives_the_round_trip(self, name: str, rate: float, layers: int, stop: list[str]) -> None:
        tree: dict[str, Any] = load_config().model_dump()
        tree["training"]["run_name"] = name
        tree["training"]["adamw"]["learning_rate"] = rate
        tree["model"]["n_layers"] = layers
        tree["generation"]["stop"] = stop
        config = config_from_dict(tree, "test")
        with TemporaryDirectory() as folder:
            save_config(config, Path(folder) / "config.yaml")
            assert load_config([Path(folder) / "config.yaml"]) == config

    def test_a_snapshot_of_other_settings_names_its_origin(self) -> None:
        tree = load_config().model_dump()
        tree["training"]["warmup"] = 3
        with pytest.raises(UserError, match="model_step_5.pt: training.warmup: there is no such key"):
            config_from_dict(tree, "model_step_5.pt")

    def test_a_snapshot_from_before_a_key_existed_gets_its_default(self) -> None:
        config = load_config([], ["training.seed=7", "data.use=[tinystories]", "model.variant=gpt2-small"])
        tree = config.model_dump()
        del tree["training"]["adamw"]["eps"], tree["data"]["finetuning"], tree["generation"]["top_k"]
        assert config_from_dict(tree, "model_step_5.pt") == config

    def test_a_key_under_its_earlier_name_is_known(self, tmp_path: Path) -> None:
        config = load_config([], ["training.muon.steps=4"])
        tree = config.model_dump()
        tree["training"]["muon"]["newton_schulz_steps"] = tree["training"]["muon"].pop("steps")
        assert config_from_dict(tree, "model_step_5.pt") == config
        changed = load_config([], ["training.muon.steps=3"], saved=("model_step_5.pt", tree))
        assert changed.training.muon.steps == 3
        assert "newton_schulz_steps" in tree["training"]["muon"], "what was read is left as it was"

    def test_an_older_optimizer_is_the_one_it_was(self) -> None:
        """Whatever has become the default since, a checkpoint from before these keys existed goes on without them."""
        changes = ["muon.orthogonalisation=polar_express", "muon.second_moment=0.9", "adamw.head_learning_rate=0.5"]
        overrides = [f"training.{change}" for change in [*changes, "learning_rate=auto", "cautious_weight_decay=true"]]
        tree = load_config([], overrides).model_dump()
        training = tree["training"]
        del training["muon"]["orthogonalisation"], training["muon"]["second_moment"]
        del training["adamw"]["head_learning_rate"], training["learning_rate"], training["cautious_weight_decay"]
        del training["objective"], training["dpo"], training["early_stopping"]
        found = config_from_dict(with_keys_added_since(tree), "model_step_5.pt").training
        assert (found.muon.orthogonalisation, found.muon.second_moment) == ("newton_schulz", None)
        assert (found.adamw.head_learning_rate, found.learning_rate, found.cautious_weight_decay) == (None, None, False)
        assert (found.objective, found.early_stopping.patience) == ("next_token", None)

    def test_the_configuration_is_frozen(self) -> None:
        with pytest.raises(ValueError):
            load_config().training.seed = 3


class TestNumbers:
    @pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "10e-5"])
    def test_scientific_notation_is_a_number(self, text: str, tmp_path: Path) -> None:
        recipe = write(tmp_path / "recipe.yaml", f"training: {{adamw: {{learning_rate: {text}}}}}")
        assert load_config([recipe]).training.adamw.learning_rate == pytest.approx(1e-4)
        assert load_config([], [f"training.adamw.learning_rate={text}"]).training.adamw.learning_rate == 1e-4

    def test_text_that_only_looks_like_one_stays_text(self) -> None:
        assert load_config([], ["training.run_name=e5"]).training.run_name == "e5"
        assert load_config([], ["training.run_name='1e5'"]).training.run_name == "1e5"


class TestMistakes:
    """Every message names what set the value, the key, and what would be right."""

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("training.max_step=3", ["training.max_step", "no such key", "'max_steps'"]),
            ("training.muon.learnin_rate=3", ["training.muon.learnin_rate", "'learning_rate'"]),
            ("trainin.max_steps=3", ["no section 'trainin'", "'training'"]),
            ("nonsense.max_steps=3", ["no section 'nonsense'", "model, training, data, generation"]),
            ("training.max_steps=many", ["training.max_steps", "integer", '"many"']),
            ("training.max_steps=-1", ["training.max_steps", "greater than 0", "-1"]),
            ("training.max_steps=1.5", ["training.max_steps", "integer", "1.5"]),
            ("training.max_steps=null", ["training.max_steps", "exactly one", "epochs"]),
            ("training.epochs=2", ["training.max_steps=null", "training.epochs"]),
            ("training.optimizer=adam", ["training.optimizer", "'adam' is not allowed", "'adamw' or 'muon'"]),
            ("training.compile=maybe", ["training.compile", "'maybe'", "'auto', True or False"]),
            ("training.schedule=cosine", ["training.schedule", "name, warmup_steps", '"cosine"']),
            ("training.micro_batch_size=5", ["training.micro_batch_size", "batch_size=4", "[1, 2, 4]"]),
            ("training.sequence_length=512", ["training.sequence_length", "context_length", "256"]),
            ("training.short_sequences.length=512", ["training.short_sequences.length", "256"]),
            ("model.n_heads=3", ["model.n_heads", "d_model=128 is not divisible", "[1, 2, 4, 8"]),
            ("model.n_kv_heads=3", ["model.n_kv_heads", "n_heads=4 is not divisible", "[1, 2, 4]"]),
            ("model.n_heads=128", ["model.n_heads", "even head width", "position: learned"]),
            ("model.d_head=5", ["model.d_head", "even head width", "d_head=5"]),
            ("model.dropout=1.0", ["model.dropout", "less than 1"]),
            ("model.position=absolute", ["model.position", "'absolute'", "'learned' or 'rope'"]),
            ("data.use=[web]", ["data.use", "no source 'web'", "tinystories"]),
            ("data.sources.web.kind=crawl", ["data.sources.web.kind", "'crawl'", "'sample', 'files', 'urls', 'hub'"]),
            (
                "data.sources.web.repository=a/b",
                ["data.sources.web.kind", "missing", "'sample', 'files', 'urls', 'hub'"],
            ),
            ("data.sources.web.kind=hub", ["data.sources.web.repository", "missing"]),
            ("data.sources.web={kind: hub, repository: a/b, splt: x}", ["data.sources.web.splt", "'split'"]),
            ("data.tokenizer.vocab_size=100", ["data.tokenizer.vocab_size", "256"]),
            ("generation.top_p=0", ["generation.top_p", "greater than 0"]),
        ],
    )
    def test_on_the_command_line(self, override: str, parts: list[str]) -> None:
        message = message_of(override)
        for part in parts:
            assert part in message
        assert "\n" not in message, "one mistake, one sentence"
        if override != "training.epochs=2":
            assert message.startswith(f"command line: {override}: ")

    def test_the_file_that_set_the_value_is_named(self, tmp_path: Path) -> None:
        write(tmp_path / "base.yaml", "training: {max_steps: 0}")
        recipe = write(tmp_path / "recipe.yaml", "extends: base.yaml\ntraining: {seed: 1}")
        assert message_of(recipes=(recipe,)).startswith(f"{tmp_path / 'base.yaml'}: training.max_steps: ")

    def test_several_mistakes_are_all_named(self, tmp_path: Path) -> None:
        recipe = write(tmp_path / "recipe.yaml", "training: {max_steps: 0}\nmodel: {d_modle: 3}")
        lines = message_of("generation.top_k=-1", recipes=(recipe,)).splitlines()
        assert len(lines) == 3
        assert sum(line.startswith(str(recipe)) for line in lines) == 2

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("training:\n  seed: 3\n  seed: 4\n", ["'seed' stands twice", "line 3"]),
            ("training: {seed: 3}\ntraining: {seed: 4}\n", ["'training' stands twice"]),
            ("training: [", ["not valid YAML", "line 2"]),
            ("training: 3", ["section 'training'", "key: value"]),
            ("- 3", ["key: value", "list"]),
            ("extends: nowhere.yaml", ["no configuration file", "nowhere.yaml"]),
            ("extends: recipe.yaml", ["extends itself"]),
            ("data: {corpus_dir: '${nowhere}'}", ["does not resolve", "nowhere"]),
        ],
    )
    def test_in_a_recipe(self, text: str, parts: list[str], tmp_path: Path) -> None:
        message = message_of(recipes=(write(tmp_path / "recipe.yaml", text),))
        for part in parts:
            assert part in message

    def test_a_recipe_that_is_not_there_names_those_that_ship(self) -> None:
        message = message_of(recipes=(Path("config/recipes/dmo.yaml"),))
        assert "config/recipes/dmo.yaml" in message
        assert all(recipe.stem in message for recipe in RECIPES)

    def test_a_recipe_that_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "not a text file" in message_of(recipes=(path,))

    @pytest.mark.parametrize("override", ["model", "model=3", "=3", "model.=3", ".seed=3", "--seed"])
    def test_something_that_is_no_override(self, override: str) -> None:
        message = message_of(override)
        assert repr(override) in message
        assert "section.key=value" in message


def test_the_vocabulary_comes_from_the_tokenizer_or_must_hold_it() -> None:
    config = load_config()
    assert with_vocab_size(config, 300).model.vocab_size == 300
    larger = load_config([], ["model.vocab_size=512"])
    assert with_vocab_size(larger, 300).model.vocab_size == 512
    with pytest.raises(UserError, match="512.*tokenizer has 513"):
        with_vocab_size(larger, 513)


def test_the_schema_and_the_files_have_the_same_keys() -> None:
    """The files hold every default: a key missing there is an error for everyone, so none may be."""
    shipped = {name: yaml.safe_load((CONFIG_DIR / f"{name}_config.yaml").read_text()) for name in SECTIONS}
    del shipped["model"]["variants"]
    for name in SECTIONS:
        assert set(shipped[name]) == set(Config.model_fields[name].annotation.model_fields)  # type: ignore[union-attr]
