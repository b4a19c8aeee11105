"""Text to be evaluated on, whatever it comes from: one row of tokens, where its documents end, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config.errors import UserError
from config.files import local, location
from config.schema import DataConfig
from data.tokens import TokenFiles, check_tokens
from evaluation.bootstrap import FEWEST_BLOCKS
from evaluation.perplexity import ArrayTokens, Evaluation, TokenReader, summarize

if TYPE_CHECKING:
    from data.tokenization import Tokenizer


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`document_ends` `(documents,)`, ascending, after each end-of-text token; None where the text is one piece.

    `origins` `(documents,)` numbers each document's source among `sources`; None where there is only one.
    """

    name: str
    tokens: TokenReader
    document_ends: np.ndarray | None = None
    origins: np.ndarray | None = None
    sources: Sequence[str] = ()

    def block_ends(self, context_length: int) -> np.ndarray | None:
        """Ends of the blocks that intervals are drawn from: documents, or where these are few, parts of them."""
        ends = self.document_ends
        if ends is None or len(ends) >= FEWEST_BLOCKS:
            return ends
        return np.union1d(ends, np.arange(context_length, len(self.tokens), context_length) + 1)

    def by_source(self, found: Evaluation, context_length: int) -> Mapping[str, Evaluation]:
        """The figures of each source alone, where there are several, from those of the whole."""
        ends = self.block_ends(context_length)
        if self.origins is None or ends is None or self.document_ends is None:
            return {}
        document = np.searchsorted(self.document_ends, ends[: len(found.block_sums)], side="left")
        origin = self.origins[document]
        parts = {name: found.block_sums[origin == number] for number, name in enumerate(self.sources)}
        return {name: summarize(sums) for name, sums in parts.items() if sums[:, 1].sum()}


def validation_split(data: DataConfig, tokenizer: Tokenizer) -> HeldOut:
    """The validation tokens; `UserError` where there are none, or they were made by another tokenizer."""
    files = TokenFiles(local(data.tokens_dir, "data.tokens_dir"), "val")
    check_tokens(files.manifest, tokenizer.fingerprint, tokenizer.vocab_size)
    if len(files) < 2:
        raise UserError(
            f"{data.tokens_dir} holds no validation text. Preprocess with a higher "
            "data.preprocess.validation_fraction, or evaluate on a file with --text."
        )
    origins = files.document_sources if len(files.manifest.sources) > 1 else None
    name = str(Path(data.tokens_dir) / "val.bin")
    return HeldOut(name, files, files.document_ends, origins, tuple(files.manifest.sources))


def text_files(paths: Sequence[Path], tokenizer: Tokenizer) -> HeldOut:
    """UTF-8 text files, each a document and a source, after one end-of-text token so that the first one is scored too.

    Raises `UserError` where a file is missing, empty or not UTF-8.
    """
    texts = [_read(path) for path in paths]
    if len(paths) == 1:
        ids = np.array([*_first(tokenizer), *tokenizer.encode(texts[0])], dtype=np.int64)
        return HeldOut(str(paths[0]), ArrayTokens(ids))
    tokens, ends = _joined(texts, tokenizer)
    return HeldOut(
        name=", ".join(map(str, paths)),
        tokens=tokens,
        document_ends=ends,
        origins=np.arange(len(paths)),
        sources=tuple(map(str, paths)),
    )


def source_documents(name: str, data: DataConfig, tokenizer: Tokenizer, max_tokens: int) -> HeldOut:
    """The first documents of the source `name` of `data.sources`, up to `max_tokens` tokens and a whole document.

    A source that streams is read where it is published. Raises `UserError` where it is not there, or has no text.
    """
    from data.documents import Document, no_text, read_documents
    from data.download import raw_manifest
    from data.listing import check_names

    check_names([name], data)
    raw_manifest(name, data)
    source = data.sources[name]
    texts: list[str] = []
    columns: set[str] = set()
    count = 0
    for record in read_documents(location(data.raw_dir) / name, source, name, connections=data.connections_per_host):
        if not isinstance(record, Document):
            columns.update(record.columns)
            continue
        texts.append(record.text)
        count += len(tokenizer.encode(record.text)) + 1
        if count >= max_tokens:
            break
    if not texts:
        raise no_text(name, getattr(source, "text_column", "text"), sorted(columns))
    tokens, ends = _joined(texts, tokenizer)
    return HeldOut(f"source {name}", tokens, ends)


def _first(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.prefix_ids) or [tokenizer.end_of_text_id]


def _joined(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[ArrayTokens, np.ndarray]:
    """End-of-text, and every text followed by end-of-text; and where each text ends in that."""
    end = tokenizer.end_of_text_id
    rows = [np.array(_first(tokenizer), dtype=np.int64)]
    rows += [np.append(ids.astype(np.int64), end) for ids in tokenizer.encode_batch(texts)]
    ends = np.cumsum([len(row) for row in rows])
    return ArrayTokens(np.concatenate(rows)), ends[1:]


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} is not a file that can be read. Give --text the path of a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start:,}). Save it as UTF-8, as iconv -f ENCODING -t UTF-8 does."
        ) from error
    if not text:
        raise UserError(f"{path} is empty. Give --text a file with text in it.")
    return text
