"""Stopping and going on: bit for bit where nothing was changed, and refused where it could not be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from config.earlier import BEFORE
from config.errors import UserError
from model.checkpoint import load_checkpoint, save_checkpoint
from model.transformer import Transformer
from tests.commands import here
from tests.small_runs import (
    SMALL,
    TRAIN,
    RandomSamples,
    curve,
    differing,
    kill_when,
    metrics,
    read_checkpoint,
    start,
    train_here,
    write_corpus,
)
from training import spikes
from training.resume import run_config

LIVELY = ["model.dropout=0.1", "training.micro_batch_size=4", "training.max_steps=12", "training.checkpoint_interval=3"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare_checkpoints(left: Path, right: Path) -> None:
    """Everything but names and the clock must be the same, bit for bit."""
    first, second = (read_checkpoint(path) for path in (left, right))
    for state in (first, second):
        state["progress"].pop("seconds")
        for key in ("config", "run_name", "wandb_id"):
            state.pop(key)
    assert not differing(first, second)


@pytest.mark.parametrize(
    "settings",
    [
        [
            "training.optimizer=muon",
            "training.muon.second_moment=0.9",
            "training.cautious_weight_decay=true",
            "training.batch_warmup.sequences=2",
            "training.batch_warmup.steps=9",
        ],
        ["training.optimizer=adamw", "training.precision=bf16", "training.gradient_checkpointing=full"],
        [
            "training.optimizer=adamw",
            "training.precision=fp16",
            "training.short_sequences.length=8",
            "training.short_sequences.fraction=0.6",
        ],
        [
            "model.value_embeddings=all",
            "model.residual_scaling=true",
            "model.logit_soft_cap=15",
            "model.window=8",
            "training.muon.orthogonalisation=polar_express",
            "training.muon.steps=3",
            "training.z_loss=0.001",
            "training.gradient_checkpointing=selective",
        ],
        ["training.spike_factor=1.01", "training.save_in_background=true", "training.deterministic=true"],
    ],
)
def test_going_on_is_as_if_it_had_never_stopped(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "SETTLED", 3)

    def sampler(model: Transformer) -> str:
        return str(torch.rand(3).tolist())

    source, options = RandomSamples(40, 32), [*LIVELY, *settings, "training.sample_interval=4"]
    whole = train_here(source, *options, "training.run_name=whole", "training.checkpoint_dir=whole", sampler=sampler)
    part = [*options, "training.run_name=part", "training.checkpoint_dir=part", "training.keep_last=9"]
    train_here(source, *part, sampler=sampler)
    for name in ("model_step_12.pt", "model_step_9.pt"):
        (Path("part") / name).unlink()
    torch.rand(100)
    train_here(source, *part, sampler=sampler, resume=Path("part/model_step_6.pt"))
    compare_checkpoints(Path("whole/model_step_12.pt"), Path("part/model_step_12.pt"))
    assert curve(Path("runs/part")) == curve(Path("runs/whole"))
    assert Path("runs/part/samples.jsonl").read_text() == Path("runs/whole/samples.jsonl").read_text()
    assert [entry["from_step"] for entry in json.loads(Path("runs/part/environment.json").read_text())] == [0, 6]
    assert whole.step == 12
    skipped = read_checkpoint(Path("part/model_step_12.pt"))["progress"]["spike_steps"]
    assert (skipped > 0) == ("training.spike_factor=1.01" in settings)


@pytest.mark.slow
def test_killed_at_any_moment_the_command_goes_on_bit_for_bit(folder: Path) -> None:
    """Promise 2: `train(N)` against `train(k)`, `kill -9`, `--resume`, twice, with everything on that draws numbers."""
    write_corpus(folder, ends=[30, 500, 507, 1400, 4000])
    settings = [*SMALL, *LIVELY, "data.loader.packing=best_fit", "training.documents=masked"]
    settings += ["training.max_steps=120", "training.checkpoint_interval=10", "training.keep_last=9"]
    settings += ["training.sample_interval=7", "generation.max_new_tokens=5", "training.eval_interval=30"]
    settings += ["training.short_sequences.length=16", "training.short_sequences.fraction=0.5"]
    here(folder, TRAIN, *settings, "training.run_name=whole", "training.checkpoint_dir=whole")

    part = ["training.run_name=part", "training.checkpoint_dir=part"]
    kill_when((folder / "part/model_step_20.pt").exists, start(folder, "train", *settings, *part))
    resume = ["--resume", "latest", "training.checkpoint_dir=part"]
    kill_when((folder / "part/model_step_40.pt").exists, start(folder, "train", *resume))
    assert not (folder / "part/model_step_120.pt").exists()
    here(folder, TRAIN, *resume)
    compare_checkpoints(folder / "whole/model_step_120.pt", folder / "part/model_step_120.pt")
    assert curve(folder / "runs/part") == curve(folder / "runs/whole")
    assert (folder / "runs/part/samples.jsonl").read_text() == (folder / "runs/whole/samples.jsonl").read_text()


class TestConfiguration:
    """What a command line may change on resume, and what it may not."""

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("trained"))
            train_here(RandomSamples(32, 32), "training.run_name=begun")
            return Path.cwd()

    @pytest.fixture
    def checkpoint(self, folder: Path, trained: Path) -> Path:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        return Path("checkpoints/model_step_8.pt")

    def test_the_saved_configuration_holds_and_may_be_extended(self, checkpoint: Path) -> None:
        settings = ["training.max_steps=16", "training.eval_interval=2", "training.micro_batch_size=2"]
        config, path = run_config([], [*settings, "training.adamw.learning_rate=0.1"], "latest")
        assert path == checkpoint
        assert config.model.d_model == 32 and config.training.log_interval == 2
        assert (config.training.max_steps, config.training.micro_batch_size) == (16, 2)
        assert config.training.adamw.learning_rate == 0.1

    @pytest.mark.parametrize(
        "setting",
        [
            "model.d_model=64",
            "model.n_layers=3",
            "model.variant=gpt2-small",
            "training.seed=1",
            "training.batch_size=16",
            "training.batch_warmup.steps=4",
            "training.sequence_length=16",
            "training.documents=masked",
            "data.loader.packing=best_fit",
            "training.optimizer=adamw",
            "training.run_name=other",
        ],
    )
    def test_what_would_be_another_run_is_refused_by_name(self, checkpoint: Path, setting: str) -> None:
        key, _, value = setting.partition("=")
        with pytest.raises(UserError, match=f"was trained with {key}=.*cannot change to {value}"):
            run_config([], [setting], "latest")

    def test_a_checkpoint_older_than_a_setting_goes_on_as_it_began(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the default is by now; here what was done before is said to have been another thing than that."""
        state = load_checkpoint(checkpoint)
        state["config"]["training"].pop("documents")
        state["config"]["data"]["loader"].pop("packing")
        save_checkpoint(checkpoint, {key: value for key, value in state.items() if key != "format"})
        monkeypatch.setitem(BEFORE["training"], "documents", "masked")
        monkeypatch.setitem(BEFORE["data"]["loader"], "packing", "best_fit")
        config, _ = run_config([], [], str(checkpoint))
        assert (config.training.documents, config.data.loader.packing) == ("masked", "best_fit")

    def test_writing_out_what_holds_anyway_is_no_change(self, checkpoint: Path) -> None:
        run_config([], ["training.sequence_length=32", "training.batch_size=8"], str(checkpoint))

    def test_a_variant_that_only_a_recipe_knew_is_no_obstacle(self, folder: Path) -> None:
        recipe = folder / "mine.yaml"
        recipe.write_text("model: {variant: mine, variants: {mine: {extends: demo, n_layers: 1}}}\n")
        config, _ = run_config([recipe], [*SMALL, "model.vocab_size=100"], None)
        state = {"model": {}, "config": config.model_dump(), "step": 3}
        save_checkpoint(folder / "checkpoints/model_step_3.pt", state)
        assert run_config([], [], "latest")[0].model.variant == "mine"

    def test_another_tokenizer_or_other_data_is_refused(self, checkpoint: Path) -> None:
        with pytest.raises(UserError, match="another tokenizer"):
            train_here(RandomSamples(32, 32), resume=checkpoint, tokenizer_fingerprint="other")
        with pytest.raises(UserError, match="32 sequences then, 33 now"):
            train_here(RandomSamples(33, 32), resume=checkpoint)
        with pytest.raises(UserError, match="The training data is not what"):
            train_here(RandomSamples(32, 32), resume=checkpoint, data_fingerprint="other")

    def test_a_model_of_another_size_is_refused(self, checkpoint: Path) -> None:
        with pytest.raises(UserError, match="model.d_model is 32 there and 64 here"):
            train_here(RandomSamples(32, 32), "model.d_model=64", resume=checkpoint)
        assert checkpoint.exists()

    def test_a_complete_run_does_nothing_and_can_be_extended(self, checkpoint: Path) -> None:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        result = train_here(RandomSamples(32, 32), resume=checkpoint)
        assert result.already_complete and result.step == 8
        assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        longer = train_here(RandomSamples(32, 32), "training.max_steps=10", resume=checkpoint)
        assert not longer.already_complete and longer.step == 10 and longer.run_dir == Path("runs/begun")
        assert [row["step"] for row in metrics(longer.run_dir)] == [2, 4, 6, 8, 10]

    def test_a_checkpoint_cut_short_is_named(self, checkpoint: Path) -> None:
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="model_step_8.pt is not a whole checkpoint"):
            run_config([], [], "latest")


