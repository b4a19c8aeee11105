"""datatrove's own pipeline for the work of `benchmarks/data_pipeline.py`, which runs this. No import of the project.

    python -m benchmarks.datatrove_pipeline DOCUMENTS.jsonl.zst WORK-FOLDER TOKENIZER.json [--regex-words]

One task after the other in this process: read, the four rule sets, MinHash in its four stages, tokenize, write. Limits
stand where nothing is dropped, so that every document goes through every step. `--regex-words` puts a regular
expression in the place of spaCy.
"""

from __future__ import annotations

import re
import sys
from typing import Any


def main(documents: str, work: str, tokenizer: str, *flags: str) -> None:
    """Run the pipeline."""
    import datatrove.utils.word_tokenizers as word_tokenizers
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    if "--regex-words" in flags:
        setattr(word_tokenizers, "load_word_tokenizer", lambda language: _RegexWords())
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=8, n_grams=5)
    folder, name = documents.rpartition("/")[::2]
    steps: list[list[Any]] = [
        [
            JsonlReader(folder, glob_pattern=name, compression="zstd"),
            GopherRepetitionFilter(
                dup_line_frac=1,
                dup_para_frac=1,
                dup_line_char_frac=1,
                dup_para_char_frac=1,
                top_n_grams=((2, 9), (3, 9), (4, 9)),
                dup_n_grams=tuple((n, 9) for n in range(5, 11)),
            ),
            GopherQualityFilter(
                min_doc_words=1,
                min_avg_word_length=0,
                max_avg_word_length=10**6,
                max_symbol_word_ratio=10**6,
                max_bullet_lines_ratio=1,
                max_ellipsis_lines_ratio=1,
                max_non_alpha_words_ratio=0,
                min_stop_words=None,
            ),
            C4QualityFilter(
                filter_no_terminal_punct=False,
                min_num_sentences=1,
                filter_lorem_ipsum=False,
                filter_curly_bracket=False,
            ),
            FineWebQualityFilter(line_punct_thr=0, short_line_thr=1, char_duplicates_ratio=1, new_line_ratio=10**6),
            JsonlWriter(f"{work}/filtered", compression="zstd"),
        ],
        [JsonlReader(f"{work}/filtered"), MinhashDedupSignature(f"{work}/signatures", config=config)],
        [MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)],
        [MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config)],
        [
            JsonlReader(f"{work}/filtered"),
            MinhashDedupFilter(f"{work}/remove"),
            DocumentTokenizer(f"{work}/tokens", tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", seed=1),
        ],
    ]
    for number, pipeline in enumerate(steps):
        tasks = 14 if number == 2 else 1
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/logs/{number}").run()


class _RegexWords:
    """The interface of datatrove's word tokenizers on a regular expression."""

    pattern = re.compile(r"\w+|[^\w\s]+")
    sentence = re.compile(r"[^.!?]+[.!?]*")

    def word_tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return self.sentence.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self.sentence.finditer(text)]


if __name__ == "__main__":
    main(*sys.argv[1:])
