"""The order of the data, the token files and the loader."""

from __future__ import annotations

import gc
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from config.errors import UserError
from data.data_loader import Batch, DataLoader, TokenWindows
from data.permutation import permute
from data.tokens import TokenFiles, check_tokens, load_tokens_manifest, token_dtype
from tests.token_files import write_token_files

CONTEXT = 8


def write_tokens(folder: Path, lengths: list[list[int]], vocab_size: int = 500) -> NDArray[Any]:
    """Token files of documents with these lengths, one list per file, as `train`; returns all their tokens."""
    rng, dtype = np.random.default_rng(0), token_dtype(vocab_size)
    files = [
        (rng.integers(0, vocab_size, sum(part)).astype(dtype), np.cumsum(part).tolist(), 4 * sum(part))
        for part in lengths
    ]
    write_token_files(folder, {"train": files}, vocab_size=vocab_size)
    return np.concatenate([tokens for tokens, *_ in files])


@pytest.fixture
def windows(tmp_path: Path) -> TokenWindows:
    """Thirty-seven windows over three files."""
    write_tokens(tmp_path, [[50, 30], [11], [100, 99, 11]])
    return TokenWindows(TokenFiles(tmp_path, "train"), CONTEXT)


def take(loader: DataLoader, batches: int) -> list[Batch]:
    return [next(loader) for _ in range(batches)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for a, b in zip(left, right, strict=True)
        for x, y in zip(a, b, strict=True)
    )


class TestPermutation:
    @given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 100))
    @settings(max_examples=60, deadline=None)
    def test_is_a_bijection_for_any_length(self, length: int, seed: int, epoch: int) -> None:
        order = permute(np.arange(length), length, seed, epoch)
        assert sorted(order.tolist()) == list(range(length))

    @given(st.integers(1, 2**50), st.integers(0, 1000), st.data())
    @settings(max_examples=60, deadline=None)
    def test_one_index_is_the_array_at_that_index(self, length: int, seed: int, data: st.DataObject) -> None:
        indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20))
        together = permute(np.array(indices), length, seed, 3)
        assert [permute(index, length, seed, 3) for index in indices] == together.tolist()

    def test_seed_and_epoch_change_the_order(self) -> None:
        orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
        assert len(orders) == 25

    def test_looks_random(self) -> None:
        """Displacements, neighbours and where the first index goes are as a random permutation has them."""
        length = 20_000
        order = permute(np.arange(length), length, 1337, 0)
        assert abs(np.corrcoef(np.arange(length), order)[0, 1]) < 0.03
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
        assert (np.abs(np.diff(order)) == 1).sum() < 12  # two are expected
        first = np.bincount([permute(0, 10, seed, 0) for seed in range(2000)], minlength=10)
        assert ((first - 200) ** 2 / 200).sum() < 33.7  # chi-square with 9 degrees of freedom, p = 0.0001

    def test_refuses_an_index_outside(self) -> None:
        for index in (-1, 10):
            with pytest.raises(IndexError):
                permute(index, 10, 0, 0)

    def test_order_never_changes_between_versions(self) -> None:
        """A checkpoint stores only the cursor, so another order after an upgrade would silently repeat data."""
        assert permute(np.arange(10), 10, 1337, 0).tolist() == [6, 4, 0, 5, 7, 8, 9, 2, 3, 1]
        assert permute(123_456_789, 10**12, 7, 3) == 98_026_540_012


