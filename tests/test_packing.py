"""Windows that begin with a document: nothing lost, nothing cut that fits, little left empty."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from data.data_loader import DataLoader
from data.packing import PackedWindows, best_fit_decreasing
from data.tokens import TokenFiles
from tests.commands import here
from tests.small_runs import SMALL, TRAIN, metrics, write_corpus
from tests.test_data_loader import write_tokens

CONTEXT = 8
END = 0  # the end-of-text id of these files


def packed(folder: Path, lengths: list[list[int]]) -> PackedWindows:
    write_tokens(folder, lengths)
    return PackedWindows(TokenFiles(folder, "train"), CONTEXT, with_documents=True)


def by_definition(sizes: list[int], capacity: int) -> list[int]:
    """The room that best-fit decreasing leaves in each bin, item by item, ascending."""
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in left if room >= size]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else capacity) - size)
    return sorted(left)


class TestBestFit:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
    def test_leaves_the_room_that_its_definition_leaves(self, case: tuple[int, list[int]]) -> None:
        capacity, sizes = case
        bins = best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity)
        filled = np.bincount(bins, weights=sizes).astype(int) if sizes else np.zeros(0, dtype=int)
        assert sorted((capacity - filled).tolist()) == by_definition(sizes, capacity)

    def test_text_of_ordinary_lengths_leaves_next_to_nothing(self) -> None:
        lengths = np.random.default_rng(0).lognormal(6.0, 1.2, 50_000).astype(np.int64) % 1024 + 1
        bins = best_fit_decreasing(lengths, 1024)
        assert 1 - lengths.sum() / (1024 * (bins.max() + 1)) < 0.002


class TestPackedWindows:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=3))
    def test_every_token_is_a_target_once_and_no_document_is_cut_that_fits(self, lengths: list[list[int]]) -> None:
        with TemporaryDirectory() as folder:
            windows = packed(Path(folder), lengths)
            tokens, flat = windows.tokens.read(0, len(windows.tokens)).tolist(), sum(lengths, [])
            begins = np.cumsum([0, *flat]).tolist()
            pieces: dict[int, list[list[tuple[int, int]]]] = {document: [] for document in range(len(flat))}
            for index in range(len(windows)):
                inputs, targets, documents = windows.sample(index)  # type: ignore[misc]
                assert inputs.shape == targets.shape == documents.shape == (CONTEXT,)
                for document, group in groupby(
                    zip(documents.tolist(), inputs.tolist(), targets.tolist()), lambda x: x[0]
                ):
                    pairs = [(given, wanted) for _, given, wanted in group]
                    if document == 2**31 - 1:
                        assert all(wanted == -100 for _, wanted in pairs)
                    else:
                        pieces[document].append(pairs)
            for document, length in enumerate(flat):
                text = tokens[begins[document] : begins[document + 1]]
                # In the order of the windows: those that it fills, then what is left of it.
                assert [wanted for piece in pieces[document] for _, wanted in piece] == text
                assert [given for piece in pieces[document] for given, _ in piece] == [END, *text[:-1]]
                assert len(pieces[document]) == -(-length // CONTEXT)
            shares = len(tokens) / (CONTEXT * len(windows))
            assert windows.padding == pytest.approx(1 - shares)

    def test_the_order_is_a_permutation_that_resumes_and_knows_no_ranks(self, tmp_path: Path) -> None:
        windows = packed(tmp_path, [[5, 30, 2, 7, 3, 3, 12], [1, 8, 9]])
        with DataLoader(windows, batch_size=4, seed=3) as loader:
            expected = [next(loader) for _ in range(6)]
        with DataLoader(windows, batch_size=4, seed=3, cursor=8) as resumed:
            assert torch.equal(next(resumed).inputs, expected[2].inputs)
        with DataLoader(windows, batch_size=4, seed=3, rank=1, world_size=2) as second:
            for batch in expected:
                share = next(second)
                assert share.documents is not None and batch.documents is not None
                assert torch.equal(share.documents, batch.documents[2:])
                assert torch.equal(share.targets, batch.targets[2:])

    def test_damaged_or_empty_files(self, tmp_path: Path) -> None:
        windows = packed(tmp_path, [[5, 3]])
        data = bytearray((tmp_path / "train.bin").read_bytes())
        data[0:2] = (60_000).to_bytes(2, "little")
        (tmp_path / "train.bin").write_bytes(data)
        with pytest.raises(UserError, match="hold id 60000, the vocabulary ends at 499"):
            windows.sample(0)
        write_tokens(tmp_path / "none", [[]])
        with pytest.raises(UserError, match="is empty"):
            PackedWindows(TokenFiles(tmp_path / "none", "train"), CONTEXT)


@pytest.mark.slow
def test_the_command_trains_on_packed_and_masked_documents(tmp_path: Path) -> None:
    write_corpus(tmp_path, ends=[30, 530, 537, 582])
    settings = [*SMALL, "data.loader.packing=best_fit", "training.documents=masked", "training.run_name=packed"]
    done = here(tmp_path, TRAIN, *settings)
    assert done.stdout.startswith("5 documents packed into ") and "padding is 0." in done.stdout
    rows = metrics(tmp_path / "runs/packed")
    assert rows[-1]["loss"] < rows[0]["loss"]
