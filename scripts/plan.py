"""What a large run would take, before it is begun."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, command_line, resolve, run, size_of, table_console

if TYPE_CHECKING:
    from config.schema import DataConfig, PreprocessConfig
    from data.pipeline.calibration import Measured

TASK_SECONDS = 600  # long enough that starting does not count, short enough that one more is no loss
TASKS_PER_CORE = 4
MOST_FILES = 100_000_000  # that one run should open

Size = Annotated[
    list[str], typer.Option("--size", help="Text to preprocess, uncompressed; may be given several times.")
]
Cores = Annotated[int, typer.Option("--cores", help="Cores of the machine or cluster.", min=1)]
Sample = Annotated[str, typer.Option("--sample", help="Text of the downloaded sources to measure with.")]
Speed = Annotated[
    float | None,
    typer.Option("--speed", metavar="MB/S", help="Take this speed of a core, not the measured one.", min=0),
]

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[WORD=VALUE]...", help="Such as model=modern-1b gpus=64 gpu=h100 tokens=20B."),
]


def data(
    overrides: Overrides = None,
    sizes: Size = ["1TB", "100TB"],
    cores: Cores = 64,
    sample: Sample = "200MB",
    speed: Speed = None,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Say what preprocessing so much text would take: core-hours, hours, memory, disk.

    It preprocesses a sample of the downloaded sources with your settings on one core, and multiplies. Needs
    data/download_datasets.py and data/tokenizer.py to have run.
    """
    config = resolve(recipe, overrides, print_config)
    bytes_of = [size_of("--size", size) for size in sizes]
    sample_bytes = size_of("--sample", sample)
    from data.listing import check_names
    from data.pipeline.calibration import calibrate

    check_names(config.data.use, config.data)
    measured = calibrate(config.data, sample_bytes)
    if speed:
        measured = measured._replace(bytes_per_second=speed * 1e6)
    _print(measured, bytes_of, cores, config.data.preprocess, given=bool(speed))
    print(f"Next: {_next_command(recipe, overrides or [], config.data, measured, bytes_of[0], cores)}")


def tasks_for(size: int, cores: int, bytes_per_second: float) -> int:
    """Parts that the work is cut into: of about ten minutes each, and several for every core."""
    return max(TASKS_PER_CORE * cores, math.ceil(size / bytes_per_second / TASK_SECONDS))


def intermediate_reads(measured: Measured, size: int, cores: int, settings: PreprocessConfig) -> tuple[int, int]:
    """What a run over `size` bytes reads of its intermediate files: bytes, and files opened."""
    from data.pipeline.traffic import Corpus, reads

    corpus = Corpus(
        bytes=size,
        documents=round(measured.documents * size),
        stored=measured.runs,
        tokens=round(measured.tokens * size),
        tasks=tasks_for(size, cores, measured.bytes_per_second),
    )
    stages = reads(corpus, settings).values()
    return round(sum(stage.bytes for stage in stages)), sum(stage.files for stage in stages)


def sensible_size(measured: Measured, size: int, cores: int, settings: PreprocessConfig) -> int:
    """`size`, or if one run over it would open more than `MOST_FILES`, the size of several that do not."""
    runs = 1
    while intermediate_reads(measured, size // runs, cores, settings)[1] > MOST_FILES:
        runs += 1
    return size // runs


def rows(measured: Measured, size: int, cores: int, settings: PreprocessConfig) -> list[tuple[str, str]]:
    """What a run over `size` bytes takes, line by line."""
    from data.listing import format_bytes

    seconds = size / measured.bytes_per_second
    disk = {
        "raw data": measured.raw * size,
        "intermediate files": measured.intermediate * size,
        "token files": measured.tokens * size,
    }
    read, opened = intermediate_reads(measured, size, cores, settings)
    return [
        ("core-hours", _figure(seconds / 3600)),
        (f"hours on {cores:,} cores", _figure(seconds / 3600 / cores)),
        (f"memory of {cores:,} workers", format_bytes(cores * measured.worker_memory)),
        *[(name, format_bytes(round(count))) for name, count in disk.items()],
        ("disk in all", format_bytes(round(sum(disk.values())))),
        ("read from intermediate files", format_bytes(read)),
        ("... which are opened so often", f"{opened:,}"),
        ("data.preprocess.tasks", f"{tasks_for(size, cores, measured.bytes_per_second):,}"),
    ]


def _print(measured: Measured, sizes: list[int], cores: int, settings: PreprocessConfig, given: bool) -> None:
    from rich.table import Table

    from data.listing import format_bytes
    from data.pipeline.runs import RUN_BYTES

    sample = format_bytes(measured.sample_bytes)
    print(
        f"{'Given' if given else f'Measured here on {sample} of your sources'}: "
        f"{measured.bytes_per_second / 1e6:.1f} MB per core-second. "
        f"Measured on {sample}: memory of a worker, {format_bytes(measured.worker_memory)} at its peak."
    )
    table = Table("text")
    columns = [rows(measured, size, cores, settings) for size in sizes]
    for size in sizes:
        table.add_column(format_bytes(size), justify="right")
    for lines in zip(*columns):
        table.add_row(lines[0][0], *[value for _, value in lines])
    table_console().print(table)
    print("Raw data is counted as Parquet. Hours assume that all cores are as fast as this one, and disks keep up.")
    for size in sizes:
        part = sensible_size(measured, size, cores, settings)
        if part < size:
            print(
                f"Not in one run: {format_bytes(size)}, which would open more than {MOST_FILES:,} files. "
                f"Preprocess it in {math.ceil(size / part):,} runs of {format_bytes(part)}, by crawl for instance."
            )
    if measured.sample_bytes < 2 * RUN_BYTES:
        print(f"So small a sample does not show the memory of a worker, which holds up to {format_bytes(RUN_BYTES)}.")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _next_command(
    recipe: Recipe, overrides: list[str], data: DataConfig, measured: Measured, size: int, cores: int
) -> str:
    """Preprocessing with the settings that this command was given, cut as it proposes for the first size."""
    more = [f"data.preprocess.tasks={tasks_for(size, cores, measured.bytes_per_second)}"]
    if any(override.startswith("data.preprocess.tasks=") for override in overrides):
        more = []
    return command_line("data/preprocess.py", recipe, overrides, *more)


def training(words: Words = None, recipe: Recipe = None, print_config: PrintConfig = False) -> None:
    """Say what a training run would take: parameters, FLOPs, time, memory of a GPU, size of a checkpoint.

    Example: python scripts/plan.py training model=modern-1b gpus=64 tokens=20B gpu=h100

    Words are model, gpus, gpu, tokens, and mfu, the share of the GPU's peak that training reaches (0.4 where it is not
    said), besides settings such as training.batch_size=512. Without tokens, training.max_steps says how long it is.
    """
    from config.command import show
    from training.forecast import print_forecast, read_question

    question = read_question(words or [], [recipe] if recipe else [])
    show(question.config, print_config)
    print_forecast(question)


def main() -> None:
    """Run the command."""
    run({"data": data, "training": training})


if __name__ == "__main__":
    main()
