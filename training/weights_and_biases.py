"""Weights & Biases, beside the local record: it never asks anything, and a run never waits or fails because of it."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from config.schema import Config

PATIENCE = 20.0  # seconds for the server to answer at the start, and to take the rest at the end


class WandbRun:
    """A run at Weights & Biases, resumed where `run_id` is given; nothing at all where `mode` is off.

    Any failure of the service is one warning, and the end of it for this run.
    """

    def __init__(self, config: Config, directory: Path, run_id: str | None, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: Any = None
        self.id: str | None = None
        mode = _mode(config.training.wandb.mode, warn)
        if mode == "off":
            return
        self.id = run_id or secrets.token_hex(4)
        try:
            import wandb

            settings = wandb.Settings(
                silent=True,
                console="off",
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
            )
            self._run = wandb.init(
                project=config.training.wandb.project,
                id=self.id,
                name=directory.name,
                dir=directory,
                mode=mode,
                resume="allow" if mode == "online" else None,
                config=config.model_dump(),
                settings=settings,
            )
            self._run.define_metric("*", step_metric="step")
            if mode == "offline":
                warn(f"Weights & Biases: offline; to send it later: wandb sync {directory}/wandb/offline-run-*")
        except Exception as error:
            self._give_up(error)

    def log(self, values: dict[str, Any]) -> None:
        """Send named values; a curve's horizontal axis is `step`, so a resumed run may go over a step again."""
        if self._run is not None:
            try:
                self._run.log(values)
            except Exception as error:
                self._give_up(error)

    def finish(self) -> None:
        """Hand over what is left, for at most `PATIENCE` seconds."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)
            self._run = None

    def _give_up(self, error: Exception) -> None:
        self._warn(f"warning: Weights & Biases failed and is left out: {' '.join(str(error).split())[:200]}")
        self._run = None


def _mode(wanted: str, warn: Callable[[str], None]) -> Literal["online", "offline", "off"]:
    """`online`, `offline` or `off`; online only where someone has logged in and the server can be reached."""
    if wanted == "auto":
        by_environment = os.environ.get("WANDB_MODE")
        wanted = "off" if by_environment == "disabled" else "online" if _logged_in() else "offline"
        wanted = "offline" if by_environment == "offline" else wanted
    if wanted == "off":
        return "off"
    if wanted == "online" and not _logged_in():
        warn("warning: Weights & Biases: nobody is logged in (wandb login); the run is kept offline.")
    elif wanted == "online" and not _reachable():
        warn(f"warning: Weights & Biases: {_server()} does not answer; the run is kept offline.")
    elif wanted == "online":
        return "online"
    return "offline"


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(_server()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable() -> bool:
    address = urlsplit(_server())
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3.0):
            return True
    except OSError:
        return False
