"""The account of every document: how many came in, what each rule dropped, how many were kept, per source."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field


class Count(BaseModel):
    """A number of documents and their size as UTF-8."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Count `documents` more, of `size` bytes together."""
        self.documents += documents
        self.bytes += size


class Funnel(BaseModel):
    """What became of the records of one source.

    Each record is either bad (not readable as a document) or read; each document that was read is either dropped by
    exactly one named rule or kept. In bytes: `read = cleaned + trimmed + dropped + kept`, where `cleaned` are the bytes
    that mending took away (negative where it added some) and `trimmed` those of lines that rules took out of documents
    without dropping them; the sizes of dropped and kept documents are what was left of them then.
    """

    model_config = ConfigDict(extra="forbid")

    bad: dict[str, int] = Field(default_factory=dict)
    read: Count = Field(default_factory=Count)
    cleaned: Count = Field(default_factory=Count)
    trimmed: Count = Field(default_factory=Count)
    lines: dict[str, int] = Field(default_factory=dict)
    """Lines taken out of `trimmed` documents, by the rule that did."""
    dropped: dict[str, Count] = Field(default_factory=dict)
    kept: Count = Field(default_factory=Count)

    def drop(self, rule: str, documents: int, size: int) -> None:
        """Count documents that `rule` dropped."""
        if documents:
            self.dropped.setdefault(rule, Count()).add(documents, size)

    def trim(self, documents: int, size: int, lines: dict[str, int]) -> None:
        """Count documents that lost `size` bytes, among them so many lines to each rule."""
        self.trimmed.add(documents, size)
        for rule, number in lines.items():
            if number:
                self.lines[rule] = self.lines.get(rule, 0) + number

    def add(self, other: Funnel) -> None:
        """Count everything that `other` counted."""
        for reason, number in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + number
        for mine, its in ((self.read, other.read), (self.cleaned, other.cleaned), (self.kept, other.kept)):
            mine.add(its.documents, its.bytes)
        self.trim(other.trimmed.documents, other.trimmed.bytes, other.lines)
        for rule, count in other.dropped.items():
            self.drop(rule, count.documents, count.bytes)

    def sort(self) -> None:
        """Bring rules and reasons into an order that does not depend on which one was met first."""
        self.bad, self.lines, self.dropped = (
            dict(sorted(self.bad.items())),
            dict(sorted(self.lines.items())),
            dict(sorted(self.dropped.items())),
        )

    def check(self) -> None:
        """Assert that every document and every byte is accounted for."""
        dropped = Count()
        for count in self.dropped.values():
            dropped.add(count.documents, count.bytes)
        assert self.read.documents == dropped.documents + self.kept.documents, self
        assert self.read.bytes == self.cleaned.bytes + self.trimmed.bytes + dropped.bytes + self.kept.bytes, self


def total(funnels: Iterable[Funnel]) -> Funnel:
    """The sum over several sources or tasks."""
    result = Funnel()
    for funnel in funnels:
        result.add(funnel)
    result.sort()
    return result