class TestGoingBack:
    def test_an_earlier_checkpoint_takes_the_record_back_with_it(self) -> None:
        source, settings = RandomSamples(32, 32), ["training.run_name=back", "training.keep_last=9"]
        train_here(source, *settings)
        first = metrics(Path("runs/back"))
        with open("runs/back/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 9, "torn')
        train_here(source, *settings, "training.log_interval=1", resume=Path("checkpoints/model_step_4.pt"))
        rows = metrics(Path("runs/back"))
        assert [row["step"] for row in rows] == [2, 4, 5, 6, 7, 8]
        assert rows[:2] == first[:2]
        assert rows[-1]["seconds"] > rows[1]["seconds"] > 0

    def test_later_checkpoints_of_the_run_are_moved_not_overwritten(self) -> None:
        source, settings = RandomSamples(32, 32), ["training.run_name=back", "training.keep_last=9"]
        train_here(source, *settings)
        old = Path("checkpoints/model_step_8.pt").read_bytes()
        for _ in range(2):
            resume: dict[str, Any] = {"resume": Path("checkpoints/model_step_4.pt")}
            train_here(source, *settings, "training.gradient_clip=0.5", **resume)
        there = {str(path.relative_to("checkpoints")) for path in Path("checkpoints").rglob("*.pt")}
        assert there == {
            "model_step_4.pt",
            "model_step_8.pt",
            "previous/back/model_step_8.pt",
            "previous/back-2/model_step_8.pt",
        }
        assert Path("checkpoints/previous/back/model_step_8.pt").read_bytes() == old


@pytest.mark.slow
def test_the_command_says_what_is_wrong_and_what_to_do(folder: Path) -> None:
    write_corpus(folder)
    missing = here(folder, TRAIN, *SMALL, "--resume", "latest", status=1)
    assert missing.stderr.startswith("error: There is no checkpoint in checkpoints/.")
    here(folder, TRAIN, *SMALL, "training.run_name=done")
    complete = here(folder, TRAIN, "--resume", "latest")
    assert "This run is complete: step 8 of 8" in complete.stdout
    advice = complete.stdout.splitlines()[-1].removeprefix("To train on: python scripts/train.py ")
    assert advice == "--resume checkpoints/model_step_8.pt training.max_steps=16"
    assert "step 16" in here(folder, TRAIN, *advice.split()).stdout