class TestTokenFiles:
    def test_reads_across_files(self, tmp_path: Path) -> None:
        tokens = write_tokens(tmp_path, [[50, 30], [11], [100, 99, 11]])
        files = TokenFiles(tmp_path, "train")
        assert len(files) == len(tokens) == 301
        for start, count in [(0, 301), (79, 2), (80, 11), (70, 40), (300, 1), (91, 0), (301, 0)]:
            assert np.array_equal(files.read(start, count), tokens[start : start + count])
        assert files.read(0, 5).dtype == np.uint16
        assert files.document_ends.tolist() == [50, 80, 91, 191, 290, 301]
        with pytest.raises(IndexError):
            files.read(300, 2)

    def test_wide_vocabulary_is_stored_in_32_bits(self, tmp_path: Path) -> None:
        tokens = write_tokens(tmp_path, [[40]], vocab_size=70_000)
        assert np.array_equal(TokenFiles(tmp_path, "train").read(0, 40), tokens)
        assert tokens.dtype == np.uint32
        assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")

    def test_missing_tokens_say_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="Run python data/preprocess.py"):
            TokenFiles(tmp_path / "nowhere", "train")

    def test_damaged_manifest(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[40]])
        (tmp_path / "manifest.json").write_text('{"format": 1, "dty')
        with pytest.raises(UserError, match="damaged or of another version"):
            load_tokens_manifest(tmp_path)

    def test_file_cut_short(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[40]])
        data = (tmp_path / "train.bin").read_bytes()
        (tmp_path / "train.bin").write_bytes(data[:-2])
        with pytest.raises(UserError, match="train.bin has 78 bytes, but the manifest says 80"):
            TokenFiles(tmp_path, "train")
        (tmp_path / "train.bin").unlink()
        with pytest.raises(UserError, match="train.bin is missing"):
            TokenFiles(tmp_path, "train")

    def test_checksum_finds_a_changed_byte(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[40]])
        TokenFiles(tmp_path, "train").verify()
        data = bytearray((tmp_path / "train.bin").read_bytes())
        data[10] ^= 1
        (tmp_path / "train.bin").write_bytes(data)
        with pytest.raises(UserError, match="SHA-256"):
            TokenFiles(tmp_path, "train").verify()

    def test_id_outside_the_vocabulary(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[40]])
        data = bytearray((tmp_path / "train.bin").read_bytes())
        data[0:2] = (60_000).to_bytes(2, "little")
        (tmp_path / "train.bin").write_bytes(data)
        with pytest.raises(UserError, match="hold id 60000, the vocabulary ends at 499"):
            TokenWindows(TokenFiles(tmp_path, "train"), CONTEXT).sample(0)

    def test_tokenizer_that_does_not_match(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[40]])
        manifest = load_tokens_manifest(tmp_path)
        check_tokens(manifest, "a" * 64, 500)
        with pytest.raises(UserError, match="another tokenizer"):
            check_tokens(manifest, "b" * 64, 500)
        with pytest.raises(UserError, match="tokenizer of 500 tokens, this one has 600"):
            check_tokens(manifest, "a" * 64, 600)


class TestTokenWindows:
    def test_every_token_but_the_first_is_a_target_once(self, windows: TokenWindows) -> None:
        samples = [windows.sample(index) for index in range(len(windows))]
        tokens = windows.tokens.read(0, len(windows) * CONTEXT + 1)
        assert len(windows) == 37
        assert np.array_equal(np.concatenate([sample[0] for sample in samples]), tokens[:-1])
        assert np.array_equal(np.concatenate([sample[1] for sample in samples]), tokens[1:])

    def test_documents_are_those_of_the_index(self, tmp_path: Path) -> None:
        """Whatever the tokens say: here any of them may be the end-of-text id."""
        lengths = [[3, 1, 1, 30, 8], [11], [5, 9, 11]]
        write_tokens(tmp_path, lengths)
        files = TokenFiles(tmp_path, "train")
        windows = TokenWindows(files, CONTEXT, with_documents=True)
        found = np.concatenate([windows.sample(index)[2] for index in range(len(windows))])  # type: ignore[misc]
        expected = np.repeat(np.arange(9), [length for file in lengths for length in file])
        assert found.dtype == np.int32
        assert np.array_equal(found, expected[: len(found)])
        plain = TokenWindows(files, CONTEXT)
        assert all(np.array_equal(windows.sample(i)[0], plain.sample(i)[0]) for i in range(len(plain)))

    def test_split_shorter_than_a_window(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[CONTEXT]])
        with pytest.raises(UserError, match="fewer than one window of 9"):
            TokenWindows(TokenFiles(tmp_path, "train"), CONTEXT)

    def test_split_of_exactly_one_window(self, tmp_path: Path) -> None:
        write_tokens(tmp_path, [[CONTEXT + 1]])
        assert len(TokenWindows(TokenFiles(tmp_path, "train"), CONTEXT)) == 1


