"""The mixture: how often the training part holds each source, so that it has the shares of tokens that were asked for.

Pass 0 goes through the documents of all sources once, further passes through those of the sources that are to be
repeated, each in the order of the corpus. Where a source is wanted so many times and a bit, the bit are the documents
whose split hash is lowest: a choice that depends on their content alone. Validation is never mixed or repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from config.deduplication import MixtureConfig
from config.errors import UserError
from data.pipeline.report import SPLITS
from data.pipeline.shards import Passes, chosen, read_table
from data.tokens import SourceTokens, Split, TokenCount

BIN_BITS = 16  # a part of a source is chosen to a 65,536th of it
TOLERANCE = 0.01  # of all tokens


class Asked(NamedTuple):
    """What a configuration comes to for the tokens that there are, per source."""

    epochs: NDArray[np.float64]
    shares: NDArray[np.float64] | None
    """Of the tokens of `train`; None where epochs were asked for."""


def plan_passes(config: MixtureConfig, use: Sequence[str], shards: Sequence[Path]) -> Passes:
    """How often each source in `use` is read; `UserError` where that cannot be had from what there is."""
    if not config.weights and not config.epochs:
        return Passes.once(len(use))
    bins = _tokens_by_hash(shards, len(use))
    tokens = bins.sum(axis=1)
    asked = asked_epochs(config, use, tokens)
    whole, limits, got = [], [], []
    for epochs, row in zip(asked.epochs, bins):
        times = int(epochs)
        sums = np.concatenate([[0], np.cumsum(row)])
        cut = int(np.abs(sums - (epochs - times) * sums[-1]).argmin())
        if sums[-1] and sums[cut] == sums[-1]:
            times, cut = times + 1, 0
        whole.append(times)
        limits.append(cut << (64 - BIN_BITS))
        got.append(times * sums[-1] + sums[cut])
    if not sum(got):
        raise UserError("data.preprocess.mixture leaves no token to train on. Ask for more epochs.")
    if asked.shares is not None:
        _check_shares(np.array(got), asked.shares, use)
    return Passes(tuple(whole), tuple(limits))


def asked_epochs(config: MixtureConfig, use: Sequence[str], tokens: NDArray[Any]) -> Asked:
    """How often each source must be read, `tokens` being what each has for training.

    By weights, the total is `config.tokens`, or just what it takes to use every source whole, or less if a source would
    have to be repeated more than `max_epochs` times. Raises `UserError` for what cannot be.
    """
    if config.epochs:
        return Asked(np.array([config.epochs[name] for name in use]), None)
    weights = np.array([config.weights[name] for name in use])
    shares = weights / weights.sum()
    empty = [name for name, share, there in zip(use, shares, tokens) if share and not there]
    if empty:
        raise UserError(
            f"Source {empty[0]!r} has a weight in data.preprocess.mixture, but nothing of it is left to train on. "
            "Set its weight to 0, or change the rules that dropped it."
        )
    ratios = tokens[shares > 0] / shares[shares > 0]  # the total at which each source is used once
    total = config.tokens or min(ratios.max(), config.max_epochs * ratios.min())
    epochs = np.divide(shares * total, tokens, out=np.zeros(len(use)), where=tokens > 0)
    most = int(epochs.argmax())
    if epochs[most] > config.max_epochs * (1 + 1e-9):
        raise UserError(
            f"A mixture of {total:,} tokens would repeat source {use[most]!r}, which has {int(tokens[most]):,}, "
            f"{epochs[most]:.1f} times. At most {int(config.max_epochs * ratios.min()):,} tokens keep to "
            f"data.preprocess.mixture.max_epochs={config.max_epochs:g}. Lower tokens or its weight, or raise it."
        )
    return Asked(epochs, shares)


def count_sources(shards: Sequence[Path], split: Split, passes: Passes) -> NDArray[np.int64]:
    """Documents, tokens and bytes of each source in a split, repetitions included, shape (sources, 3)."""
    sources = len(passes.whole)
    counts = np.zeros((sources, 3), np.int64)
    for shard in shards:
        table = read_table(shard, split)
        for number in range(passes.number):
            some = table[chosen(table, passes, number)]
            for column, values in enumerate((None, some["tokens"], some["bytes"])):
                counts[:, column] += np.bincount(some["source"], values, minlength=sources).astype(np.int64)
    return counts


def source_tokens(shards: Sequence[Path], passes: Passes) -> list[SourceTokens]:
    """What the token files hold of every source."""
    once = Passes.once(len(passes.whole))
    available, val = (_counts(count_sources(shards, split, once)) for split in SPLITS)
    train = available if passes == once else _counts(count_sources(shards, "train", passes))
    return [
        SourceTokens(
            epochs=round(written.tokens / there.tokens, 4) if there.tokens else 0.0,
            available=there,
            train=written,
            val=held_out,
        )
        for there, written, held_out in zip(available, train, val)
    ]


def _counts(rows: NDArray[np.int64]) -> list[TokenCount]:
    return [TokenCount(documents=row[0], tokens=row[1], bytes=row[2]) for row in rows.tolist()]


def _tokens_by_hash(shards: Sequence[Path], sources: int) -> NDArray[np.int64]:
    """Tokens for training of each source by the first bits of the split hash, shape (sources, 65536)."""
    bins = np.zeros(sources << BIN_BITS, np.int64)
    for shard in shards:
        table = read_table(shard, "train")
        places = table["source"].astype(np.int64) << BIN_BITS | (table["split"] >> np.uint64(64 - BIN_BITS)).astype(int)
        np.add.at(bins, places, table["tokens"].astype(np.int64))
    return bins.reshape(sources, -1)


def _check_shares(tokens: NDArray[Any], shares: NDArray[np.float64], use: Sequence[str]) -> None:
    """`UserError` unless the tokens have the shares asked for, within `TOLERANCE`."""
    off = np.abs(tokens / tokens.sum() - shares)
    worst = int(off.argmax())
    if off[worst] > TOLERANCE:
        raise UserError(
            f"Whole documents cannot give source {use[worst]!r} {shares[worst]:.1%} of the tokens: "
            f"{tokens[worst] / tokens.sum():.1%} is nearest, since its documents are long and few. "
            "Ask for more data.preprocess.mixture.tokens, other weights, or whole epochs."
        )
