"""Checkpoints: whole or not there, data and never code, and only for the model they were made by."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from config.errors import UserError
from config.load import load_config
from config.schema import Config
from model.archive import is_intact
from model.checkpoint import load_checkpoint, load_model, load_weights, save_checkpoint
from model.checkpoint_folder import (
    Keep,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    prune,
    resolve_checkpoint,
    set_latest,
)
from model.transformer import Transformer

SMALL = ["model.vocab_size=100", "model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.context_length=16"]


def small_config(*overrides: str) -> Config:
    return load_config([], [*SMALL, *overrides])


def state_of(model: Transformer, config: Config, step: int = 3) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "config": config.model_dump(),
        "step": step,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(3.0)}}, "groups": [(1, None)]},
        "run_name": "a-run",
        "tokenizer_fingerprint": "abc",
        "validation_loss": 1.5,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = small_config("model.zero_init_projections=false")
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, state_of(Transformer(config.model), config))
    return path


@pytest.mark.parametrize("overrides", [[], ["model.position=learned", "model.tie_embeddings=true", "model.bias=true"]])
def test_model_comes_back_as_it_was(tmp_path: Path, overrides: list[str]) -> None:
    config = small_config("model.zero_init_projections=false", *overrides)
    model = Transformer(config.model).eval()
    model.init_weights(5)
    path = checkpoint_path(tmp_path, 7)
    save_checkpoint(path, state_of(model, config, 7))
    loaded, info = load_model(path)
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    assert (info.path, info.step, info.run_name, info.validation_loss) == (path, 7, "a-run", 1.5)
    assert info.tokenizer_fingerprint == "abc"
    assert Config.model_validate(info.config) == config


def test_state_of_the_optimizer_comes_back(saved: Path) -> None:
    state = load_checkpoint(saved)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    assert state["optimizer"]["groups"] == [(1, None)]


def test_model_can_be_loaded_in_lower_precision(saved: Path) -> None:
    exact, low = load_model(saved)[0], load_model(saved, dtype=torch.bfloat16)[0]
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert torch.equal(low.output_weight, exact.output_weight.bfloat16())
    assert low.rotary is not None and exact.rotary is not None
    assert torch.equal(low.rotary.cos, exact.rotary.cos)


def test_file_cut_at_any_byte_is_one_clear_error(saved: Path, tmp_path: Path) -> None:
    whole, torn = saved.read_bytes(), tmp_path / "torn.pt"
    for size in [*range(0, len(whole), 499), *range(len(whole) - 90, len(whole))]:
        torn.write_bytes(whole[:size])
        with pytest.raises(UserError, match="torn.pt is (not a whole checkpoint: it was cut short|damaged)"):
            load_checkpoint(torn)


def test_a_flipped_bit_anywhere_is_found_and_the_last_good_one_named(saved: Path) -> None:
    """PyTorch itself loads such a file without a word."""
    config = small_config()
    newer = checkpoint_path(saved.parent, 5)
    save_checkpoint(newer, state_of(Transformer(config.model), config, 5))
    whole = newer.read_bytes()
    load_checkpoint(newer)
    for place in [*range(50, len(whole), len(whole) // 40), len(whole) - 1]:
        newer.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"(?s)model_step_5.pt is .*The newest whole one before it is {saved}"):
            load_checkpoint(newer)
    newer.write_bytes(whole)
    assert load_checkpoint(newer)["step"] == 5
    saved.write_bytes(b"nothing")
    newer.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is damaged: its checksum is not that of its content. Use another checkpoint."):
        load_checkpoint(newer)


def test_the_checksum_goes_with_the_file_and_older_files_have_none(saved: Path, tmp_path: Path) -> None:
    elsewhere, old = tmp_path / "sent" / "weights.pt", tmp_path / "old.pt"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(saved.read_bytes())
    assert is_intact(saved) is True and is_intact(elsewhere) is True
    assert torch.load(elsewhere, weights_only=True)["step"] == 3
    torch.save(torch.load(saved, weights_only=True), old)
    assert is_intact(old) is None
    assert load_checkpoint(old)["step"] == 3


class _Payload:
    """What an attacker would put into a pickle."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_code_in_a_file_is_refused_and_never_runs(tmp_path: Path, writer: str) -> None:
    path, evidence = tmp_path / "model_step_1.pt", tmp_path / "ran"
    content = {"format": 1, "model": {}, "config": {}, "step": 1, "extra": _Payload(evidence)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="not a whole checkpoint.*or is another kind of file"):
        load_checkpoint(path)
    assert not evidence.exists()
    if writer == "torch":
        torch.load(path, weights_only=False)
        assert evidence.exists()


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04 not really", b"\x80\x02}q\x00."])
def test_other_kinds_of_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model_step_1.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_checkpoint(path)


def test_data_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    contents: list[Any] = [{"model": {}, "optimizer": {}}, [1, 2], torch.ones(2)]
    for content in contents:
        torch.save(content, path)
        with pytest.raises(UserError, match="is not a checkpoint of this program"):
            load_checkpoint(path)
    torch.save({"model": {}, "config": {}, "step": 1, "format": 99}, path)
    with pytest.raises(UserError, match="has checkpoint format 99; this version reads format 1"):
        load_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no checkpoint .*model_step_9.pt"):
        load_checkpoint(tmp_path / "model_step_9.pt")


