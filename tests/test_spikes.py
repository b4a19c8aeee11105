"""Steps whose gradient is not finite, or far larger than usual: left out, counted, and their documents named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config.errors import UserError
from data.data_loader import TokenWindows
from data.examples.encoding import Encoded
from data.examples.samples import ExampleSamples
from data.packing import PackedWindows
from data.tokens import TokenFiles
from model.transformer import Transformer
from tests.small_runs import (
    RandomSamples,
    differing,
    metrics,
    new_transformer,
    train_here,
    trained_weights,
    write_corpus,
)
from training.spikes import SETTLED, SpikeGuard
from training.trainer import TrainResult

STEPS = 44
BAD = 40  # enough norms are known by then


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def disturbed(
    factor: float, steps: Callable[[int], bool] = lambda step: step == BAD
) -> tuple[Transformer, list[Tensor]]:
    """A model whose loss is `factor` times as large in some steps, and the inputs that it sees in them."""
    model, seen = new_transformer(), []
    count = 0

    def disturb(module: Transformer, inputs: tuple[Tensor, ...], loss: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if not steps(count):
            return loss
        seen.append(inputs[0])
        return loss * factor

    model.register_forward_hook(disturb)
    return model, seen


def run(name: str, factor: float, *settings: str, **options: Any) -> tuple[TrainResult, list[Tensor]]:
    """A run with one disturbed step."""
    model, seen = disturbed(factor)
    own = [f"training.run_name={name}", f"training.checkpoint_dir={name}", f"training.max_steps={STEPS}"]
    return train_here(RandomSamples(64, 32), *own, *settings, model=model, **options), seen


def test_a_spike_moves_nothing_and_its_batch_is_written_down() -> None:
    spiked, (inputs,) = run("spiked", 1000.0)
    broken, _ = run("broken", float("nan"))
    assert not differing(trained_weights(spiked), trained_weights(broken))
    moved, _ = run("moved", 1000.0, "training.spike_factor=null")
    assert differing(trained_weights(moved), trained_weights(spiked))
    assert [metrics(each.run_dir)[-1]["skipped_steps"] for each in (spiked, broken, moved)] == [1, 1, 0]
    rows = [json.loads(line) for line in (spiked.run_dir / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reason"]) for row in rows] == [(BAD, "spike")] and rows[0]["gradient_norm"] > 10
    numbers = [int(place.removeprefix("sample ")) for place in rows[0]["samples"]]
    source = RandomSamples(64, 32)
    assert np.array_equal(np.stack([source.sample(number)[0] for number in numbers]), inputs.numpy())
    (row,) = (json.loads(line) for line in (broken.run_dir / "skipped.jsonl").read_text().splitlines())
    assert row["reason"] == "not finite" and row["gradient_norm"] is None and row["samples"] == rows[0]["samples"]
    assert not (moved.run_dir / "skipped.jsonl").exists()


def test_too_many_in_a_row_end_the_run_and_name_the_documents(folder: Path) -> None:
    write_corpus(folder)
    model, _ = disturbed(1000.0, lambda step: step >= BAD)
    source = TokenWindows(TokenFiles(folder / "corpus/tokens", "train"), 32)
    model = new_transformer_of(source, model)
    settings = ["training.max_steps=100", "training.max_skipped_in_a_row=5", "training.run_name=lost"]
    with pytest.raises(UserError) as error:
        train_here(source, *settings, model=model)
    message = str(error.value)
    assert message.startswith(f"The gradient has been more than 10 times as large as usual since step {BAD}: ")
    rows = [json.loads(line) for line in Path("runs/lost/skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(BAD, BAD + len(rows))) and 5 <= len(rows) <= 6
    assert "; ".join(rows[0]["samples"][:3]) + " and 5 more" in message and "train.bin tokens" in message


def new_transformer_of(source: TokenWindows, model: Transformer) -> Transformer:
    """`model`, into whose vocabulary the ids of `source` are folded."""
    plain = source.sample

    def folded(index: int) -> Any:
        return tuple(part % 100 for part in plain(index))

    source.sample = folded  # type: ignore[method-assign]
    return model


class TestGuard:
    def judge(
        self, norms: list[float], factor: float | None = 10.0, state: Any = None
    ) -> tuple[list[bool], SpikeGuard]:
        guard = SpikeGuard(factor, 1000, torch.device("cpu"))
        if state:
            guard.load_state_dict(state)
        found = [bool(guard.judge(torch.tensor(norm), step, range(0))) for step, norm in enumerate(norms)]
        return found, guard

    def test_only_far_outliers_and_only_when_enough_is_known(self) -> None:
        quiet = [1.0 + 0.1 * (step % 7) for step in range(SETTLED)]
        assert self.judge(quiet)[0] == [False] * SETTLED
        assert self.judge([*quiet[1:], 50.0])[0][-1] is False
        assert self.judge([*quiet, 12.0, 14.0, 1.0, float("inf"), 1.0])[0][SETTLED:] == [
            False,
            True,
            False,
            True,
            False,
        ]
        assert self.judge([*quiet, 1e9, float("nan")], factor=None)[0][SETTLED:] == [False, True]

    def test_what_is_usual_moves_with_the_run_but_not_with_its_outliers(self) -> None:
        falling = [1.03**-step for step in range(400)]
        found, guard = self.judge([*falling, 100 * falling[-1], *[1e6] * 100, falling[-1]])
        assert not any(found[:400]) and all(found[400:501]) and found[501] is False

    def test_too_many_in_a_row_are_too_many_though_a_good_one_came_before_they_were_read(self) -> None:
        guard = SpikeGuard(10.0, 3, torch.device("cpu"))
        for bad, lost in ((2, False), (3, True)):
            for step, norm in enumerate([1.0, *[math.nan] * bad, 1.0]):
                guard.judge(torch.tensor(norm), step, range(step, step + 1))
            assert len(guard.read()) == bad
            assert (guard.lost(lambda samples: [str(each) for each in samples], "the record") is not None) is lost

    def test_a_saved_guard_judges_as_one_that_never_stopped(self) -> None:
        rng = np.random.default_rng(0)
        norms = np.exp(rng.normal(0, 1.2, 600)).tolist()
        whole, _ = self.judge(norms)
        assert 3 < sum(whole) < 100
        for cut in (20, 100, 333):
            first, guard = self.judge(norms[:cut])
            guard.read()
            rest, _ = self.judge(norms[cut:], state=guard.state_dict())
            assert first + rest == whole


class TestPlaces:
    """Where samples lie, checked against the files themselves."""

    @pytest.fixture
    def tokens(self, folder: Path) -> TokenFiles:
        write_corpus(folder)
        directory = folder / "corpus/tokens"
        manifest = json.loads((directory / "manifest.json").read_text())
        (entry,) = manifest["splits"]["train"]
        ids = np.fromfile(directory / "train.bin", "<u2")
        files = []
        for name, part, ends in (("a", ids[:500], [100, 101, 500]), ("b", ids[500:], [300, len(ids) - 500])):
            (directory / f"{name}.bin").write_bytes(part.tobytes())
            (directory / f"{name}.index").write_bytes(np.array(ends, "<u8").tobytes())
            files.append({**entry, "name": f"{name}.bin", "tokens": len(part), "documents": len(ends)})
        manifest["splits"]["train"] = files
        (directory / "manifest.json").write_text(json.dumps(manifest))
        return TokenFiles(directory, "train")

    def test_windows_name_file_tokens_and_documents(self, tokens: TokenFiles) -> None:
        source, where = TokenWindows(tokens, 50), tokens.directory
        assert source.place(0) == f"{where}/a.bin tokens 0 to 50 (document 0)"
        assert source.place(1) == f"{where}/a.bin tokens 50 to 100 (documents 0 to 1)"
        assert (
            source.place(9) == f"{where}/a.bin tokens 450 to 499 (document 2), {where}/b.bin tokens 0 to 0 (document 0)"
        )
        assert source.place(15) == f"{where}/b.bin tokens 250 to 300 (documents 0 to 1)"

    def test_windows_name_the_sources_of_their_documents(self, tokens: TokenFiles) -> None:
        some = {"documents": 5, "tokens": 900, "bytes": 4000}
        source = {"epochs": 1.0, "available": some, "train": some, "val": some}
        path = tokens.directory / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "sources": {"wiki": source}}))
        only = TokenWindows(TokenFiles(tokens.directory, "train"), 50)
        assert only.place(1).endswith("tokens 50 to 100 (documents 0 to 1 of wiki)")

        for file, numbers in zip(manifest["splits"]["train"], ([1, 0, 1], [1, 1])):
            file["sources_sha256"] = "unread"
            (tokens.directory / file["name"]).with_suffix(".sources").write_bytes(np.array(numbers, "<u2").tobytes())
        path.write_text(json.dumps({**manifest, "sources": {"wiki": source, "code": source}}))
        several = TokenWindows(TokenFiles(tokens.directory, "train"), 50)
        assert several.place(0).endswith("tokens 0 to 50 (document 0 of code)")
        assert several.place(1).endswith("tokens 50 to 100 (documents 0 to 1 of wiki and code)")
        assert "(document 2 of code), " in several.place(9)

    def test_packed_windows_name_each_piece(self, tokens: TokenFiles) -> None:
        source = PackedWindows(tokens, 50)
        for index in (0, len(source) // 2, len(source) - 1):
            wanted = [int(target) for target in source.sample(index)[1] if target >= 0]
            found: list[int] = []
            for piece in source.place(index).split(", "):
                name, _, first, _, last, *_ = piece.split()
                found += np.fromfile(name, "<u2")[int(first) : int(last) + 1].tolist()
            assert found == wanted

    def test_examples_name_the_line_they_were_read_from(self) -> None:
        example = Encoded(np.arange(4, dtype=np.int32), np.ones(4, dtype=np.bool_))
        source = ExampleSamples([example, example], 0, 16, ["chat.jsonl:3", "chat.jsonl:9"])
        assert [source.place(0), source.place(1)] == ["chat.jsonl:3", "chat.jsonl:9"]
