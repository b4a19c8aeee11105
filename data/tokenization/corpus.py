"""The texts that a tokenizer is trained on: documents of all sources, with a few kept back to measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from config.files import location
from data.documents import Document, no_text, read_documents
from data.download import raw_manifest
from data.formats import SPLITTABLE
from data.manifest import RawManifest
from data.tokenization.training import interleave

if TYPE_CHECKING:
    from config.schema import DataConfig

HELD_OUT_ONE_IN = 50
KEPT_CHARACTERS = 2_000_000
ALWAYS_TRAINED = 100
PACKED = {".parquet": 4, ".gz": 3, ".bz2": 4, ".zst": 4}  # bytes of text to expect for each byte on disk
UNKNOWN_BYTES = 100_000_000  # of a streamed file whose publisher does not tell


@dataclass
class Corpus:
    """Counts of the training texts, and the documents kept back: one in fifty, chosen by its id."""

    manifests: dict[str, RawManifest]
    documents: int = 0
    bytes: int = 0
    unreadable: int = 0
    held_out: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    """The beginning of the training texts, to measure on where so few documents came that none was kept back."""
    _room: dict[bool, int] = field(default_factory=lambda: {False: KEPT_CHARACTERS, True: KEPT_CHARACTERS})

    @property
    def expected_documents(self) -> int | None:
        """Documents in all sources together, where they have been counted."""
        counts = [manifest.documents for manifest in self.manifests.values()]
        return None if None in counts else sum(count or 0 for count in counts)

    def keep(self, document: Document) -> bool:
        """Whether `document` is kept back; if so, or if it is among the first, remember its text."""
        early = self.documents < ALWAYS_TRAINED
        held_out = not early and int(document.id[-8:], 16) % HELD_OUT_ONE_IN == 0
        kept = self.held_out if held_out else self.first
        if (held_out or early) and self._room[held_out] > 0:
            self._room[held_out] -= len(document.text)
            kept.append(document.text)
            return held_out
        return False


def open_corpus(data: DataConfig) -> Corpus:
    """The downloaded sources in `data.use`; `UserError` for the first that is missing."""
    return Corpus({name: raw_manifest(name, data) for name in data.use})


def training_texts(corpus: Corpus, data: DataConfig, advance: Callable[[Corpus], None]) -> Iterator[str]:
    """Texts of the sources in use in equal shares, filling in `corpus`; `advance` is called after each document.

    Of a source larger than its share, documents are taken from all over it. The same corpus and configuration give
    the same texts.
    """

    def texts(name: str) -> Iterator[str]:
        share = data.tokenizer.max_training_bytes // len(data.use)
        parts = _parts(corpus.manifests[name], share)
        found, columns = False, tuple[str, ...]()
        for part in range(parts):
            folder = location(data.raw_dir) / name
            for document in read_documents(
                folder, data.sources[name], name, part=part, parts=parts, connections=data.connections_per_host
            ):
                if not isinstance(document, Document):
                    corpus.unreadable += document.count
                    columns = columns or document.columns
                    continue
                found = True
                if corpus.keep(document):
                    continue
                corpus.documents += 1
                corpus.bytes += len(document.text.encode())
                advance(corpus)
                yield document.text
        if columns and not found:
            raise no_text(name, getattr(data.sources[name], "text_column"), columns)

    return interleave([texts(name) for name in data.use])


def _parts(manifest: RawManifest, share: int) -> int:
    """Into how many parts to cut a source so that about one of them, which is spread all over it, is the share.

    Published files that can only be read from their beginning are not cut.
    """
    size = sum((file.bytes or UNKNOWN_BYTES) * PACKED.get(Path(file.path).suffix, 1) for file in manifest.files)
    parts = max(1, -(-size // max(share, 1)))
    lines = manifest.layout == "published" and not all(file.path.endswith(SPLITTABLE) for file in manifest.files)
    return min(parts, len(manifest.files)) if lines else parts
