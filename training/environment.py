"""The machine a run happens on. Imports nothing heavy: some of it must be settled before PyTorch is loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPORTED = ("torch", "numpy", "tokenizers", "wandb", "quern")


def keep_freed_memory() -> None:
    """Let the C allocator keep the memory of freed tensors for the next ones, on Linux; do it before training on a CPU.

    By default glibc gives every large block back to the system and fetches it anew a moment later, page by page: in a
    step of the demo that was 10,000 page faults and a sixth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 32 * 2**20)  # the largest that glibc accepts
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)


def describe() -> dict[str, Any]:
    """Versions, code and hardware, for `environment.json`."""
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name in REPORTED if (found := _version(name))},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "git_diff_sha256": _git_diff(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "memory_bytes": _memory(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says about the project's own folder; None without git or outside a clone."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_diff() -> str | None:
    """SHA-256 of what differs from the commit in files that git knows; None where nothing does, or without git."""
    command = ["git", "diff", "--binary", "--no-ext-diff", "HEAD", "--", ":/"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return hashlib.sha256(done.stdout).hexdigest() if done.stdout else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
