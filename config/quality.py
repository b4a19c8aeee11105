"""The typed form of the quality rules and of language identification; what each key means stands in the YAML.

The keys bear the names of datatrove's parameters and reasons, so that published settings can be copied as they are.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from config.section import Fraction, PositiveInt, Section

Share = Annotated[float, Field(ge=0.0)] | None
Number = Annotated[float, Field(ge=0.0)] | None


class LanguageConfig(Section):
    """Which languages are kept (`data.pipeline.language`)."""

    allowed: list[str]
    min_score: Fraction


class GopherRepetitionConfig(Section):
    """Rae et al., 2021, table A1: shares of a text that repeat other parts of it. Null switches a rule off."""

    enabled: bool
    dup_para_frac: Share
    dup_para_char_frac: Share
    dup_line_frac: Share
    dup_line_char_frac: Share
    top_2_gram: Share
    top_3_gram: Share
    top_4_gram: Share
    duplicated_5_n_grams: Share
    duplicated_6_n_grams: Share
    duplicated_7_n_grams: Share
    duplicated_8_n_grams: Share
    duplicated_9_n_grams: Share
    duplicated_10_n_grams: Share


class GopherQualityConfig(Section):
    """Rae et al., 2021, appendix A.1.1: does it look like prose? Null switches a rule off."""

    enabled: bool
    min_doc_words: PositiveInt | None
    max_doc_words: PositiveInt | None
    min_avg_word_length: Number
    max_avg_word_length: Number
    max_symbol_word_ratio: Share
    max_bullet_lines_ratio: Share
    max_ellipsis_lines_ratio: Share
    max_non_alpha_words_ratio: Share
    min_stop_words: PositiveInt | None
    stop_words: list[str]


class C4Config(Section):
    """Raffel et al., 2020, section 2.2: lines that are no prose go, and documents where too little is left."""

    enabled: bool
    remove_citations: bool
    filter_no_terminal_punct: bool
    min_num_sentences: PositiveInt | None
    min_words_per_line: PositiveInt | None
    max_word_length: PositiveInt | None
    filter_lorem_ipsum: bool
    filter_javascript: bool
    filter_curly_bracket: bool
    filter_policy: bool
    bad_words_file: str | None


class FineWebConfig(Section):
    """Penedo et al., 2024, section 3.5: lists and pages of snippets go. Null switches a rule off."""

    enabled: bool
    line_punct_thr: Share
    line_punct_exclude_zero: bool
    short_line_thr: Share
    short_line_length: PositiveInt
    char_duplicates_ratio: Share
    new_line_ratio: Share


class QualityConfig(Section):
    """The published rule sets, in the order in which they are applied."""

    gopher_repetition: GopherRepetitionConfig
    gopher_quality: GopherQualityConfig
    c4: C4Config
    fineweb: FineWebConfig

    @property
    def enabled(self) -> bool:
        """Whether any set is."""
        return any((self.gopher_repetition.enabled, self.gopher_quality.enabled, self.c4.enabled, self.fineweb.enabled))
