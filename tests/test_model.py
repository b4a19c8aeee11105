"""The transformer: what it computes, what it must never see, and that a cache changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from config.errors import UserError
from config.load import load_config
from config.model import ModelConfig
from model import loss as loss_module
from model.attention import attend
from model.cache import KVCache
from model.transformer import Transformer
from tests.operators import Operators
from training.optimizers import sort_parameters

VOCABULARY = 300


def small_config(**options: Any) -> ModelConfig:
    """A small model whose vocabulary is no multiple of 128 and whose every weight matters from the start."""
    shape = {"vocab_size": VOCABULARY, "n_layers": 2, "d_model": 32, "n_heads": 4, "context_length": 32}
    chosen = {**shape, "init_std": 0.2, "zero_init_projections": False, **options}
    return load_config([], [f"model.{key}={'null' if value is None else value}" for key, value in chosen.items()]).model


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def reference_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")


GPT2_LIKE = {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": "true", "qk_norm": "false"}
LLAMA_LIKE = {"activation": "swiglu", "n_kv_heads": 2, "d_ff": 80, "qk_norm": "false", "tie_embeddings": "true"}
SKIPS = {"value_embeddings": "all", "residual_scaling": "true", "logit_soft_cap": 4.0, "n_kv_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "demo": {},
    "gpt2": {**GPT2_LIKE, "tie_embeddings": "true"},
    "llama": LLAMA_LIKE,
    "skips": {**SKIPS, "window": 5, "window_pattern": "S"},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return stirred(Transformer(small_config(**KINDS[request.param])).eval())


def stirred(model: Transformer) -> Transformer:
    """`model` with gates and scales moved from where they do nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_gate.weight", "_scale")):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


