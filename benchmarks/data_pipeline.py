"""The whole way from jsonl.zst to token files, beside datatrove's own pipeline: megabytes of text per core-second.

    python -m venv ../datatrove && ../datatrove/bin/pip install "datatrove[io,processing]" tokenizers "xxhash<3.6"
    python -m benchmarks.data_pipeline --datatrove ../datatrove/bin/python --megabytes 200

Read, clean, the rules of Gopher, C4 and FineWeb, exact and near-duplicates, tokenize, write. The limits of the rules
stand where nothing is dropped, so every document goes through every step, which is the most there is to do. Ours reads
all documents and starts its command anew in each round; datatrove, as it ships (spaCy's words) and with a regular
expression for words, reads a part of them. What runs takes turns; reported are medians of core-seconds of whole
processes, their start included.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.package_text import package_texts
from config.command import run

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4000  # characters
RECIPE = """
data:
  use: [pages]
  corpus_dir: {folder}/corpus
  sources:
    pages: {{kind: files, paths: ["{folder}/pages/*.jsonl.zst"], streaming: true}}
  tokenizer: {{vocab_size: 32768, max_training_bytes: 20000000}}
  preprocess:
    workers: 1
    tasks: 4
    filter: {{min_characters: 1}}
    quality:
      gopher_repetition:
        enabled: true
        {repetition}
      gopher_quality: {{enabled: true, min_doc_words: 1, min_avg_word_length: 0, max_avg_word_length: 1000000,
        max_symbol_word_ratio: 1000000, max_bullet_lines_ratio: 1, max_ellipsis_lines_ratio: 1,
        max_non_alpha_words_ratio: 0, min_stop_words: null}}
      c4: {{enabled: true, filter_no_terminal_punct: false, min_num_sentences: 1, filter_lorem_ipsum: false,
        filter_curly_bracket: false}}
      fineweb: {{enabled: true, line_punct_thr: 0, short_line_thr: 1, char_duplicates_ratio: 1,
        new_line_ratio: 1000000}}
    near_deduplication: {{enabled: true}}
"""
REPETITION = {
    **{name: 1 for name in ("dup_para_frac", "dup_para_char_frac", "dup_line_frac", "dup_line_char_frac")},
    **{f"top_{n}_gram": 9 for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": 9 for n in range(5, 11)},
}
Megabytes = Annotated[float, typer.Option(help="Text that our pipeline reads.", min=1)]
Theirs = Annotated[float, typer.Option(help="Text of it that datatrove reads; it is slow.", min=0.1)]
Rounds = Annotated[int, typer.Option(help="Runs of each.", min=1)]
Python = Annotated[Path | None, typer.Option(help="The Python of an environment with datatrove[processing].")]


def benchmark(megabytes: Megabytes = 200, theirs: Theirs = 4, rounds: Rounds = 3, datatrove: Python = None) -> None:
    """Measure the pipelines side by side."""
    texts = package_texts(megabytes * 1e6, page=PAGE)
    few = texts[:: max(1, int(megabytes / theirs))]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _write(texts, folder / "pages", files=4)
        few_size = _write(few, folder / "few", files=1)
        print(f"{len(texts):,} documents, {size / 1e6:.1f} MB; datatrove reads {len(few):,}, {few_size / 1e6:.1f} MB")
        recipe = folder / "recipe.yaml"
        repetition = "\n        ".join(f"{key}: {value}" for key, value in REPETITION.items())
        recipe.write_text(RECIPE.format(folder=folder, repetition=repetition), encoding="utf-8")
        _seconds([sys.executable, str(ROOT / "data/tokenizer.py"), "--config", str(recipe)])
        ours = [sys.executable, str(ROOT / "data/preprocess.py"), "--config", str(recipe), "--force"]
        _seconds(ours)  # compiles
        for number in range(rounds):
            rates.setdefault("Quern", []).append(size / 1e6 / _seconds(ours))
            for kind, flags in (("datatrove", []), ("datatrove, words by a regular expression", ["--regex-words"])):
                if datatrove is None:
                    continue
                work = folder / f"{number}-{len(flags)}"
                source = folder / "few" / "0.jsonl.zst"
                tokenizer = folder / "corpus/tokenizer/tokenizer.json"
                words = [str(ROOT / "benchmarks/datatrove_pipeline.py"), str(source), str(work), str(tokenizer), *flags]
                rates.setdefault(kind, []).append(few_size / 1e6 / _seconds([str(datatrove), *words]))
        manifest = json.loads((folder / "corpus/tokens/manifest.json").read_text(encoding="utf-8"))
        funnel = manifest["funnel"]["pages"]
        print(f"kept {funnel['kept']['documents']:,}; dropped {json.dumps(funnel['dropped'])}")
    for kind, values in rates.items():
        ratio = statistics.median(rates["Quern"]) / statistics.median(values)
        print(
            f"{kind:<45} {statistics.median(values):8.3f} MB per core-second"
            f"   ({min(values):.3f} to {max(values):.3f}), 1/{ratio:.1f} of ours"
        )


def _write(texts: list[str], folder: Path, files: int) -> int:
    """Write the texts as jsonl.zst; their size in UTF-8 bytes."""
    import zstandard

    folder.mkdir()
    for number in range(files):
        lines = [json.dumps({"text": text, "id": str(at)}) for at, text in enumerate(texts[number::files])]
        data = zstandard.ZstdCompressor(level=3).compress(("\n".join(lines) + "\n").encode())
        (folder / f"{number}.jsonl.zst").write_bytes(data)
    return sum(len(text.encode()) for text in texts)


def _seconds(command: list[str]) -> float:
    """Core-seconds of the command and all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the command."""
    run(benchmark)


if __name__ == "__main__":
    main()
