"""A stage that records how often its tasks were called, in a module that workers import quickly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from config.errors import UserError
from data.pipeline.executor import Stage, advance


class Recorder(Stage):
    """Writes a file per task; what it does besides stands in `mischief`."""

    name = "recorder"

    def __init__(self, folder: Path, mischief: str = "") -> None:
        super().__init__()
        self.folder = folder
        self.mischief = mischief

    def work(self, part: int, parts: int) -> None:
        advance(10)
        with open(self.folder / f"{part}.calls", "a") as file:
            file.write("called\n")
        if part == 2 and self.mischief == "dies once" and self.calls(2) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if part == 2 and self.mischief == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if part == 2 and self.mischief == "refuses":
            raise UserError("part 2 is not to be had")

    def calls(self, part: int) -> int:
        return len((self.folder / f"{part}.calls").read_text().splitlines())
