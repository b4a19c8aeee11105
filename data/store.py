"""Documents on disk in our own layout: Parquet files with the columns id, text and metadata (JSON)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from config.errors import UserError
from config.files import disk_errors
from data.documents import Document, document_id
from data.manifest import QUARANTINE, RawFile, file_sha256
from data.quarantine import Quarantine

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("metadata", pa.string())])
GROUP_DOCUMENTS = 1000
GROUP_CHARACTERS = 1 << 20
FILE_CHARACTERS = 512 << 20


class DocumentWriter:
    """Writes documents of one source into `folder` as `documents-00000.parquet` and so on, in the order they come.

    Row groups hold at most 1,000 documents or about 1 MiB of text, so that readers share and bound their work by them.
    Bad records go into its `quarantine`, beside them. The bytes depend on the documents alone. A full disk raises
    `UserError`.
    """

    def __init__(
        self, folder: Path, source: str, *, files: Sequence[RawFile] = (), file_characters: int = FILE_CHARACTERS
    ) -> None:
        """`files` are those that an earlier writer finished, which this one goes on from."""
        self.documents = 0
        self.quarantine = Quarantine(folder / QUARANTINE)
        self.files = list(files)
        self._folder = folder
        self._source = source
        self._file_characters = file_characters
        self._group: list[tuple[str, str, str]] = []
        self._group_characters = 0
        self._written_characters = 0
        self._path: Path | None = None
        self._parquet: Any = None

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # What is being written is thrown away, and a full disk would only fail once more.
        with suppress(OSError):
            if self._parquet is not None:
                self._parquet.close()
        with suppress(UserError):
            self.quarantine.close()

    def add(self, position: str, text: str, metadata: dict[str, Any]) -> None:
        """Append one document; its id is made of the source and `position`."""
        self._group.append((document_id(self._source, position), text, orjson.dumps(metadata).decode()))
        self._group_characters += len(text)
        self.documents += 1
        if len(self._group) >= GROUP_DOCUMENTS or self._group_characters >= GROUP_CHARACTERS:
            self._flush()

    def close(self) -> list[RawFile]:
        """Finish the last file; all of them, with their checksums."""
        self._flush()
        self._finish_file()
        self.quarantine.close()
        return self.files

    def _flush(self) -> None:
        if not self._group:
            return
        columns = [list(column) for column in zip(*self._group)]
        with disk_errors(self._folder):
            if self._parquet is None:
                number = len(self.files)
                self._path = self._folder / f"documents-{number:05d}.parquet"
                self._parquet = pq.ParquetWriter(self._path, SCHEMA, compression="zstd", store_schema=False)
            self._parquet.write_table(pa.table(columns, schema=SCHEMA))
        self._written_characters += self._group_characters
        self._group, self._group_characters = [], 0
        if self._written_characters >= self._file_characters:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._parquet is None or self._path is None:
            return
        with disk_errors(self._folder):
            self._parquet.close()
        self._parquet, self._written_characters = None, 0
        rows = pq.read_metadata(self._path).num_rows
        size = self._path.stat().st_size
        self.files.append(RawFile(path=self._path.name, bytes=size, sha256=file_sha256(self._path), documents=rows))


def empty_folder(folder: Path) -> None:
    """Remove what an interrupted run left in `folder`, where that cannot be continued."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_stored(file: IO[bytes], source: str, wanted: Callable[[int], bool]) -> Iterator[Document]:
    """The documents of one file that `DocumentWriter` made; `wanted` chooses its row groups by number."""
    content = pq.ParquetFile(file)
    for group in filter(wanted, range(content.num_row_groups)):
        table = content.read_row_group(group)
        ids, texts, metadata = (table.column(name).to_pylist() for name in SCHEMA.names)
        for key, text, extra in zip(ids, texts, metadata):
            yield Document(key, text, source, orjson.loads(extra))
