"""Batches: documents as Polars frames with the columns `source` (its number), `id` and `text`.

Every rule and every change of text is a function from frame to frame, so that one call handles a thousand documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import polars as pl

from config.files import location
from config.schema import DataConfig
from data.documents import BadRecord, Document, read_documents
from data.funnel import Funnel

BATCH_BYTES = 16 << 20
SCHEMA = {"source": pl.UInt16, "id": pl.String, "text": pl.String}


def read_batches(
    data: DataConfig, part: int, parts: int, reject: Callable[[BadRecord], None], most: int | None = None
) -> Iterator[pl.DataFrame]:
    """Share `part` of `parts` of all sources in `data.use`, in their order; bad records go to `reject`.

    With `most`, only the first so many records of the share of each source. A batch ends with `batch_documents`
    documents or 16 MiB of text, whichever comes first.
    """
    for number, name in enumerate(data.use):
        folder, most_requests = location(data.raw_dir) / name, data.connections_per_host
        records = read_documents(folder, data.sources[name], name, part=part, parts=parts, connections=most_requests)
        yield from _batches(islice(records, most), number, data.preprocess.batch_documents, reject)


def _batches(
    records: Iterable[Document | BadRecord], number: int, limit: int, reject: Callable[[BadRecord], None]
) -> Iterator[pl.DataFrame]:
    ids: list[str] = []
    texts: list[str] = []
    size = 0
    for record in records:
        if isinstance(record, BadRecord):
            reject(record)
            continue
        if not _is_unicode(record.text):
            excerpt = record.text[:200].encode("utf-8", "backslashreplace").decode()
            reject(BadRecord(record.source, record.id, "lone-surrogate", excerpt))
            continue
        ids.append(record.id)
        texts.append(record.text)
        size += len(record.text)
        if len(ids) >= limit or size >= BATCH_BYTES:
            yield _frame(number, ids, texts)
            ids, texts, size = [], [], 0
    if ids:
        yield _frame(number, ids, texts)


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8, which half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _frame(number: int, ids: list[str], texts: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"source": [number] * len(ids), "id": ids, "text": texts}, schema=SCHEMA)


def text_bytes(frame: pl.DataFrame) -> int:
    """Size of all texts of the frame as UTF-8."""
    return int(frame["text"].str.len_bytes().sum())


def count_by(frame: pl.DataFrame, *columns: str) -> list[tuple[int, ...]]:
    """Rows of `columns`' values, documents and bytes, one for each distinct combination, in ascending order."""
    size = pl.col("text").str.len_bytes().cast(pl.Int64).sum().alias("bytes")
    return frame.group_by(*columns).agg(pl.len(), size).sort(*columns).rows()


def count_dropped(funnels: list[Funnel], dropped: pl.DataFrame) -> None:
    """Enter the documents of `dropped`, whose column `rule` says why, into the funnels of their sources."""
    for source, rule, documents, size in count_by(dropped, "source", "rule"):
        funnels[source].drop(str(rule), documents, size)
