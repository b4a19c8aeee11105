"""The typed form of `data.sources`: one class per kind; what each key means stands in the YAML and in the docs.

A user may add any number of sources, so their keys have defaults here, unlike those of all other sections.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from config.section import PositiveInt, Section

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def byte_count(value: Any) -> Any:
    """`5GB`, `1.5 MB` or `64MiB` as a number of bytes; what is no text is left to the type to judge."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", value.upper())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{value!r} is no size; write one such as 500MB, 5GB or 1.5TB")
    return int(float(found[1]) * UNITS[found[2]])


def date_word(value: Any) -> Any:
    """A date such as 20240301, which YAML reads as a number."""
    return str(value) if isinstance(value, int) else value


CONVERSATIONS = ("messages", "chosen")
"""Text columns of sets that are no plain text but conversations, or answers to prefer, for fine-tuning."""

Bytes = Annotated[PositiveInt, BeforeValidator(byte_count)]
"""A number of bytes, which may be written as `5GB`."""


class About(Section):
    """What a person wants to know before fetching a source. Nothing is computed from it."""

    licence: str | None = None
    size: str | None = None
    home: str | None = None


class SourceSection(Section):
    """What every kind of source has."""

    about: About = About()


class PublishedSection(SourceSection):
    """What every kind has whose files are listed by their publisher: they can be fetched, in part, or streamed."""

    max_bytes: Bytes | None = None
    streaming: bool | None = None


class RowsSection(PublishedSection):
    """What the kinds have whose files are tables of rows."""

    text_column: str = "text"
    keep_column: str | None = None
    keep: list[str] | None = None
    max_documents: PositiveInt | None = None

    @model_validator(mode="after")
    def _combinations(self) -> RowsSection:
        if self.keep is not None and self.keep_column is None:
            raise ValueError("keep: needs keep_column, the column whose values these are")
        return self


class SampleSourceConfig(SourceSection):
    """The built-in corpus: the running interpreter's standard library and language reference."""

    kind: Literal["sample"]


class FilesSourceConfig(RowsSection):
    """The user's own files, here or at an address of any file system that fsspec knows."""

    kind: Literal["files"]
    paths: list[str]
    max_document_bytes: PositiveInt = 1_000_000


class UrlsSourceConfig(RowsSection):
    """Files at plain http(s) addresses."""

    kind: Literal["urls"]
    urls: list[str]
    max_document_bytes: PositiveInt = 1_000_000


class HubSourceConfig(RowsSection):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    repository: str
    subset: str | None = None
    split: str = "train"
    revision: str = "main"


class CommonCrawlSourceConfig(PublishedSection):
    """Files of one crawl of Common Crawl."""

    kind: Literal["common-crawl"]
    crawl: Annotated[str, Field(pattern=r"^CC-MAIN-\d{4}-\d{2}$")]
    format: Literal["wet", "warc"] = "wet"
    files: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    base_url: str = "https://data.commoncrawl.org"

    @model_validator(mode="after")
    def _combinations(self) -> CommonCrawlSourceConfig:
        if self.files is not None and self.fraction is not None:
            raise ValueError("files: set files or fraction, and the other one to null; both null means all files")
        return self


class WikipediaSourceConfig(PublishedSection):
    """The articles of one Wikipedia."""

    kind: Literal["wikipedia"]
    format: Literal["parquet", "dump"] = "parquet"
    language: Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")] = "en"
    date: Annotated[str, BeforeValidator(date_word), Field(pattern=r"^\d{8}$")] | None = None
    base_url: str = "https://dumps.wikimedia.org"


SourceConfig = Annotated[
    SampleSourceConfig
    | FilesSourceConfig
    | UrlsSourceConfig
    | HubSourceConfig
    | CommonCrawlSourceConfig
    | WikipediaSourceConfig,
    Field(discriminator="kind"),
]
