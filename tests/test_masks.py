"""Windows and documents: what a token sees, and that every way of hiding the rest is the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from config.errors import UserError
from config.load import load_config
from model.attention import attend
from model.masks import Pieces, block_masks, causal_masks, flex_takes
from model.transformer import Transformer

CPU = torch.device("cpu")
VOCABULARY = 100


def small_model(*overrides: str) -> Transformer:
    shape = ["vocab_size=100", "n_layers=2", "d_model=32", "n_heads=4", "n_kv_heads=2", "context_length=640"]
    start = ["init_std=0.2", "zero_init_projections=false"]
    return Transformer(load_config([], [f"model.{each}" for each in (*shape, *start, *overrides)]).model)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def documents_of(*rows: list[int]) -> Tensor:
    """The number of the document of every token, where row i has documents of these lengths."""
    number, parts = 0, []
    for lengths in rows:
        parts.append(torch.repeat_interleave(torch.arange(number, number + len(lengths)), torch.tensor(lengths)))
        number += len(lengths)
    return torch.stack(parts).int()


def seen_by_definition(documents: Tensor, window: int | None) -> Tensor:
    """`(batch, T, T)`: whether a query (second dimension) sees a key, pair by pair."""
    batch, length = documents.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            for key in range(query + 1):
                near = window is None or query - key < window
                seen[row, query, key] = near and bool(documents[row, query] == documents[row, key])
    return seen


def random_heads(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, heads, length, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]


class TestWays:
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @settings(max_examples=12, deadline=None)
    @given(
        cuts=st.lists(st.sets(st.integers(1, 23)), min_size=1, max_size=3),
        window=st.one_of(st.none(), st.integers(1, 30)),
        whole=st.booleans(),
    )
    def test_all_hide_what_the_definition_hides(self, cuts: list[set[int]], window: int | None, whole: bool) -> None:
        rows = [[end - start for start, end in zip([0, *sorted(cut)], [*sorted(cut), 24])] for cut in cuts]
        documents = documents_of(*[[24] for _ in rows] if whole else rows)
        query, key, value = random_heads(len(rows), 24)
        seen = seen_by_definition(documents, window)
        scores = query @ key.repeat_interleave(2, dim=1).mT / 4
        shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        expected = shares @ value.repeat_interleave(2, dim=1)
        given_documents = None if whole else documents
        for flex in (False, True):
            mask = causal_masks([window], (len(rows), 24), given_documents, CPU, flex)[window]
            torch.testing.assert_close(attend(query, key, value, mask, 0.0), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_documents_one_by_one_have_the_gradients_of_a_mask(self, dtype: torch.dtype) -> None:
        documents = documents_of([1, 599], [300, 200, 100])
        parts = causal_masks([None], (2, 600), documents, CPU, flex=False)[None]
        assert parts == Pieces([1, 599, 300, 200, 100])
        dense = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        upstream, results = random_heads(2, 600)[0].to(dtype), []
        for mask in (parts, dense):
            query, key, value = (tensor.requires_grad_() for tensor in random_heads(2, 600, dtype))
            mixed = attend(query, key, value, mask, 0.0)
            results.append([mixed, *torch.autograd.grad(mixed, (query, key, value), upstream)])
        relative, absolute = (0.05, 0.05) if dtype == torch.bfloat16 else (1e-4, 1e-5)
        torch.testing.assert_close(results[0], results[1], rtol=relative, atol=absolute)

    def test_flex_attention_takes_what_autocast_leaves_in_two_types(self) -> None:
        query, key, value = random_heads(2, 40)
        mask = causal_masks([9], (2, 40), None, CPU, flex=True)[9]
        exact = attend(query, key, value, mask, 0.0)
        mixed = attend(query, key, value.bfloat16(), mask, 0.0)
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.float(), exact, rtol=0.05, atol=0.05)

    def test_which_models_flex_attention_takes(self) -> None:
        assert flex_takes(small_model("n_heads=2").config)
        assert not flex_takes(small_model("n_heads=2", "dropout=0.1").config)
        assert not flex_takes(small_model("n_heads=4").config)

    def test_flex_attention_is_one_graph_with_its_mask(self) -> None:
        """Without gradients, which FlexAttention has on a GPU alone."""

        def forward(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
            return attend(query, key, value, causal_masks([9], (2, 256), documents, CPU, flex=True)[9], 0.0)

        torch.compiler.reset()
        query, key, value = random_heads(2, 256)
        inputs = query, key, value, documents_of([256], [100, 156])
        with torch.no_grad():
            found = torch.compile(forward, fullgraph=True, backend="aot_eager")(*inputs)
            torch.testing.assert_close(found, forward(*inputs))


class TestDocuments:
    @pytest.mark.parametrize("length", [32, 640])
    @pytest.mark.parametrize("options", [(), ("window=8",), ("position=learned", "value_embeddings=all")])
    def test_a_document_is_blind_to_the_others_of_its_window(self, length: int, options: tuple[str, ...]) -> None:
        model, tokens = small_model(*options), random_tokens(2, length)
        documents, changed = documents_of([10, length - 10], [length]), tokens.clone()
        changed[0, :10] = (changed[0, :10] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = (model(each, documents=documents) for each in (tokens, changed))
            across, across_after = model(tokens), model(changed)
        assert (before[0, :10] - after[0, :10]).abs().amax(-1).min() > 0
        assert torch.equal(before[0, 10:], after[0, 10:]) and torch.equal(before[1], after[1])
        assert (across[0, 10:] - across_after[0, 10:]).abs().amax(-1).max() > 0
        # A window with one document is as it was without any.
        torch.testing.assert_close(before[1], across[1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("length", [32, 640])
    def test_so_is_its_loss_in_mixed_precision(self, length: int) -> None:
        model, tokens, documents = small_model(), random_tokens(1, length), documents_of([10, length - 10])
        targets, changed = tokens.roll(-1, 1), tokens.clone()
        targets[0, :10], changed[0, :10] = -100, (changed[0, :10] + 1) % VOCABULARY
        with torch.autocast("cpu", torch.bfloat16):
            blind = [model(each, targets, documents=documents) for each in (tokens, changed)]
            across = [model(each, targets) for each in (tokens, changed)]
        assert blind[0] == blind[1] and across[0] != across[1]

    def test_rotary_documents_are_as_if_alone(self) -> None:
        """Rotary positions are relative, so where in a window a document stands changes nothing."""
        model, tokens = small_model("window=4"), random_tokens(1, 40)
        together = model(tokens, documents=documents_of([15, 25]))
        torch.testing.assert_close(together[:, 15:], model(tokens[:, 15:]), rtol=1e-4, atol=1e-4)


class TestWindow:
    def test_the_pattern_is_repeated_and_the_last_layer_sees_everything(self) -> None:
        pattern = small_model("n_layers=6", "window=7", "window_pattern=SSL").config.layer_windows
        assert pattern == [7, 7, None, 7, 7, None]
        assert small_model("n_layers=3", "window=7", "window_pattern=S").config.layer_windows == [7, 7, None]
        assert small_model("n_layers=3").config.layer_windows == [None] * 3
        with pytest.raises(UserError, match="model.window_pattern: string should match pattern"):
            small_model("window_pattern=SXL")

    def test_a_layer_sees_so_many_tokens_and_no_more(self) -> None:
        model, tokens = small_model("window=4", "window_pattern=S").eval(), random_tokens(1, 20)
        outputs: list[Tensor] = []
        model.blocks[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        changed = tokens.clone()
        changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
        with torch.no_grad():
            logits, logits_after = model(tokens), model(changed)
        moved = (outputs[0] - outputs[1]).abs().amax(-1)[0] > 0
        assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13]
        assert bool(((logits - logits_after).abs().amax(-1)[0, 10:] > 0).all())

    def test_a_window_as_long_as_the_text_changes_nothing(self) -> None:
        wide, plain, tokens = small_model("window=30"), small_model(), random_tokens(2, 30)
        assert torch.equal(wide(tokens), plain(tokens))

    def test_floating_point_operations_are_those_of_what_is_seen(self) -> None:
        plain, narrow = small_model("n_layers=4"), small_model("n_layers=4", "window=16", "window_pattern=SSSL")
        assert plain.flops_per_token(64) - narrow.flops_per_token(64) == 12 * 32 * 3 * (64 - 16)
        assert plain.flops_per_token(8) == narrow.flops_per_token(8)


def test_block_masks_of_a_gpu_are_compiled_once_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the compilation but its kernels, over other documents and two windows in turn."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled, plain = (block_masks(torch.device(kind)) for kind in ("cuda", "cpu"))
    assert compiled is not plain
    graphs = []
    for seed in range(3):
        draws = torch.rand(2, 512, generator=torch.Generator().manual_seed(seed)) < 0.02
        documents = draws.cumsum(1, dtype=torch.int32)
        for window in (512, 128):

            def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                near = (query >= key) & (query - key < window)
                return near & (documents[row, query] == documents[row, key])

            found, wanted = (make(visible, 2, None, 512, 512, device="cpu") for make in (compiled, plain))
            for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "q_num_blocks", "q_indices"):
                assert torch.equal(getattr(found, part), getattr(wanted, part)), part
            assert found.mask_mod is visible
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]
