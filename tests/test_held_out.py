"""Text to be evaluated on: several files, sources of the configuration, and the figures of each source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import UserError
from data.preprocess import preprocess
from data.tokens import MANIFEST, TokenFiles
from evaluation.perplexity import evaluate_tokens
from scripts.eval import evaluate as eval_command
from tests.hub_server import HubServer, Repo
from tests.workspace import TEXTS, Workspace

EXACT = ["training.precision=fp32", "training.device=cpu"]


def evaluated(name: str = "evaluation.json", **options: Any) -> dict[str, Any]:
    eval_command(overrides=[*EXACT, *options.pop("overrides", [])], **options)
    found: dict[str, Any] = json.loads((Path("checkpoints") / name).read_text())
    return found


def two_sources(folder: Path, *overrides: str) -> list[str]:
    """Token files of two sources that are told apart by their words; the settings that made them."""
    (folder / "mine").mkdir(exist_ok=True)
    for number in range(60):
        text = " ".join(f"{kind}{number} fox {number * 7}" for kind in ["quick"] * 30)
        (folder / f"mine/a{number}.txt").write_text(text)
        (folder / f"mine/b{number}.md").write_text(text.replace("fox", "Deich").replace("quick", "jagen"))
    words = [
        'data.sources={one: {kind: files, paths: ["mine/*.txt"]}, two: {kind: files, paths: ["mine/*.md"]}}',
        "data.use=[one,two]",
        "data.preprocess.validation_fraction=0.3",
        "data.preprocess.exact_deduplication=false",
        "data.tokens_dir=tokens",
        *overrides,
    ]
    from data.download_datasets import download_datasets

    download_datasets(words=words)
    preprocess(overrides=words)
    return words


def test_figures_of_each_source_are_those_of_its_documents(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = two_sources(workspace.folder, "data.preprocess.workers=1", "data.preprocess.max_file_tokens=2000")
    files = TokenFiles(Path("tokens"), "val")
    assert len(files.files) > 1 and files.document_sources is not None
    ends = [0, *files.document_ends.tolist()]
    texts = [workspace.tokenizer.decode(files.read(first, last - first)) for first, last in zip(ends, ends[1:])]
    assert ["Deich" in text for text in texts] == (files.document_sources == 1).tolist()
    capsys.readouterr()
    saved = evaluated(overrides=words, stride=8)
    settings: dict[str, Any] = {"context_length": 32, "stride": 8, "batch_size": 4, "device": "cpu"}
    whole = evaluate_tokens(workspace.model, files, **settings, block_ends=files.document_ends)
    for number, name in enumerate(("one", "two")):
        sums = whole.block_sums[files.document_sources == number].sum(axis=0)
        assert saved["sources"][name]["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
        assert saved["sources"][name]["tokens"] == sums[1]
    assert saved["loss"] == pytest.approx(whole.loss, rel=1e-6)
    table = capsys.readouterr().out
    assert f"{saved['sources']['two']['loss']:.4f}" in table
    assert sum(saved["blocks"]["tokens"]) == saved["tokens"]
    assert sum(saved["blocks"]["loss"]) / saved["tokens"] == pytest.approx(saved["loss"], rel=1e-5)


def test_the_sources_of_documents_are_the_same_bytes_for_any_number_of_tasks(workspace: Workspace) -> None:
    made = {}
    for tasks in (1, 3):
        two_sources(workspace.folder, f"data.preprocess.tasks={tasks}", "data.preprocess.workers=1")
        made[tasks] = {path.name: path.read_bytes() for path in Path("tokens").glob("*.[bis]*")}
        assert {"train.sources", "val.sources", "val.bin"} <= set(made[tasks])
        for path in list(Path("tokens").iterdir()):
            path.unlink()
    assert made[1] == made[3]


def test_a_damaged_file_of_sources_is_refused(workspace: Workspace) -> None:
    words = two_sources(workspace.folder, "data.preprocess.workers=1")
    path = Path("tokens/val.sources")
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match="val.sources is damaged"):
        TokenFiles(Path("tokens"), "val").verify()
    path.write_bytes(b"\0")
    with pytest.raises(UserError, match="val.sources has 1 bytes"):
        evaluated(overrides=words)


def test_a_manifest_without_sources_of_documents_still_serves(workspace: Workspace) -> None:
    words = two_sources(workspace.folder, "data.preprocess.workers=1")
    manifest = json.loads(Path("tokens", MANIFEST).read_text())
    for files in manifest["splits"].values():
        for file in files:
            del file["sources_sha256"]
    Path("tokens", MANIFEST).write_text(json.dumps(manifest))
    assert "sources" not in evaluated(overrides=words)


def test_several_text_files_are_documents_of_their_own(workspace: Workspace) -> None:
    paths = [Path("first.txt"), Path("second.txt")]
    for path, text in zip(paths, TEXTS):
        path.write_text(text)
    saved = evaluated("evaluation-first-second.json", text=paths)
    end = workspace.tokenizer.end_of_text_id
    rows = [[*workspace.tokenizer.encode(text), end] for text in TEXTS[:2]]
    tokens = np.array([end, *rows[0], *rows[1]])
    settings: dict[str, Any] = {"context_length": 32, "stride": 16, "batch_size": 4, "device": "cpu"}
    ends = np.cumsum([1 + len(rows[0]), len(rows[1])])
    wanted = evaluate_tokens(workspace.model, tokens, **settings, block_ends=ends)
    assert saved["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert saved["bytes"] == sum(len(text.encode()) for text in TEXTS[:2])
    for path, sums in zip(paths, wanted.block_sums):
        assert saved["sources"][str(path)]["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_a_source_is_evaluated_on_from_its_beginning_to_a_whole_document(workspace: Workspace) -> None:
    from data.download_datasets import download_datasets

    rows = [{"text": f"number {number} of the quick brown fox"} for number in range(50)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.sources={own: {kind: files, paths: [rows.jsonl]}}", "data.use=[own]"]
    download_datasets(words=words)
    saved = evaluated("evaluation-own.json", source="own", max_tokens=120, overrides=words)
    counts = [len(workspace.tokenizer.encode(row["text"])) + 1 for row in rows]
    taken = int(np.searchsorted(np.cumsum(counts), 120)) + 1
    assert saved["tokens"] == sum(counts[:taken]) < sum(counts)
    assert saved["bytes"] == sum(len(row["text"]) for row in rows[:taken])
    assert saved["text"] == "source own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "sampel"}, "no source 'sampel' under data.sources. Did you mean 'sample'"),
        ({"source": "sample"}, "python data/download_datasets.py sample"),
    ],
)
def test_sources_that_are_not_there_are_refused(workspace: Workspace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        evaluated(**options, overrides=["data.raw_dir=elsewhere"])
    assert message in str(refused.value)


def test_a_data_set_of_the_hub_is_evaluated_on_where_it_is(workspace: Workspace, monkeypatch: Any) -> None:
    rows = [{"text": f"number {number} of the quick brown fox"} for number in range(40)]
    file = "".join(json.dumps(row) + "\n" for row in rows).encode()
    words = ["data.sources={theirs: {kind: hub, repository: some/set, split: test}}", "data.streaming=true"]
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.repos["some/set"] = Repo({"main": {"test.jsonl": file}})
        saved = evaluated("evaluation-theirs.json", source="theirs", max_tokens=10_000, overrides=words)
    assert saved["bytes"] == sum(len(row["text"]) for row in rows)
    assert not list(Path("corpus/raw/theirs").glob("*.jsonl")), "nothing is fetched to stay"


def test_quantized_weights_are_measured_beside_the_checkpoints_own(workspace: Workspace) -> None:
    own = evaluated()
    for kind, error in (("int8", 0.01), ("int4", 0.1)):
        found = evaluated(f"evaluation-{kind}.json", overrides=[f"generation.quantize={kind}"])
        assert found["quantize"] == kind and own["quantize"] == "none"
        assert 0 < abs(found["loss"] - own["loss"]) < error * own["loss"]
    eval_command(overrides=[*EXACT, "generation.quantize=int8"], tasks="quern_copying", limit=5)
    assert json.loads(Path("checkpoints/tasks-int8.json").read_text())["quern_copying"]["quantize"] == "int8"
    assert not Path("checkpoints/tasks.json").exists()
