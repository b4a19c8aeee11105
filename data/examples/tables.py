"""Rows of Parquet files, to be read as examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from config.errors import UserError
from data.examples.columns import Columns
from data.formats.rows import Fault

SUFFIX = ".parquet"
BATCH_ROWS = 1000
BUFFER_BYTES = 1 << 20
SPLITS = ("train", "validation", "valid", "val", "test", "dev")


def is_table(path: Path) -> bool:
    """Whether `path` is a Parquet file, or a folder to look for some in."""
    return path.name.endswith(SUFFIX) or path.is_dir()


def table_files(path: Path) -> list[Path]:
    """`path` itself, or the Parquet files below the folder that it is, in the order of their names.

    Raises `UserError` where there is none, or where their names tell of several splits: a test set is not to be trained
    on by mistake.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"There is no file {path}. Name a file of examples with --dataset.")
    files = sorted(path.rglob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"{path} holds no Parquet files, and is no downloaded set: there are no examples in it.")
    names = [(file.parent.name, file.name) for file in files]
    splits = [split for split in SPLITS if any(_tells(name, split) for both in names for name in both)]
    if len(splits) > 1:
        raise UserError(
            f"The Parquet files in {path} are of several splits ({', '.join(splits)}). Name one file with --dataset, "
            "or a folder that holds those of one split alone."
        )
    return files


def _tells(name: str, split: str) -> bool:
    return name == split or name.startswith((f"{split}-", f"{split}_", f"{split}."))


def table_rows(file: IO[bytes], columns: Columns) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Number, from 0, and the needed columns of every row, without those that are null.

    A row that is not UTF-8 is a fault, and so is the first one that cannot be read, which ends the file.
    """
    import pyarrow.parquet as pq

    from data.formats.parquet import UNREADABLE

    number = 0
    try:
        content = pq.ParquetFile(file, buffer_size=BUFFER_BYTES)
        names = content.schema_arrow.names
        columns.meet(names)
        needed = [name for name in names if name in columns.needed]
        for batch in content.iter_batches(BATCH_ROWS, columns=needed, use_threads=False):
            for row in _values(batch):
                yield number, row if isinstance(row, dict) else Fault(number, "invalid-utf8", row)
                number += 1
    except UNREADABLE as error:
        yield number, Fault(number, "corrupt", str(error).splitlines()[0])


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; what is wrong with one in its place."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                rows = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield f"text that is not valid UTF-8 at byte {error.start + 1}"
            else:
                yield _present(rows[0])
        return
    yield from map(_present, rows)


def _present(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
