"""Rules that drop documents. A rule has a name, under which the funnel counts it, and a Polars expression."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from config.schema import FilterConfig


class Rule(NamedTuple):
    """`drop` is true for the documents that the rule `name` drops."""

    name: str
    drop: pl.Expr


def length_rules(config: FilterConfig) -> list[Rule]:
    """Nothing but white space; fewer or more characters than the configuration allows."""
    characters = pl.col("text").str.len_chars()
    return [
        Rule("blank", pl.col("text").str.strip_chars() == ""),
        Rule("too-short", characters < config.min_characters),
        Rule("too-long", characters > config.max_characters),
    ]


def apply_rules(frame: pl.DataFrame, rules: list[Rule]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The documents that no rule drops, and the others with the name of the first rule that does in column `rule`."""
    names = [pl.when(rule.drop).then(pl.lit(rule.name)) for rule in rules]
    judged = frame.with_columns(pl.coalesce(names).alias("rule"))
    return judged.filter(pl.col("rule").is_null()).drop("rule"), judged.filter(pl.col("rule").is_not_null())