class TestTransformer:
    def test_forward_pass(self, model: Transformer) -> None:
        tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=1)
        logits, loss = model(tokens), model(tokens, targets)
        assert logits.shape == (2, 16, VOCABULARY)
        assert logits.isfinite().all() and logits.std() > 0
        assert loss.shape == () and loss.dtype == torch.float32
        torch.testing.assert_close(loss, reference_loss(model, tokens, targets))

    def test_untrained_model_knows_nothing(self) -> None:
        model = Transformer(small_config(init_std=0.02))
        tokens = random_tokens(4, 32)
        assert model(tokens, tokens).item() / 128 == pytest.approx(math.log(VOCABULARY), abs=0.1)

    @pytest.mark.parametrize("position", ["rope", "learned"])
    @pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
    @pytest.mark.parametrize("activation", ["squared_relu", "gelu", "swiglu"])
    @pytest.mark.parametrize(
        "rest",
        [
            {},
            {"bias": "true", "n_kv_heads": 1, "tie_embeddings": "true", "qk_norm": "false"},
            {**SKIPS, "qk_norm": "learned"},
        ],
    )
    def test_every_option_takes_part(self, position: str, norm: str, activation: str, rest: dict[str, Any]) -> None:
        model = Transformer(small_config(position=position, norm=norm, activation=activation, n_layers=1, **rest))
        tokens = random_tokens(2, 32)
        grads = gradients(model, model(tokens, tokens.roll(-1, 1)))
        silent = {name for name, grad in grads.items() if not grad.any()}
        # Softmax does not see what is added to every key alike, so the key's bias counts only where positions turn it.
        assert silent <= ({"blocks.0.attention.key.bias"} if position == "learned" else set())

    def test_learned_scales_of_queries_and_keys_are_vectors_for_all_heads(self) -> None:
        plain, learned = (Transformer(small_config(qk_norm=kind, n_layers=2)) for kind in ("true", "learned"))
        assert learned.num_parameters() == plain.num_parameters() + 2 * 2 * learned.config.head_dim
        learned.load_state_dict(plain.state_dict(), strict=False)
        tokens = random_tokens(2, 16)
        torch.testing.assert_close(learned(tokens), plain(tokens))
        learned.init_weights(0)
        scales = [
            weight
            for name, weight in learned.named_parameters()
            if name.endswith(("query_norm.weight", "key_norm.weight"))
        ]
        assert len(scales) == 4 and all(scale.eq(1).all() for scale in scales)
        groups = sort_parameters(learned, with_muon=True)
        assert {id(scale) for scale in scales} <= {id(parameter) for parameter in groups["scalar"]}

    def test_gelu_is_the_tanh_form(self) -> None:
        model = Transformer(small_config(activation="gelu"))
        layer = model.blocks[0].get_submodule("feed_forward")
        x = torch.randn(3, 32)
        up, down = layer.get_submodule("up"), layer.get_submodule("down")
        inner = up(x)
        tanh = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        torch.testing.assert_close(layer(x), down(tanh))

    @pytest.mark.parametrize(("which", "layers"), [("none", []), ("alternate", [0, 2, 4]), ("all", [0, 1, 2, 3, 4])])
    def test_layers_with_a_value_embedding(self, which: str, layers: list[int]) -> None:
        model = Transformer(small_config(n_layers=5, value_embeddings=which))
        assert [int(layer) for layer in model.value_embeddings] == layers
        # A table of values is looked up; of what it adds, only the gates multiply.
        without, gates = Transformer(small_config(n_layers=5)), len(layers) * 4 * 12
        assert model.num_parameters() - without.num_parameters() == gates + len(layers) * VOCABULARY * 32
        assert model.flops_per_token(32) - without.flops_per_token(32) == 6 * gates

    def test_a_value_embedding_is_added_to_the_values_through_its_gate(self) -> None:
        model = stirred(Transformer(small_config(n_layers=1, value_embeddings="all", n_kv_heads=2)))
        attention, table = model.blocks[0].get_submodule("attention"), model.value_embeddings["0"]
        token = random_tokens(1, 1)
        x = model.blocks[0].get_submodule("attention_norm")(model.token_embedding(token))[0, 0]
        # A token alone attends to itself, so what is mixed is its value.
        gate = 2 * torch.sigmoid(attention.get_parameter("value_gate.weight") @ x[:12])
        value = attention.get_submodule("value")(x).view(2, 8) + gate[:, None] * table(token).view(2, 8)
        expected = attention.get_submodule("output")(value.repeat_interleave(2, dim=0).flatten())
        seen: list[Tensor] = []
        attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        model(token)
        torch.testing.assert_close(seen[0][0, 0], expected)

    def test_residual_scaling_weighs_the_stream_and_the_embedding(self) -> None:
        model, tokens = Transformer(small_config(residual_scaling="true", zero_init_projections="true")), random_tokens(
            1, 8
        )
        embedding = model.token_embedding(tokens)
        torch.testing.assert_close(_last_residual(model, tokens), embedding)
        with torch.no_grad():
            for block, residual, again in zip(model.blocks, (2.0, 3.0), (0.5, 0.25)):
                block.get_parameter("residual_scale").fill_(residual)
                block.get_parameter("embedding_scale").fill_(again)
        torch.testing.assert_close(_last_residual(model, tokens), embedding * ((2.0 + 0.5) * 3.0 + 0.25))

    def test_no_token_sees_a_later_one(self, model: Transformer) -> None:
        tokens = random_tokens(1, 32)
        changed = tokens.clone()
        changed[0, 20] = (changed[0, 20] + 1) % VOCABULARY
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :20], after[:, :20])
        assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 0

    def test_no_token_sees_a_later_one_in_mixed_precision(self, model: Transformer) -> None:
        tokens = random_tokens(1, 32)
        changed = tokens.clone()
        changed[0, 20] = (changed[0, 20] + 1) % VOCABULARY
        with torch.autocast("cpu", torch.bfloat16):
            before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("length", [1, 7, 32, 600])
    def test_attention_in_bfloat16_equals_the_exact_one(self, kv_heads: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        exact = [torch.randn(2, heads, length, 8, generator=generator) for heads in (4, kv_heads, kv_heads)]
        found = [tensor.bfloat16().requires_grad_() for tensor in exact]
        exact = [tensor.detach().float().requires_grad_() for tensor in found]
        upstream = torch.randn(2, 4, length, 8, generator=generator).bfloat16()
        low, high = (attend(query, key, value, None, 0.0) for query, key, value in (found, exact))
        torch.testing.assert_close(low.float(), high, rtol=0.05, atol=0.02)
        for a, b in zip(torch.autograd.grad(low, found, upstream), torch.autograd.grad(high, exact, upstream.float())):
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)

    def test_rows_do_not_mix(self, model: Transformer) -> None:
        tokens = random_tokens(3, 32)
        torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]))

    def test_dropout_acts_in_training_only(self) -> None:
        model, tokens = Transformer(small_config(dropout=0.2)), random_tokens(2, 16)
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))

    def test_more_tokens_than_the_context_are_refused(self, model: Transformer) -> None:
        with pytest.raises(ValueError, match="33 tokens do not fit into the context of 32"):
            model(random_tokens(1, 33))

    @pytest.mark.parametrize("mode", ["selective", "full"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_gradient_checkpointing_changes_no_gradient(self, mode: Any, dropout: float) -> None:
        model, tokens = Transformer(small_config(n_kv_heads=2, dropout=dropout)), random_tokens(2, 32)
        torch.manual_seed(5)
        expected = gradients(model, model(tokens, tokens))
        model.set_gradient_checkpointing(mode)
        torch.manual_seed(5)
        found = gradients(model, model(tokens, tokens))
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_gradient_checkpointing_recomputes_what_it_says(self) -> None:
        model, tokens = Transformer(small_config()), random_tokens(2, 32)
        counts: dict[str, dict[str, int]] = {}
        for mode in ("none", "selective", "full"):
            model.set_gradient_checkpointing(mode)
            with Operators() as operators:
                gradients(model, model(tokens, tokens))
            counts[mode] = operators.calls
        # Of the six products of each of the two blocks, the result of the last is not needed again.
        products = 2 * (5 if model.config.value_embeddings == "none" else 6)
        assert counts["full"]["mm"] == counts["none"]["mm"] + products
        assert counts["selective"]["mm"] == counts["none"]["mm"]
        assert counts["selective"]["clamp_min"] == counts["full"]["clamp_min"] == counts["none"]["clamp_min"] + 2

    def test_autocast_keeps_the_loss_in_float32(self, model: Transformer) -> None:
        tokens, targets = random_tokens(4, 32), random_tokens(4, 32, seed=1)
        exact = gradients(model, model(tokens, targets))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, targets)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(model(tokens, targets).item(), rel=0.02)
        for name, grad in gradients(model, loss).items():
            assert grad.dtype == torch.float32
            if exact[name].abs().max() > 1e-4:
                assert F.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0) > 0.98, name

    @pytest.mark.parametrize("mode", ["none", "selective", "full"])
    def test_compiles_without_a_graph_break(self, mode: Any) -> None:
        torch.compiler.reset()
        model, tokens, targets = (
            Transformer(small_config(n_layers=1)),
            random_tokens(2, 32),
            random_tokens(2, 32, seed=1),
        )
        expected = gradients(model, model(tokens, targets))
        model.set_gradient_checkpointing(mode)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for name, grad in gradients(model, compiled(tokens, targets)).items():
            torch.testing.assert_close(grad, expected[name])

    def test_counts_floating_point_operations_as_palm_does(self) -> None:
        with torch.device("meta"):
            model = Transformer(load_config([], ["model.variant=gpt2-small"]).model)
            wide = Transformer(load_config([], ["model.variant=gpt2-small", "model.d_head=128"]).model)
        # nanoGPT's estimate for the same model: six for each weight but the positions, and attention's share.
        assert model.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
        # Four matrices of each layer, three with biases, are 768 wider one way; so is attention.
        wider = 4 * 768 * 768 + 3 * 768
        assert wide.num_parameters() - model.num_parameters() == 12 * wider
        assert wide.flops_per_token(1024) - model.flops_per_token(1024) == 12 * (6 * wider + 12 * 768 * 1024)


