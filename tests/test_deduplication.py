"""Deduplication through the whole of preprocessing: what is left, on which side of the split, and counted as what."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from config.load import load_config
from config.schema import DataConfig
from data.download import download_source
from data.funnel import total
from data.pipeline.run import preprocess as run_pipeline
from data.sources import Job
from data.tokenization import load_tokenizer
from data.tokens import Split, TokenFiles, TokensManifest
from tests.workspace import small_tokenizer

NEAR = "data.preprocess.near_deduplication={enabled: true, num_buckets: 6, hashes_per_bucket: 4}"  # fewer files
SPLITS: tuple[Split, Split] = ("train", "val")


def make_corpus(folder: Path, sources: dict[str, list[str]]) -> Path:
    """Download these texts as sources and put a tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in sources.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    small_tokenizer().save(folder / "corpus/tokenizer")
    for name in sources:
        download_source(name, data_config(folder, list(sources)), job=Job())
    return folder


def data_config(folder: Path, names: list[str], *settings: str) -> DataConfig:
    """The data section for the sources `names` of `folder`."""
    return load_config(
        [],
        [
            *[f"data.sources.{name}={{kind: files, paths: ['{folder / name}.jsonl']}}" for name in names],
            f"data.use=[{','.join(names)}]",
            f"data.corpus_dir={folder / 'corpus'}",
            "data.preprocess.workers=1",
            "data.preprocess.tasks=2",
            "data.preprocess.validation_fraction=0.05",
            *settings,
        ],
    ).data


def run(folder: Path, *settings: str, names: list[str] | None = None) -> TokensManifest:
    """Preprocess anew in this process."""
    use = names or sorted(path.stem for path in folder.glob("*.jsonl"))
    manifest, _ = run_pipeline(data_config(folder, use, *settings), force=True, show=lambda *_: None)
    return manifest


def texts_of(folder: Path, split: Split) -> list[str]:
    """The documents of a split, decoded, without their end-of-text."""
    files = TokenFiles(folder / "corpus/tokens", split)
    tokenizer = load_tokenizer(folder / "corpus/tokenizer")
    ends = [0, *files.document_ends.tolist()]
    return [tokenizer.decode(files.read(a, b - a - 1).tolist()) for a, b in zip(ends, ends[1:])]


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the token folder."""
    paths = sorted((folder / "corpus/tokens").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def prose(number: int, words: int = 120) -> str:
    """A text of its own for each number."""
    rng = random.Random(number)
    return f"text{chr(97 + number % 26)} " + " ".join(
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(words)
    )


def near_copy(text: str, seed: int) -> str:
    """The text with one of its words changed."""
    words = text.split()
    words[random.Random(seed).randrange(1, len(words))] = "changed"
    return " ".join(words)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: 120 texts, and near-copies and copies of every second one."""
    originals = [prose(number) for number in range(120)]
    copies = [near_copy(text, seed) for seed, text in enumerate(originals[::2])]
    copies += [text.replace(" ", "\n") for text in originals[::3]]
    return make_corpus(tmp_path_factory.mktemp("families"), {"originals": originals, "copies": copies})


class TestNearDuplicates:
    def test_one_of_each_family_is_left_and_every_document_accounted_for(self, families: Path) -> None:
        funnel = total(run(families, NEAR).funnel.values())
        funnel.check()
        dropped = {rule: count.documents for rule, count in funnel.dropped.items()}
        assert funnel.read.documents == 220
        assert dropped == {"exact-duplicate": 40, "near-duplicate": 60}
        assert funnel.kept.documents == 120
        assert "dropped: near-duplicate" in (families / "corpus/tokens/report.md").read_text()

    def test_no_near_copy_stands_on_both_sides(self, families: Path) -> None:
        """Without it they do: the plants are where they would be met."""

        def on_both_sides(fraction: float, *settings: str) -> int:
            run(families, f"data.preprocess.validation_fraction={fraction}", *settings)
            sides = [{text.split()[0] + text.split()[-1] for text in texts_of(families, split)} for split in SPLITS]
            assert all(sides)
            return len(sides[0] & sides[1])

        assert on_both_sides(0.3) > 5
        assert on_both_sides(0.3, NEAR) == 0

    @pytest.mark.parametrize("settings", [("workers=2", "tasks=5"), ("tasks=1", "batch_documents=7")])
    @pytest.mark.slow
    def test_same_bytes_for_any_workers_and_tasks(self, families: Path, settings: tuple[str, ...]) -> None:
        run(families, NEAR)
        expected = checksums(families)
        run(families, NEAR, *[f"data.preprocess.{setting}" for setting in settings])
        assert checksums(families) == expected

    def test_validation_is_never_empty(self, tmp_path: Path) -> None:
        """Not even where all that would have been held out is a near-copy of something else."""
        for seed in range(3):
            folder = tmp_path / str(seed)
            base = prose(1000 + seed)
            copies = [near_copy(base, number) for number in range(60)]
            make_corpus(folder, {"copies": copies, "rest": [prose(seed * 9 + number) for number in range(6)]})
            manifest = run(folder, NEAR, "data.preprocess.validation_fraction=0.2")
            assert manifest.validation == "documents"
            assert 7 <= total(manifest.funnel.values()).kept.documents < 12
            assert manifest.documents("train") >= 1 and manifest.documents("val") >= 1