def test_a_checkpoint_older_than_an_option_means_a_model_without_it(saved: Path) -> None:
    state = load_checkpoint(saved)
    state["config"]["training"].pop("z_loss")
    for option in ("logit_soft_cap", "value_embeddings", "residual_scaling", "window", "window_pattern"):
        state["config"]["model"].pop(option)
    save_checkpoint(saved, {key: value for key, value in state.items() if key != "format"})
    model, info = load_model(saved)
    assert model.config.logit_soft_cap is None
    assert (model.config.value_embeddings, model.config.residual_scaling) == ("none", False)
    assert info.config["training"]["z_loss"] == 0.0


def test_another_model_is_named_key_by_key(saved: Path) -> None:
    other = Transformer(small_config("model.n_layers=2", "model.d_model=32", "model.qk_norm=false").model)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(other, load_checkpoint(saved), saved)
    message = str(error.value)
    assert message.startswith(f"{saved} holds another model: ")
    assert "model.n_layers is 1 there and 2 here" in message
    assert "model.d_model is 16 there and 32 here" in message
    assert "model.qk_norm is True there and False here" in message
    assert "context_length" not in message and "variant" not in message
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


def test_same_model_said_in_other_words_is_accepted(saved: Path) -> None:
    other = Transformer(small_config("model.n_kv_heads=2", "model.d_ff=64", "model.dropout=0.1").model)
    load_weights(other, load_checkpoint(saved), saved)
    assert torch.equal(other.output_weight, load_model(saved)[0].output_weight)


def test_a_pattern_of_windows_matters_only_where_there_are_windows(saved: Path) -> None:
    load_weights(Transformer(small_config("model.window_pattern=SL").model), load_checkpoint(saved), saved)
    with pytest.raises(UserError, match="model.window is None there and 4 here"):
        load_weights(Transformer(small_config("model.window=4").model), load_checkpoint(saved), saved)


def test_weights_that_contradict_their_configuration(saved: Path) -> None:
    state = load_checkpoint(saved)
    state["model"]["head.weight"] = torch.zeros(3, 3)
    save_checkpoint(saved, {key: value for key, value in state.items() if key != "format"})
    with pytest.raises(UserError, match="is damaged: its weights are not those that its own configuration describes"):
        load_model(saved)


def test_finding_checkpoints(tmp_path: Path, saved: Path) -> None:
    for name in ("model_step_20.pt", "model_step_100.pt", "model_step_x.pt", ".model_step_500.pt.12.tmp", "notes.txt"):
        (tmp_path / name).write_bytes(saved.read_bytes())
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 20, 100]
    newest = tmp_path / "model_step_100.pt"
    assert latest_checkpoint(tmp_path) == newest
    assert resolve_checkpoint("latest", tmp_path) == newest
    assert resolve_checkpoint(tmp_path, Path("elsewhere")) == newest
    assert resolve_checkpoint(str(saved), Path("elsewhere")) == saved
    with pytest.raises(
        UserError, match=r"There is no checkpoint .*model_step_5.pt. Steps that exist there: 3, 20, 100"
    ):
        resolve_checkpoint(tmp_path / "model_step_5.pt", tmp_path)


def test_the_pointer_goes_before_the_highest_step(tmp_path: Path, saved: Path) -> None:
    newer = checkpoint_path(tmp_path, 9)
    newer.write_bytes(saved.read_bytes())
    assert latest_checkpoint(tmp_path) == newer
    set_latest(saved)
    assert resolve_checkpoint("latest", tmp_path) == saved
    for nonsense in (b"model_step_7.pt", b"../elsewhere.pt", b"", bytes(range(128, 200))):
        (tmp_path / "latest").write_bytes(nonsense)
        assert latest_checkpoint(tmp_path) == newer


def test_pruning_keeps_the_last_the_best_and_every_so_many(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        checkpoint_path(tmp_path, step).touch()
    prune(tmp_path, Keep(last=2, every=30, best=20))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30, 60, 80, 90]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        assert list_checkpoints(directory) == []
        with pytest.raises(UserError, match="There is no checkpoint in .* Train one with: python scripts/train.py"):
            resolve_checkpoint("latest", directory)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model_step_1.pt"
    with pytest.raises(TypeError, match=r"state\['rng'\]\[0\] is a Path|state\['rng'\]\[0\] is a PosixPath"):
        save_checkpoint(path, {"rng": [tmp_path]})
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_checkpoint(saved: Path) -> None:
    """A file size limit stands in for a full disk: the write fails in the middle in the same way."""
    code = (
        "import resource, sys, torch; from pathlib import Path; from config.errors import UserError\n"
        "from model.checkpoint import load_checkpoint, save_checkpoint\n"
        "path = Path(sys.argv[1]); state = load_checkpoint(path); del state['format']\n"
        "state['step'] = 4; state['optimizer'] = torch.zeros(1_000_000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try: save_checkpoint(path, state)\n"
        "except UserError as error: print(error); sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith(f"No space left while writing {saved}")
    assert load_checkpoint(saved)["step"] == 3
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