class TestLoss:
    @pytest.mark.parametrize("chunk", [7, 64, 2048])
    def test_equals_plain_cross_entropy(self, monkeypatch: pytest.MonkeyPatch, model: Transformer, chunk: int) -> None:
        monkeypatch.setattr(loss_module, "CPU_CHUNK", chunk)
        tokens, targets = random_tokens(2, 32), random_tokens(2, 32, seed=1)
        targets[0, :9] = -100
        loss, expected = model(tokens, targets), reference_loss(model, tokens, targets)
        torch.testing.assert_close(loss, expected)
        found = gradients(model, 0.25 * loss)
        for name, grad in gradients(model, 0.25 * expected).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("cap", "z_loss"), [(None, 0.3), (3.0, 0.0), (3.0, 0.3)])
    def test_soft_cap_and_z_loss_equal_their_formulas(
        self, monkeypatch: pytest.MonkeyPatch, cap: float | None, z_loss: float
    ) -> None:
        monkeypatch.setattr(loss_module, "CPU_CHUNK", 24)
        model = Transformer(small_config(logit_soft_cap=cap))
        model.z_loss = z_loss
        tokens, targets = random_tokens(2, 32), random_tokens(2, 32, seed=1)
        targets[0, :9] = -100
        logits, wanted = model(tokens).flatten(0, 1), targets.flatten()
        plain = F.linear(model.final_norm(_last_residual(model, tokens)), model.output_weight)[..., :VOCABULARY]
        torch.testing.assert_close(logits, (plain if cap is None else cap * torch.tanh(plain / cap)).flatten(0, 1))
        expected = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        loss = model(tokens, targets)
        torch.testing.assert_close(loss, expected)
        term = z_loss * (logits.logsumexp(-1).square() * (wanted != -100)).sum()
        found = gradients(model, 0.25 * loss)
        for name, grad in gradients(model, 0.25 * (expected + term)).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("cap", [None, 3.0])
    def test_padding_of_the_vocabulary_takes_no_part(self, cap: float | None) -> None:
        model, tokens = Transformer(small_config(logit_soft_cap=cap)), random_tokens(2, 32)
        model.z_loss = 0.1
        before = model(tokens, tokens)
        with torch.no_grad():
            model.output_weight[VOCABULARY:] = 1e4
        loss = model(tokens, tokens)
        assert torch.equal(loss, before)
        (grad,) = torch.autograd.grad(loss, [model.output_weight])
        assert not grad[VOCABULARY:].any() and grad[:VOCABULARY].any()

    def test_nothing_to_predict_is_a_loss_of_zero(self, model: Transformer) -> None:
        tokens = random_tokens(2, 32)
        loss = model(tokens, torch.full_like(tokens, -100))
        assert loss.item() == 0
        assert not any(grad.any() for grad in gradients(model, loss).values())

    def test_logits_of_a_batch_never_exist_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loss_module, "CPU_CHUNK", 16)
        model, tokens = Transformer(small_config()), random_tokens(8, 32)
        with Operators() as operators:
            model(tokens, tokens).backward()
        assert operators.largest <= max(256 * model.config.feed_forward_dim, 384 * model.config.d_model)
        assert operators.largest < 256 * VOCABULARY

    def test_without_gradients_none_are_computed(self, model: Transformer) -> None:
        tokens = random_tokens(2, 32)
        with torch.no_grad(), Operators() as operators:
            model(tokens, tokens)
        assert "scatter_add_" not in operators.calls
        with Operators() as operators:
            model(tokens, tokens)
        assert "scatter_add_" in operators.calls

    def test_frozen_head_gets_no_gradient(self) -> None:
        model, tokens = Transformer(small_config()), random_tokens(2, 32)
        expected = gradients(model, model(tokens, tokens))["blocks.0.feed_forward.up.weight"]
        model.output_weight.requires_grad_(False)
        model(tokens, tokens).backward()
        assert model.output_weight.grad is None
        torch.testing.assert_close(model.get_parameter("blocks.0.feed_forward.up.weight").grad, expected)


