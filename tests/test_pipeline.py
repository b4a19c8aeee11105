"""The parts of preprocessing: mending, rules, keys, sorted runs, the split, token files, and the executor."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config
from config.schema import FilterConfig
from data.documents import BadRecord, Document
from data.funnel import Funnel, total
from data.pipeline.bad_records import first_harmful, merge_quarantine, write_quarantine
from data.pipeline.batches import SCHEMA, _batches
from data.pipeline.clean import clean, cleaner
from data.pipeline.executor import Workers, run_stage
from data.pipeline.keys import add_keys, drop_duplicates, in_order, key_range
from data.pipeline.rules import apply_rules, length_rules
from data.pipeline.shards import Passes, assemble, encode_documents, plan_files, shard_writer
from data.pipeline.split import choose_split, cut_position, decisive, divide, enough_documents
from data.tokenization import Tokenizer
from tests.recorder import Recorder
from tests.workspace import small_tokenizer

PLAIN = load_config().data.preprocess.clean
ALL = PLAIN.model_copy(update={"ftfy": True})


def frame(*texts: str, source: int = 0) -> pl.DataFrame:
    """A batch of documents whose ids are their numbers."""
    return pl.DataFrame(
        {"source": [source] * len(texts), "id": [f"{number:032x}" for number in range(len(texts))], "text": texts},
        schema=SCHEMA,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


class TestClean:
    @given(st.text(max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_leaves_no_control_character_and_one_normal_form(self, text: str) -> None:
        mended = cleaner(PLAIN)(text)
        assert all(unicodedata.category(character) != "Cc" or character in "\t\n" for character in mended)
        assert unicodedata.is_normalized("NFC", mended)
        assert cleaner(PLAIN)(mended) == mended

    def test_line_ends_and_accents(self) -> None:
        assert cleaner(PLAIN)("a\r\nb\rc\x00\td\u0085 e\u0301") == "a\nb\nc\td \u00e9"

    def test_mojibake_is_mended_and_nothing_else(self) -> None:
        assert cleaner(ALL)("donâ€™t “quote” &lt; ﬁ") == "don’t “quote” &lt; ﬁ"
        assert "â€™" in cleaner(PLAIN)("donâ€™t")

    def test_each_part_can_be_switched_off(self) -> None:
        nothing = PLAIN.model_copy(update={"unicode_nfc": False, "control_characters": False})
        assert cleaner(nothing)("e\u0301\x07\r\n") == "e\u0301\x07\r\n"

    def test_counts_what_changed(self) -> None:
        mended, changed, removed = clean(frame("as it was", "bell\x07\x07", "e\u0301"), PLAIN)
        assert mended["text"].to_list() == ["as it was", "bell", "\u00e9"]
        assert (changed, removed) == (2, 3)


class TestRules:
    RULES = length_rules(FilterConfig(min_characters=3, max_characters=6))

    def test_each_document_is_dropped_by_the_first_rule_that_applies(self) -> None:
        kept, dropped = apply_rules(frame("abc", "  \n ", "", "ab", "abcdefg", "äöüäöü"), self.RULES)
        assert kept["text"].to_list() == ["abc", "äöüäöü"]
        assert dropped.select("text", "rule").rows() == [
            ("  \n ", "blank"),
            ("", "blank"),
            ("ab", "too-short"),
            ("abcdefg", "too-long"),
        ]
        assert kept.columns == list(SCHEMA)


class TestBatches:
    def test_end_at_the_limit_and_set_half_surrogates_aside(self) -> None:
        records = [Document(str(n), "ok" if n != 2 else "half \ud800", "notes", {}) for n in range(6)]
        rejected: list[BadRecord] = []
        batches = list(_batches([*records, BadRecord("notes", "x:1", "empty")], 3, 2, rejected.append))
        assert [batch["id"].to_list() for batch in batches] == [["0", "1"], ["3", "4"], ["5"]]
        assert all(batch.schema == SCHEMA and set(batch["source"]) == {3} for batch in batches)
        assert [(record.reason, record.location) for record in rejected] == [("lone-surrogate", "2"), ("empty", "x:1")]


class TestKeys:
    def test_white_space_does_not_make_a_difference_but_a_letter_does(self) -> None:
        keyed = add_keys(frame("one two", "one\n  two\t", "one Two"), seed=1)
        keys = keyed.select("high", "low", "split").rows()
        assert keys[0] == keys[1]
        assert not set(keys[0]) & set(keys[2])

    def test_seed_changes_the_order_and_not_the_split(self) -> None:
        one, other = add_keys(frame("a", "b"), seed=1), add_keys(frame("a", "b"), seed=2**70)
        assert one["split"].equals(other["split"])
        assert not one["high"].equals(other["high"])

    def test_of_equal_documents_the_first_source_survives(self) -> None:
        documents = pl.concat([frame("x", "y", source=2), frame("z", "y", source=1), frame("q", "y", source=1)])
        kept, dropped = drop_duplicates(in_order(add_keys(documents, 0)))
        assert sorted(kept["text"]) == ["q", "x", "y", "z"]
        assert kept.filter(pl.col("text") == "y")["source"].to_list() == [1]
        assert dropped["rule"].to_list() == ["exact-duplicate"] * 2

    @given(st.integers(1, 5000))
    def test_ranges_follow_each_other_without_gap(self, parts: int) -> None:
        edges = [key_range(part, parts) for part in range(parts)]
        assert edges[0][0] == 0 and edges[-1][1] == 2**64 - 1
        assert all(one[1] + 1 == other[0] for one, other in zip(edges, edges[1:]))


class TestSplit:
    def test_share_of_documents(self) -> None:
        documents = add_keys(frame(*[f"text {number}" for number in range(4000)]), 0)
        split = choose_split(documents["split"].to_numpy(), 0.1)
        train, held_out = divide(documents, split)
        assert len(train) + len(held_out) == 4000
        assert 330 < len(held_out) < 470

    def test_at_least_one_document_is_held_out(self) -> None:
        """One in fifty of sixty documents would be none in a third of all corpora."""
        for seed in range(20):
            documents = add_keys(frame(*[f"corpus {seed} text {number}" for number in range(60)]), 0)
            train, held_out = divide(documents, choose_split(documents["split"].to_numpy(), 0.02))
            assert len(held_out) >= 1 and len(train) >= 50

    @pytest.mark.parametrize("parts", [1, 2, 7])
    def test_at_least_one_document_is_left_to_train_on(self, parts: int) -> None:
        """Half of two documents would be both of them in a quarter of all corpora."""
        for fraction, number in ((0.5, 2), (0.5, 3), (0.9, 2), (0.99, 40)):
            for seed in range(20):
                documents = add_keys(frame(*[f"corpus {seed} text {number}" for number in range(number)]), 0)
                hashes = documents["split"].to_numpy()
                known = np.concatenate([decisive(hashes[part::parts], fraction) for part in range(parts)])
                train, held_out = divide(documents, choose_split(known, fraction))
                assert len(train) and len(held_out)

    def test_parts_of_a_corpus_know_enough_together(self) -> None:
        hashes = add_keys(frame(*[f"text {number}" for number in range(500)]), 0)["split"].to_numpy()
        parts = np.concatenate([decisive(hashes[part::7], 0.02) for part in range(7)])
        assert choose_split(parts, 0.02) == choose_split(hashes, 0.02)

    def test_few_documents_are_cut(self) -> None:
        assert enough_documents(0.02) == 50
        documents = add_keys(frame(*[f"{number}: " + "some words\n" * 100 for number in range(49)]), 0)
        train, held_out = divide(documents, choose_split(documents["split"].to_numpy(), 0.02))
        assert len(train) == len(held_out) == 49
        for whole, head, tail in zip(documents["text"], train["text"], held_out["text"]):
            assert head + tail == whole
            assert head.endswith("\n")
            assert 10 < len(tail) < 45

    @given(st.text(min_size=2, max_size=300), st.floats(0.001, 0.999))
    @settings(max_examples=200, deadline=None)
    def test_both_parts_of_a_cut_text_hold_something(self, text: str, fraction: float) -> None:
        assert 0 < cut_position(text, fraction) < len(text)


class TestShards:
    def test_every_document_is_followed_by_its_end(self, tokenizer: Tokenizer) -> None:
        texts = ["one text", "", "a second one"]
        tokens, ends = encode_documents(texts, tokenizer, np.dtype("uint16"))
        expected = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts]
        assert tokens.tolist() == sum(expected, [])
        assert ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()

    @given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 60), st.integers(1, 3))
    @settings(max_examples=8, deadline=None)
    def test_files_hold_the_shards_in_order(self, sizes: list[int], limit: int, batch: int) -> None:
        import tempfile

        tokenizer = small_tokenizer() if not SHARED else SHARED[0]
        SHARED[:] = [tokenizer]
        expected: list[int] = []
        expected_ends: list[int] = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shards = []
            for number, size in enumerate(sizes):
                texts = [f"{number} {'word ' * row}" for row in range(size)]
                shards.append(folder / str(number))
                with shard_writer(
                    shards[-1], "train", tokenizer, np.dtype("uint16"), batch, lambda documents: None
                ) as add:
                    for some in add_keys(frame(*texts), 0).iter_slices(3):
                        add(some)
                for text in texts:
                    expected += [*tokenizer.encode(text), tokenizer.end_of_text_id]
                    expected_ends.append(len(expected))
            plans = plan_files(shards, "train", Passes.once(1), limit)
            files = [assemble(plan, folder / "out", 2, lambda documents: None) for plan in plans]
            tokens = b"".join((folder / "out" / file.name).read_bytes() for file in files)
            ends, offset = [], 0
            for file in files:
                ends += (np.fromfile(folder / "out" / file.index_name, "<u8") + np.uint64(offset)).tolist()
                offset += file.tokens
        assert np.frombuffer(tokens, "<u2").tolist() == expected
        assert ends == expected_ends
        assert all(file.tokens <= limit or file.documents == 1 for file in files)
        assert [file.name for file in files] == (
            ["train.bin"] if len(files) == 1 else [f"train_{number:04d}.bin" for number in range(len(files))]
        )


SHARED: list[Tokenizer] = []


class TestQuarantine:
    def test_order_does_not_depend_on_tasks(self, tmp_path: Path) -> None:
        records = [BadRecord("b", f"f:{row}", "not-json", f"{row}", 2) for row in (3, 1)]
        records += [BadRecord("a", "g:9", "empty"), BadRecord("a", "g:10", "binary")]
        for name, cuts in (("one", (4,)), ("three", (1, 2, 4))):
            folder, start = tmp_path / name, 0
            for number, end in enumerate(cuts):
                write_quarantine(folder / f"{number}.jsonl", ["a", "b"], records[start:end])
                start = end
            merge_quarantine([folder / f"{number}.jsonl" for number in range(5)], folder / "all")
        assert (tmp_path / "one/all").read_bytes() == (tmp_path / "three/all").read_bytes()
        assert [record.location for record in first_harmful(tmp_path / "one/all", "b", 1)] == ["f:1"]
        assert [record.reason for record in first_harmful(tmp_path / "one/all", "a", 3)] == ["binary"]

    def test_no_bad_record_no_file(self, tmp_path: Path) -> None:
        write_quarantine(tmp_path / "0.jsonl", ["a"], [])
        merge_quarantine([tmp_path / "0.jsonl"], tmp_path / "all")
        assert not list(tmp_path.iterdir())
        assert first_harmful(tmp_path / "all", "a", 3) == []


def test_a_funnel_that_loses_a_document_is_noticed() -> None:
    one, other = Funnel(), Funnel()
    one.read.add(10, 100)
    one.drop("too-short", 2, 10)
    other.kept.add(8, 90)
    total([one, other]).check()
    other.kept.add(1, 0)
    with pytest.raises(AssertionError):
        total([one, other]).check()


class TestExecutor:
    @pytest.mark.parametrize("count", [1, 2])
    def test_every_task_once_and_a_second_run_does_nothing(self, tmp_path: Path, count: int) -> None:
        progress: list[int] = []
        stage = Recorder(tmp_path)
        with Workers(count) as workers:
            run_stage(stage, 4, workers, tmp_path / "log", progress.append)
            run_stage(stage, 4, workers, tmp_path / "log", progress.append)
        assert [stage.calls(part) for part in range(4)] == [1] * 4
        assert sum(progress) == 40
        assert "recorder 3 of 4" in (tmp_path / "log/logs/task_00003.log").read_text()

    @pytest.mark.parametrize("count", [1, 2])
    def test_what_a_task_refuses_reaches_the_caller_and_is_tried_again_later(self, tmp_path: Path, count: int) -> None:
        with pytest.raises(UserError, match="part 2 is not to be had"), Workers(count) as workers:
            run_stage(Recorder(tmp_path, "refuses"), 4, workers, tmp_path / "log")
        assert "UserError" in (tmp_path / "log/logs/task_00002.log").read_text()
        with Workers(count) as workers:
            run_stage(Recorder(tmp_path), 4, workers, tmp_path / "log")
        assert Recorder(tmp_path).calls(0) == 1
        assert Recorder(tmp_path).calls(2) == 2

    def test_the_task_of_a_killed_worker_is_repeated(self, tmp_path: Path) -> None:
        stage = Recorder(tmp_path, "dies once")
        with Workers(2) as workers:
            run_stage(stage, 4, workers, tmp_path / "log")
        assert stage.calls(2) == 2

    def test_workers_killed_again_and_again_are_given_up(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="memory ran out"), Workers(2) as workers:
            run_stage(Recorder(tmp_path, "dies"), 4, workers, tmp_path / "log")


def test_settings_that_leave_no_trace_are_not_recorded() -> None:
    from data.pipeline.preparation import recorded_settings

    plain = recorded_settings(load_config().data)
    others = ["workers=7", "tasks=3", "batch_documents=9", "max_bad_fraction=0.5"]
    assert plain == recorded_settings(load_config([], [f"data.preprocess.{other}" for other in others]).data)
    assert plain != recorded_settings(load_config([], ["data.preprocess.clean.ftfy=true"]).data)
