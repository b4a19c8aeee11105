"""What experiments of many runs share: the file that describes one, and runs of scripts/train.py, each once."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from config.errors import UserError
from config.load import load_config, nearest, read_yaml
from config.schema import Config
from training.tracking import METRICS, RESULT

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
_CHOSEN = {"training.adamw", "training.muon", "model.init_std"}  # by `learning_rate: auto`
_FREE = {"training.run_name", "training.runs_dir", "training.checkpoint_dir", "training.wandb", "model.vocab_size"}


def read_experiment(path: Path, required: Iterable[str], optional: Iterable[str]) -> dict[str, Any]:
    """The keys of an experiment's YAML. Raises `UserError` where one is missing, or unknown, with the nearest."""
    required, tree = list(required), read_yaml(path)
    known = [*required, *optional]
    for key in tree:
        if key not in known:
            raise UserError(f"{path}: there is no key {key!r}.{nearest(str(key), known)}")
    for key in required:
        if tree.get(key) in (None, [], {}):
            raise UserError(f"{path}: the key {key!r} is missing or empty.")
    return tree


def settings_of(path: Path, where: str, value: Any) -> list[str]:
    """The mapping `value` of section.key to value as overrides; `where` is its key in the file `path`."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {where} must hold `section.key: value` lines, not {value!r}.")
    return [f"{key}={json.dumps(each)}" for key, each in value.items()]


@dataclass(frozen=True)
class PlannedRun:
    """An ordinary run of scripts/train.py with a name of its own, which is made once and then found.

    Its checkpoints are in its folder. Where it was interrupted, it goes on from the last.
    """

    name: str
    recipe: Path | None
    settings: Sequence[str]
    runs_dir: Path

    @property
    def directory(self) -> Path:
        """Its folder."""
        return self.runs_dir / self.name

    @cached_property
    def config(self) -> Config:
        """Its configuration; `UserError` where its settings make none."""
        return load_config([self.recipe] if self.recipe else [], [*self.settings, *self._own])

    @property
    def _own(self) -> list[str]:
        folder = self.directory / "checkpoints"
        return [
            f"training.run_name={self.name}",
            f"training.runs_dir={self.runs_dir}",
            f"training.checkpoint_dir={folder}",
        ]

    @property
    def result(self) -> dict[str, Any] | None:
        """How it ended; None where it has not."""
        path = self.directory / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        path = self.directory / METRICS
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def require_same(self) -> None:
        """`UserError` where a run of this name has been made with other settings."""
        path = self.directory / "config.yaml"
        if not path.exists():
            return
        then = dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
        now = dict(leaves(self.config.model_dump()))
        free = _FREE | (_CHOSEN if self.config.training.learning_rate == "auto" else set())
        for key in now:
            if then.get(key) != now[key] and not any(key == each or key.startswith(f"{each}.") for each in free):
                raise UserError(
                    f"{self.directory} was made with {key}={then.get(key)}, which is now {now[key]}. "
                    "Give the experiment another name, or delete that folder."
                )

    def start(self, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start it in a process of its own, or let it go on; what it prints goes to `output.txt` in its folder.

        It is asked to save and stop where this process ends before it, however that ends (on Linux).
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        recipe = ["--config", str(self.recipe)] if self.recipe else []
        command = [sys.executable, str(TRAIN), "--resume", "auto", *recipe, *self.settings, *self._own]
        with open(self.directory / "output.txt", "ab") as output:
            return subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def failure(self) -> UserError:
        """What it said last."""
        path = self.directory / "output.txt"
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
        return UserError(f"{self.name} failed; all it said is in {path}. Its last line: {lines[-1] if lines else ''}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def leaves(tree: Mapping[str, Any], where: str = "") -> Iterable[tuple[str, Any]]:
    """The keys of a nested mapping, joined by dots, and their values."""
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, name)
        else:
            yield name, value