class TestDataLoader:
    def test_an_epoch_shows_every_window_once_and_rolls_into_the_next(self, windows: TokenWindows) -> None:
        first_tokens = {tuple(windows.sample(index)[0].tolist()): index for index in range(37)}
        with DataLoader(windows, batch_size=5, seed=1) as loader:
            rows = [tuple(row.tolist()) for batch in take(loader, 15) for row in batch.inputs]
        seen = [first_tokens[row] for row in rows]
        assert sorted(seen[:37]) == sorted(seen[37:74]) == list(range(37))
        assert seen[:37] != seen[37:74]

    def test_batches_are_inputs_and_targets_moved_by_one(self, windows: TokenWindows) -> None:
        with DataLoader(windows, batch_size=4, seed=1) as loader:
            batch = next(loader)
        assert batch.inputs.shape == batch.targets.shape == (4, CONTEXT)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])

    @given(st.integers(0, 30), st.integers(1, 12), st.integers(1, 5))
    @settings(max_examples=25, deadline=None)
    def test_resuming_from_the_cursor_continues(self, taken: int, batch_size: int, prefetch: int) -> None:
        source = Numbers(23)
        with DataLoader(source, batch_size=batch_size, seed=3, prefetch_batches=prefetch) as loader:
            take(loader, taken)
            cursor = loader.cursor
            expected = take(loader, 5)
        assert cursor == taken * batch_size
        with DataLoader(source, batch_size=batch_size, seed=3, cursor=cursor) as resumed:
            assert same(take(resumed, 5), expected)

    def test_order_does_not_depend_on_the_number_of_ranks(self, windows: TokenWindows) -> None:
        with DataLoader(windows, batch_size=12, seed=9) as alone:
            expected = take(alone, 10)
        for world_size in (2, 3, 4):
            shares = []
            for rank in range(world_size):
                with DataLoader(windows, batch_size=12, seed=9, rank=rank, world_size=world_size) as loader:
                    shares.append(take(loader, 10))
                    assert loader.cursor == 120
            joined = [
                Batch(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))
                for parts in zip(*shares)
            ]
            assert same(joined, expected)

    def test_order_does_not_depend_on_the_batch_size(self, windows: TokenWindows) -> None:
        with DataLoader(windows, batch_size=6, seed=9) as small, DataLoader(windows, batch_size=12, seed=9) as large:
            halves = take(small, 20)
            wholes = take(large, 10)
        assert torch.equal(torch.cat([b.inputs for b in halves]), torch.cat([b.inputs for b in wholes]))

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 11))
    @settings(max_examples=25, deadline=None)
    def test_order_and_cursor_are_exact_for_batches_of_any_sizes(
        self, sizes: list[int], world_size: int, taken: int
    ) -> None:
        source, sizes, taken = Numbers(23), [size * world_size for size in sizes], min(taken, len(sizes) - 1)
        with DataLoader(source, batch_size=sum(sizes), seed=3) as whole:
            expected = torch.split(next(whole).inputs, sizes)
        for rank in range(world_size):
            options = {"batch_size": 9 * world_size, "seed": 3, "rank": rank, "world_size": world_size}
            for begin in (0, taken):
                cursor, coming = sum(sizes[:begin]), itertools.chain(sizes[begin:], itertools.repeat(world_size))
                with DataLoader(source, cursor=cursor, sizes=coming, **options) as loader:  # type: ignore[arg-type]
                    for wanted in expected[begin:]:
                        assert torch.equal(next(loader).inputs, wanted.chunk(world_size)[rank])
                        cursor += len(wanted)
                        assert loader.cursor == cursor

    def test_a_batch_may_exceed_an_epoch(self) -> None:
        with DataLoader(Numbers(3), batch_size=10, seed=0) as loader:
            rows = next(loader).inputs[:, 0].tolist()
        assert sorted(rows[:3]) == sorted(rows[3:6]) == sorted(rows[6:9]) == [0, 1, 2]

    def test_batches_have_documents_where_the_source_tells(self, tmp_path: Path, windows: TokenWindows) -> None:
        told = TokenWindows(windows.tokens, CONTEXT, with_documents=True)
        with DataLoader(told, batch_size=4, seed=1) as loader, DataLoader(windows, batch_size=4, seed=1) as plain:
            batch, without = next(loader), next(plain)
        assert without.documents is None and batch.documents is not None
        assert batch.documents.shape == (4, CONTEXT) and batch.documents.dtype == torch.int32
        assert torch.equal(batch.inputs, without.inputs)
        rows = {tuple(told.sample(index)[0].tolist()): told.sample(index) for index in range(len(told))}
        for inputs, documents in zip(batch.inputs, batch.documents):
            assert rows[tuple(inputs.tolist())][2].tolist() == documents.tolist()  # type: ignore[misc]

    def test_micro_batches_cut_every_part_alike(self) -> None:
        numbers = torch.arange(4 * 8).view(4, 8)
        cpu = torch.device("cpu")
        first, second = Batch(numbers, numbers + 1, (numbers // 5).int()).micro_batches(2, 4, cpu)
        assert first.inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
        assert torch.equal(second.targets, second.inputs + 1)
        assert second.documents is not None and torch.equal(second.documents, (second.inputs // 5).int())
        assert all(part.documents is None for part in Batch(numbers, numbers).micro_batches(2, 8, cpu))

    def test_masked_targets_arrive_as_they_are(self) -> None:
        with DataLoader(Numbers(3), batch_size=2, seed=0) as loader:
            assert (next(loader).targets[:, 0] == -100).all()

    def test_batch_that_ranks_cannot_share(self) -> None:
        with pytest.raises(UserError, match="cannot be shared by 3 devices"):
            DataLoader(Numbers(3), batch_size=10, seed=0, world_size=3)

    def test_error_of_the_source_reaches_the_caller(self) -> None:
        loader = DataLoader(Numbers(10, broken_at=4), batch_size=10, seed=0)
        with pytest.raises(UserError, match="sample 4 is broken"):
            next(loader)
        assert_no_thread()

    def test_the_thread_ends_with_its_owner(self) -> None:
        loader = DataLoader(Numbers(10), batch_size=2, seed=0, prefetch_batches=1)
        next(loader)
        assert any(thread.name == "data-loader" for thread in threading.enumerate())
        loader.close()
        assert_no_thread()
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)

        forgotten = DataLoader(Numbers(10), batch_size=2, seed=0, prefetch_batches=1)
        next(forgotten)
        del forgotten
        gc.collect()
        assert_no_thread()

    def test_it_works_ahead_but_not_further_than_asked(self) -> None:
        source = Numbers(100)
        with DataLoader(source, batch_size=1, seed=0, prefetch_batches=3) as loader:
            next(loader)
            assert source.asked.wait_for(5)  # one taken, three queued, one in the thread's hands
            assert source.asked.count == 5


class Numbers:
    """`length` samples that hold their own number; the first target of each is masked."""

    def __init__(self, length: int, broken_at: int | None = None) -> None:
        self.length = length
        self.broken_at = broken_at
        self.asked = Counter()

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        self.asked.increment()
        if index == self.broken_at:
            raise UserError(f"sample {index} is broken")
        return np.full(4, index), np.array([-100, index, index, index])


class Counter:
    """A count that another thread can wait for."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = threading.Condition()

    def increment(self) -> None:
        with self.changed:
            self.count += 1
            self.changed.notify_all()

    def wait_for(self, count: int) -> bool:
        """Whether the count reached this number, and stayed there for a moment."""
        with self.changed:
            reached = self.changed.wait_for(lambda: self.count >= count, timeout=10)
            return reached and not self.changed.wait_for(lambda: self.count > count, timeout=0.2)


def assert_no_thread() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name == "data-loader"]
