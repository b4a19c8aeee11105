"""The commands of Slurm, as far as preprocessing uses them, on this machine alone: jobs are processes, two at a time.

`install(folder)` puts `sbatch`, `squeue`, `scancel` and `srun` there. State lies in `folder/jobs/<number>/`: the script
as submitted, the name, and the process group of the array. A job's script runs as Slurm would run it, by its
`#SBATCH` lines and with the variables of an array job.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "srun")
AT_ONCE = 2


def install(folder: Path) -> Path:
    """Make the commands; the folder to put on the path."""
    for name in COMMANDS:
        path = folder / name
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {folder} {name} "$@"\n')
        path.chmod(0o755)
    return folder


def jobs(folder: Path) -> list[Path]:
    """The folders of all submitted arrays, in order."""
    return sorted((folder / "jobs").glob("*"), key=lambda job: int(job.name))


def directives(job: Path) -> dict[str, str]:
    """The `#SBATCH` lines of an array's script."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (job / "script").read_text(), re.M))


def running(job: Path) -> bool:
    """Whether the array's processes are there."""
    try:
        os.killpg(int((job / "group").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def cancel(folder: Path, name: str = "") -> None:
    """End all arrays of that name, or all."""
    for job in jobs(folder):
        if running(job) and name in ("", directives(job)["job-name"]):
            os.killpg(int((job / "group").read_text()), signal.SIGKILL)


def _sbatch(folder: Path, arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print("slurm 24.05.0")
        return
    script = Path(arguments[-1]).read_text()
    if "--partition=nowhere" in script:
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    job = folder / "jobs" / str(1000 + len(jobs(folder)))
    job.mkdir(parents=True)
    (job / "script").write_text(script)
    (export,) = [argument for argument in arguments if argument.startswith("--export=ALL,")]
    name, _, value = export.removeprefix("--export=ALL,").partition("=")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder), "array", job.name],
        env={**os.environ, name: value},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (job / "group").write_text(str(process.pid))
    print(f"Submitted batch job {job.name}")


def _array(folder: Path, number: str) -> None:
    """What the cluster does with an array: its jobs, two at a time."""
    job = folder / "jobs" / number
    options = directives(job)
    last = int(options["array"].partition("%")[0].partition("-")[2])

    def one(index: int) -> None:
        log = options["output"].replace("%A", number).replace("%a", str(index))
        with open(log, "wb") as output:
            environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": number}
            subprocess.run(["bash", job / "script"], env=environment, stdout=output, stderr=output)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, range(last + 1)))


def _main(folder: Path, command: str, arguments: list[str]) -> None:
    if command == "sbatch":
        _sbatch(folder, arguments)
    elif command == "array":
        _array(folder, arguments[0])
    elif command == "squeue":
        wanted = arguments[arguments.index("--name") + 1]
        print("\n".join(job.name for job in jobs(folder) if directives(job)["job-name"] == wanted and running(job)))
    elif command == "scancel":
        cancel(folder, arguments[arguments.index("--name") + 1])
    elif command == "srun":
        while arguments[0].startswith("-"):
            del arguments[: 2 if arguments[0] == "-n" else 1]
        os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
