"""Running a run again: whether what it started from is still the same, and whether the outcome is, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from config.errors import UserError
from config.files import write_text
from config.load import load_config
from config.schema import Config
from model.devices import choose_device
from training.environment import describe
from training.experiment import leaves
from training.precision import Precision
from training.tracking import ENVIRONMENT, METRICS, RESULT

# What of a row of metrics.jsonl does not depend on the clock or on the load of the machine.
EXACT = ("tokens", "loss", "validation_loss", "task_accuracy", "learning_rate", "gradient_norm", "skipped_steps")
# What of environment.json is the code, and what else may change the bits.
CODE = {"git_commit": "commit", "git_diff_sha256": "changes since the commit (SHA-256)"}
SURROUNDINGS = ("python", "platform", "cpu", "gpus", "cuda", "device", "precision", "processes", "threads")
ELSEWHERE = {"run_name", "runs_dir", "checkpoint_dir", "wandb"}  # settings that no weight depends on


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights of `model`, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_result(directory: Path, step: int, validation_loss: float | None, weights: str | None) -> None:
    """Note how a complete run ended; `weights` is their hash, None where no process holds them all."""
    result = {"step": step, "validation_loss": validation_loss, "weights_sha256": weights}
    write_text(directory / RESULT, json.dumps(result, indent=2) + "\n")


def environment_of(config: Config) -> dict[str, Any]:
    """What a run of `config` here and now would note of its surroundings."""
    device = choose_device(config.training.device)
    return {**describe(), "device": device.type, "precision": Precision(config.training.precision, device).name}


@dataclass(frozen=True, slots=True)
class Original:
    """The run to be repeated, as its folder tells of it; `result` is empty where it never came to its end."""

    directory: Path
    settings: dict[str, Any]
    starts: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def last_start(self) -> dict[str, Any]:
        """The environment of its last start."""
        return self.starts[-1]

    def config(self, overrides: Iterable[str]) -> Config:
        """Its configuration, as a run of another name, with checkpoints of its own, and `overrides`."""
        name = f"{self.directory.name}-again"
        place = self.directory.parent
        number = 1
        while (place / (again := name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        own = [f"training.run_name={again}", f"training.runs_dir={place}"]
        own += [f"training.checkpoint_dir={place / again / 'checkpoints'}"]
        return load_config([], [*own, *overrides], saved=(str(self.directory / "config.yaml"), self.settings))

    def require_same_data(self, tokenizer_fingerprint: str, data_fingerprint: str | None) -> None:
        """`UserError` unless the token files there are now are those that the run was trained on."""
        for what, key, now in (
            ("with another tokenizer", "tokenizer_fingerprint", tokenizer_fingerprint),
            ("on other token files", "data_fingerprint", data_fingerprint),
        ):
            before = self.last_start[key]
            if before != now:
                raise UserError(
                    f"{self.directory} was trained {what} (fingerprint {str(before)[:12]}, now {str(now)[:12]}), so it "
                    "cannot be repeated. Put them back, or set data.tokens_dir to where they are."
                )

    def changes(self, config: Config, environment: dict[str, Any]) -> list[str]:
        """What is no longer as it was, one sentence each: settings, the code, versions and the machine."""
        before = load_config(saved=(str(self.directory / "config.yaml"), self.settings))
        old, new = (dict(leaves(each.model_dump())) for each in (before, config))
        both = [(key, old.get(key), new.get(key)) for key in {**old, **new}]
        found = [
            f"{key} was {was}, is {now}"
            for key, was, now in both
            if was != now and not (key.startswith("training.") and key.split(".")[1] in ELSEWHERE)
        ]
        then = self.last_start
        if then["git_commit"] is None or environment["git_commit"] is None:
            found.append("whether the code is the same cannot be told, because it did not or does not lie in a clone")
        else:
            found += _changed(then, environment, CODE)
        found += _changed(then, environment, {key: key for key in SURROUNDINGS})
        found += _changed(then["versions"], environment["versions"], {k: k for k in then["versions"] if k != "quern"})
        return found

    def compare(self, directory: Path) -> tuple[bool, str]:
        """Whether the run in `directory` came to the same bits, and a sentence that says so, or where they part."""
        again = open_original(directory)
        weights, others = self.result.get("weights_sha256"), again.result.get("weights_sha256")
        parted, compared = self._first_difference(again)
        if weights is not None and others is not None and self.result["step"] == again.result["step"]:
            same = weights == others and parted is None
            told = f"the weights after {again.result['step']:,} steps are "
            told += (
                f"the same (SHA-256 {weights[:12]})" if weights == others else f"others ({weights[:12]}, {others[:12]})"
            )
        else:
            same = False
            told = "the last weights cannot be compared: " + (
                "no process held all of them" if self.result and again.result else f"{self.directory} is not complete"
            )
        if parted is None:
            told += (
                f"; so is every figure of {compared:,} rows of {METRICS}"
                if same
                else (f"; {METRICS} is the same in all {compared:,} rows that both have")
            )
        else:
            told += f"; {METRICS} first differs at {parted}"
        verdict = "bit-identical" if same else "not bit-identical" if parted or weights else "not complete"
        return same, f"{directory} against {self.directory}: {verdict}: {told}."

    def _first_difference(self, again: Original) -> tuple[str | None, int]:
        """The first step whose rows differ, with the figures, and how many rows were compared.

        A run that was interrupted logs at other steps, and its losses are means over others, so of such a run only
        what was evaluated counts.
        """
        keys = EXACT if len(self.starts) == len(again.starts) == 1 else ("validation_loss",)
        mine = {row["step"]: row for row in self.rows}
        pairs = [(mine[row["step"]], row) for row in again.rows if row["step"] in mine]
        for before, now in pairs:
            for key in keys:
                if before.get(key) != now.get(key):
                    return f"step {now['step']:,}: {key} was {before.get(key)}, is {now.get(key)}", len(pairs)
        return None, len(pairs)


def open_original(directory: Path) -> Original:
    """Read what the run in `directory` tells of itself.

    Raises `UserError` where it is no run, one of fine-tuning, or of a version that did not note its data.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is not the folder of a run. Runs are made by python scripts/train.py.")
    starts = _read(directory / ENVIRONMENT, [])
    if not starts or "data_fingerprint" not in starts[-1]:
        raise UserError(f"{directory} does not tell which data it was trained on, so it cannot be repeated.")
    if starts[-1]["finetuned"]:
        raise UserError(f"{directory} is a run of scripts/finetune.py; only those of scripts/train.py can be repeated.")
    lines = (directory / METRICS).read_text(encoding="utf-8").splitlines() if (directory / METRICS).exists() else []
    return Original(
        directory=directory,
        settings=yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")),
        starts=starts,
        rows=[json.loads(line) for line in lines],
        result=_read(directory / RESULT, {}),
    )


def _read(path: Path, empty: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


def _changed(then: dict[str, Any], now: dict[str, Any], names: dict[str, str]) -> list[str]:
    return [
        f"{name} was {then.get(key)}, is {now.get(key)}" for key, name in names.items() if then.get(key) != now.get(key)
    ]