class TestInitialisation:
    def test_same_seed_same_weights(self) -> None:
        config = small_config()
        torch.manual_seed(1)
        first = Transformer(config)
        first.init_weights(7)
        torch.manual_seed(2)
        second, third = Transformer(config), Transformer(config)
        second.init_weights(7)
        third.init_weights(8)
        for name, weight in first.state_dict().items():
            assert torch.equal(weight, second.state_dict()[name]), name
        assert not torch.equal(first.output_weight, third.output_weight)

    def test_matrices_are_drawn_independently(self) -> None:
        first, second = (block.get_parameter("attention.query.weight") for block in Transformer(small_config()).blocks)
        assert abs(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1]) < 0.15

    def test_deviations(self) -> None:
        model = Transformer(small_config(d_model=128, n_layers=8, init_std=0.02))
        weights = dict(model.named_parameters())
        scaled = 0.02 / math.sqrt(16)
        assert weights["blocks.3.attention.query.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert weights["blocks.3.attention.output.weight"].std().item() == pytest.approx(scaled, rel=0.05)
        assert weights["blocks.3.feed_forward.down.weight"].std().item() == pytest.approx(scaled, rel=0.05)
        assert weights["token_embedding.weight"][:VOCABULARY].std().item() == pytest.approx(0.02, rel=0.05)
        assert not weights["token_embedding.weight"][VOCABULARY:].any()
        assert (weights["final_norm.weight"] == 1).all()

    def test_zero_projections_make_every_block_an_identity(self) -> None:
        model, tokens = Transformer(small_config(zero_init_projections="true")), random_tokens(1, 8)
        x = model.token_embedding(tokens)
        torch.testing.assert_close(model(tokens), F.linear(model.final_norm(x), model.output_weight)[..., :VOCABULARY])

    @pytest.mark.parametrize("kind", KINDS)
    def test_after_the_meta_device(self, kind: str) -> None:
        config, tokens = small_config(**KINDS[kind]), random_tokens(1, 32)
        with torch.device("meta"):
            model = Transformer(config)
        model.to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            assert not tensor.is_meta
        model.init_weights(0)
        assert torch.equal(model(tokens), Transformer(config)(tokens))

    def test_rotary_tables_stay_exact_in_a_model_of_lower_precision(self) -> None:
        model = Transformer(small_config())
        assert model.rotary is not None
        cos = model.rotary.cos.clone()
        model.to(torch.bfloat16)
        assert model.output_weight.dtype == torch.bfloat16
        assert torch.equal(model.rotary.cos, cos) and cos.dtype == torch.float32

    def test_a_parameter_without_a_rule_is_an_error(self) -> None:
        model = Transformer(small_config())
        model.register_parameter("smear", nn.Parameter(torch.ones(1)))
        with pytest.raises(ValueError, match="no rule initialises the parameter smear"):
            model.init_weights(0)


class TestKVCache:
    @settings(max_examples=25, deadline=None)
    @given(
        position=st.sampled_from(["rope", "learned"]),
        heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
        activation=st.sampled_from(["swiglu", "gelu"]),
        norm=st.sampled_from(["rmsnorm", "layernorm"]),
        qk_norm=st.sampled_from(["true", "false", "learned"]),
        skips=st.booleans(),
        window=st.sampled_from([None, 1, 3, 8]),
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
        steps=st.lists(st.integers(1, 4), max_size=4),
        seed=st.integers(0, 1000),
    )
    def test_ragged_rows_equal_uncached_ones(
        self,
        position: str,
        heads: tuple[int, int],
        activation: str,
        norm: str,
        qk_norm: str,
        skips: bool,
        window: int | None,
        lengths: list[int],
        steps: list[int],
        seed: int,
    ) -> None:
        config = small_config(
            position=position,
            n_heads=heads[0],
            n_kv_heads=heads[1],
            activation=activation,
            norm=norm,
            qk_norm=qk_norm,
            value_embeddings="alternate" if skips else "none",
            residual_scaling=str(skips).lower(),
            window=window,
        )
        model, batch = stirred(Transformer(config).eval()), len(lengths)
        tokens = random_tokens(batch, 32, seed=seed)
        full = model(tokens)
        cache = KVCache(config, batch, max_length=30)
        with torch.no_grad():
            prompts = torch.stack([F.pad(row[:length], (0, 12 - length)) for row, length in zip(tokens, lengths)])
            logits = model(prompts, cache=cache)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(logits[row, :length], full[row, :length], rtol=1e-4, atol=1e-4)
            cache.set_lengths(lengths)
            at = list(lengths)
            for step in steps:
                logits = model(torch.stack([row[i : i + step] for row, i in zip(tokens, at)]), cache=cache)
                for row, i in enumerate(at):
                    torch.testing.assert_close(logits[row], full[row, i : i + step], rtol=1e-4, atol=1e-4)
                at = [i + step for i in at]
        assert cache.lengths.tolist() == at

    def test_tokens_can_be_taken_back(self, model: Transformer) -> None:
        tokens, cache = random_tokens(2, 10), KVCache(model.config, 2)
        with torch.no_grad():
            model(random_tokens(2, 9, seed=3), cache=cache)
            cache.reset()
            model(tokens[:, :4], cache=cache)
            model(random_tokens(2, 5, seed=4), cache=cache)
            cache.set_lengths([4, 4])
            torch.testing.assert_close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:], rtol=1e-4, atol=1e-4)

    def test_rows_join_while_others_go_on(self, model: Transformer) -> None:
        tokens, cache = random_tokens(2, 12), KVCache(model.config, 2)
        with torch.no_grad():
            model(tokens[:1, :6], cache=cache.rows(0, 1))
            model(tokens[1:, :3], cache=cache.rows(1, 2))
            assert cache.lengths.tolist() == [6, 3]
            logits = model(torch.stack((tokens[0, 6:7], tokens[1, 3:4])), cache=cache)
            full = model(tokens)
        torch.testing.assert_close(logits[:, 0], torch.stack((full[0, 6], full[1, 3])), rtol=1e-4, atol=1e-4)

    def test_copied_row_goes_on_as_its_source(self, model: Transformer) -> None:
        tokens, cache = random_tokens(1, 8), KVCache(model.config, 2)
        with torch.no_grad():
            model(tokens[:, :7], cache=cache.rows(0, 1))
            cache.copy_row(0, 1)
            logits = model(tokens[:, 7:].repeat(2, 1), cache=cache)
        torch.testing.assert_close(logits[1], model(tokens)[0, 7:], rtol=1e-4, atol=1e-4)

    def test_last_logits_only(self, model: Transformer) -> None:
        tokens, cache = random_tokens(2, 8), KVCache(model.config, 2)
        logits = model.next_logits(tokens, cache, torch.tensor([7, 2]))
        full = model(tokens)
        torch.testing.assert_close(logits, torch.stack((full[0, 7], full[1, 2])), rtol=1e-4, atol=1e-4)

    def test_smaller_extent_is_the_same(self, model: Transformer) -> None:
        tokens, wide, narrow = random_tokens(1, 9), KVCache(model.config, 1), KVCache(model.config, 1)
        narrow.extent = 16
        for cache in (wide, narrow):
            model(tokens[:, :8], cache=cache)
        torch.testing.assert_close(model(tokens[:, 8:], cache=wide), model(tokens[:, 8:], cache=narrow))

    def test_full_cache_is_an_error(self, model: Transformer) -> None:
        cache = KVCache(model.config, 1, max_length=8)
        model(random_tokens(1, 6), cache=cache)
        with pytest.raises(ValueError, match="3 more tokens do not fit: the cache holds 6 of 8"):
            model(random_tokens(1, 3), cache=cache)
        with pytest.raises(ValueError, match="max_length 33 is not within the context of 32"):
            KVCache(model.config, 1, max_length=33)

    def test_more_than_the_device_has_is_an_error_and_nothing_is_taken(
        self, model: Transformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[Any] = []

        def full(*shape: Any, **options: Any) -> Tensor:
            taken.append(shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        monkeypatch.setattr(torch, "zeros", full)
        message = r"texts at once of up to 32 tokens: their keys and values need \S+ GB of memory, and \S+ GB are free"
        with pytest.raises(UserError, match=message):
            KVCache(model.config, 10**12)
        assert not taken
        with pytest.raises(UserError, match=message):
            KVCache(model.config, 2)
        assert taken

    def test_lower_precision_cache(self, model: Transformer) -> None:
        tokens, cache = random_tokens(1, 12), KVCache(model.config, 1, dtype=torch.bfloat16)
        model(tokens[:, :11], cache=cache)
        logits, full = model(tokens[:, 11:], cache=cache)[0, 0], model(tokens)[0, 11]
        assert logits.dtype == torch.float32
        assert F.cosine_similarity(logits, full, dim=0) > 0.99

    def test_decoding_compiles_once(self, model: Transformer) -> None:
        torch.compiler.reset()
        compilations = 0

        def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
            nonlocal compilations
            compilations += 1
            return graph.forward

        tokens, cache = random_tokens(2, 12), KVCache(model.config, 2)
        step = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
        with torch.no_grad():
            full = model(tokens)
            model(tokens[:, :4], cache=cache)
            for i in range(4, 12):
                logits = step(tokens[:, i : i + 1], cache=cache)
                torch.testing.assert_close(logits[:, 0], full[:, i], rtol=1e-4, atol=1e-4)
        assert compilations == 1


def _last_residual(model: Transformer, tokens: Tensor) -> Tensor:
    """What the final norm is given."""
    seen: list[Tensor] = []
    handle = model.final_norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(tokens)
    handle.remove()
    return seen[0]
