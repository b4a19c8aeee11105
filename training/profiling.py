"""Where the time and the memory of a step go: PyTorch's profiler over a few steps of a real run.

trace.json      every operator and kernel on a time line, for chrome://tracing or ui.perfetto.dev
operators.txt   the ten operators that take the most time of their own
memory.png      memory allocated by tensors over those steps
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from config.files import atomic_write, write_text

PROFILE = "profile"
SKIPPED, WARM_UP, RECORDED = 4, 1, 3  # steps: compiling and filling caches is not what a step costs
MOST = 10
DEVICES = {0: "CPU", 1: "GPU"}


class Profile:
    """Watches the first steps of a process and writes what it saw to `folder`; `step` is to be called after each."""

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._say, self._left = folder, say, SKIPPED + WARM_UP + RECORDED
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profile.start()

    def step(self) -> None:
        """A step has been taken."""
        if self._left > 0:
            self._left -= 1
            self._profile.step()
            if not self._left:
                self._profile.stop()

    def close(self) -> None:
        """End it, where the run was too short to see enough."""
        if self._left > 0:
            self._left = 0
            self._profile.stop()
            self._say(f"--profile saw nothing: it needs {SKIPPED + WARM_UP + RECORDED} steps.")

    def _write(self, seen: profile) -> None:
        if self._left:
            return
        trace, table = self._folder / "trace.json", self._folder / "operators.txt"
        seen.export_chrome_trace(str(trace))
        text = costliest(seen.key_averages(), self._on_gpu)
        write_text(table, text)
        draw_memory(json.loads(trace.read_text(encoding="utf-8", errors="replace")), self._folder / "memory.png")
        self._say(f"{text}Profile of {RECORDED} steps: {trace} (open it at ui.perfetto.dev), {table.name}, memory.png")


def costliest(averages: Any, on_gpu: bool) -> str:
    """The ten operators with the most time of their own (on the GPU where there is one), as lines of a table."""
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = [each for each in averages if not each.key.startswith(("ProfilerStep", "Optimizer."))]
    whole = sum(getattr(each, attribute) for each in operators) or 1.0
    operators.sort(key=lambda each: -getattr(each, attribute))
    lines = [f"{'operator':<56}{'calls':>8}{'ms a step':>11}{'share':>8}"]
    for each in operators[:MOST]:
        own = getattr(each, attribute)
        milliseconds = own / 1000 / RECORDED
        lines.append(f"{each.key[:55]:<56}{each.count // RECORDED:>8,}{milliseconds:>11.2f}{own / whole:>8.1%}")
    return "\n".join(lines) + "\n"


def draw_memory(trace: dict[str, Any], path: Path) -> None:
    """Draw the bytes allocated on each device over time, from the events of a Chrome trace, into the PNG `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("name") == "[memory]":
            told = event["args"]
            device = DEVICES.get(told["Device Type"], f"device type {told['Device Type']}")
            curves[device].append((event["ts"] / 1000, told["Total Allocated"] / 2**20))
    figure = Figure(figsize=(9, 4), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    begin = min((points[0][0] for points in curves.values()), default=0.0)
    for device, points in curves.items():
        points.sort()
        axes.step([time - begin for time, _ in points], [size for _, size in points], where="post", label=device)
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("MiB allocated by tensors since the start")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")
