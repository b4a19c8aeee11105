"""scripts/export.py: what it writes is loaded by the programs that it is meant for, and gives the same there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch

from config.errors import UserError
from data.tokenization.byte_level import BYTE_OF
from data.tokenization.chat import encode_messages
from data.tokenization.probes import EDGES, LANGUAGES
from inference.exporting.folder import check_tokenizer
from model.checkpoint import load_checkpoint, load_model, save_checkpoint
from scripts.export import export
from tests.workspace import Workspace, make_workspace, small_tokenizer

GPT2 = ["position=learned", "norm=layernorm", "activation=gelu", "bias=true", "qk_norm=false", "tie_embeddings=true"]
LLAMA = ["activation=swiglu", "qk_norm=false", "n_kv_heads=1"]
KINDS = {"apertus": [], "llama": LLAMA, "gpt2": GPT2, "qwen3": LLAMA[:1], "arcee": LLAMA[1:]}
ROPE_SCALING = "rope_scaling={factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_context_length: 64}"
CHAT = {"finetuning": {"format": "messages"}, "validation_loss": 2.5}
MESSAGES = [{"role": "user", "content": "What is 3 + 4?"}]


class Exported(NamedTuple):
    workspace: Workspace
    folder: Path


def workspace_of(folder: Path, kind: str = "apertus", *settings: str, **entries: Any) -> Workspace:
    return make_workspace(folder, *[f"model.{setting}" for setting in [*KINDS[kind], *settings]], **entries)


def randomise(workspace: Workspace) -> None:
    """Give every weight of the model and of its checkpoint a value that no other has, biases and scales too."""
    generator = torch.Generator().manual_seed(1)
    state = load_checkpoint(workspace.checkpoint)
    with torch.no_grad():
        for parameter in workspace.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(workspace.checkpoint, {**state, "model": workspace.model.state_dict()})


def tokens(workspace: Workspace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, workspace.tokenizer.vocab_size, (2, 32), generator=generator)


def load(folder: Path, what: str = "AutoModelForCausalLM", **options: Any) -> Any:
    import transformers

    return getattr(transformers, what).from_pretrained(folder, **options)


@pytest.fixture(scope="module", params=["completion", "chat"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """The default kind of model, after pre-training and after fine-tuning on messages."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        workspace = workspace_of(folder, **(CHAT if request.param == "chat" else {"cursor": 50}))
        export(Path("out"))
    yield Exported(workspace, folder / "out")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestHuggingFace:
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_are_the_same(self, here: Path, kind: str) -> None:
        workspace = workspace_of(here, kind)
        export(here / "out")
        with torch.no_grad():
            ours, logits = workspace.model(tokens(workspace)), load(here / "out")(tokens(workspace)).logits
        assert ours.std() > 0.3
        assert (logits - ours).abs().max() < 1e-4

    def test_ids_are_the_same(self, exported: Exported) -> None:
        theirs = load(exported.folder, "AutoTokenizer")
        tokenizer = exported.workspace.tokenizer
        texts = [*LANGUAGES, *EDGES]
        for text in texts:
            assert theirs(text)["input_ids"] == tokenizer.encode(text, allow_special=True)
            assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text

    def test_special_tokens_and_chat(self, exported: Exported) -> None:
        theirs, tokenizer = load(exported.folder, "AutoTokenizer"), exported.workspace.tokenizer
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.end_of_text_id,) * 2
        assert (theirs.pad_token_id, theirs.model_max_length) == (tokenizer.pad_id, 32)
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        assert ids == encode_messages(tokenizer, MESSAGES, add_generation_prompt=True)[0]

    def test_a_text_ends_where_it_was_trained_to(self, exported: Exported) -> None:
        names = exported.workspace.tokenizer.special_tokens
        chat = load_model(exported.workspace.checkpoint)[1].finetuning is not None
        ends = [names["<|endoftext|>"], names["<|end|>"]] if chat else names["<|endoftext|>"]
        model = load(exported.folder)
        for settings in (model.generation_config, model.config):
            assert settings.eos_token_id == ends
        assert model.generation_config.pad_token_id == names["<|pad|>"]

    def test_the_card_says_what_the_checkpoint_knows(self, exported: Exported) -> None:
        card = (exported.folder / "README.md").read_text()
        assert "# small-run, step 7" in card and "`ApertusForCausalLM`: 2 layers of width 32, 2 heads" in card
        parameters = sum(weight.numel() for weight in load(exported.folder).parameters())
        assert f"| parameters | {parameters:,} |" in card
        assert "vllm serve out --model-impl transformers" in card
        chat = "conversations" in card
        assert chat == ("validation loss | 2.5000" in card) == ("apply_chat_template" in card)
        assert chat != ("| tokens trained on | 1,600 |" in card)

    def test_the_card_s_python_runs(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(exported.folder.parent)
        code = (exported.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        exec(code.replace("max_new_tokens=100", "max_new_tokens=2"), {})  # noqa: S102

    def test_dtype(self, here: Path) -> None:
        workspace = workspace_of(here)
        export(here / "out", dtype="f16")
        theirs = load(here / "out")
        assert theirs.dtype == torch.float16
        expected = workspace.model.state_dict()["blocks.1.attention.query.weight"].half()
        assert torch.equal(theirs.state_dict()["model.layers.1.self_attn.q_proj.weight"], expected)


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def xielu(x: torch.Tensor, alpha_n: float, alpha_p: float, beta: float, eps: float) -> torch.Tensor:
    """As llama.cpp computes it, in float32."""
    negative, squared = torch.nn.functional.softplus(torch.tensor([alpha_n, alpha_p]))
    below = (torch.expm1(x.clamp(max=eps)) - x) * (beta + negative) + beta * x
    return torch.where(x > 0, squared * x * x + beta * x, below)


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


class TestGGUF:
    """Through `transformers`' own reader where it knows the architecture, which turns names and order back."""

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
    def test_logits_are_the_same(self, here: Path, kind: str) -> None:
        # Whatever the file says, transformers takes a GPT-2 to have 1,024 positions and a Qwen3 to have heads of 128.
        workspace = workspace_of(here, kind, *{"gpt2": ["context_length=1024"], "qwen3": ["d_model=256"]}.get(kind, []))
        randomise(workspace)
        export(Path("model.gguf"), to="gguf")
        theirs = load(here, gguf_file="model.gguf", dtype=torch.float32)
        with torch.no_grad():
            ours, logits = workspace.model(tokens(workspace)), theirs(tokens(workspace)).logits
        assert ours.std() > 0.3
        assert (logits - ours).abs().max() < 1e-4

    def test_weights_of_an_arcee(self, here: Path) -> None:
        workspace = workspace_of(here, "arcee")
        export(Path("model.gguf"), to="gguf")
        written = tensors(here / "model.gguf")
        weights = workspace.model.state_dict()
        assert torch.equal(written["blk.1.ffn_up.weight"], weights["blocks.1.feed_forward.up.weight"])
        query = weights["blocks.1.attention.query.weight"]
        pairs = [row for head in query.split(16) for half in zip(head[:8], head[8:]) for row in half]
        assert torch.equal(written["blk.1.attn_q.weight"], torch.stack(pairs))
        assert len(written) == 2 * 8 + 3

    @pytest.mark.parametrize("tied", ["true", "false"])
    def test_weights_and_activation_of_the_default_model(self, here: Path, tied: str) -> None:
        workspace = workspace_of(here, "apertus", f"tie_embeddings={tied}")
        export(Path("model.gguf"), to="gguf")
        written, weights = tensors(here / "model.gguf"), workspace.model.state_dict()
        for there, name in (("ffn_up", "feed_forward.up"), ("attn_q", "attention.query"), ("attn_k", "attention.key")):
            assert torch.equal(written[f"blk.1.{there}.weight"], weights[f"blocks.1.{name}.weight"])
        assert torch.equal(written["blk.1.attn_norm.weight"], weights["blocks.1.attention_norm.weight"])
        assert torch.equal(written["output.weight"], workspace.model.output_weight[:300])
        assert torch.equal(written["blk.0.attn_k_norm.weight"], torch.ones(16))
        assert len(written) == 2 * 10 + 3
        found = metadata(gguf.GGUFReader(here / "model.gguf"))
        keys = (found[f"xielu.{key}"] for key in ("alpha_n", "alpha_p", "beta", "eps"))
        for layer in zip(*keys, strict=True):
            x = torch.linspace(-50, 50, 1001)
            assert torch.equal(xielu(x, *layer), x.relu().square())

    @pytest.mark.parametrize("kind", ["llama", "arcee", "apertus"])
    def test_scaled_rotary_positions(self, here: Path, kind: str) -> None:
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        workspace_of(here, kind, ROPE_SCALING)
        export(Path("model.gguf"), to="gguf")
        rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        theirs = LlamaConfig(head_dim=16, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **rope})
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
        expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / scaled
        assert len(set(expected.tolist())) > 2
        torch.testing.assert_close(tensors(here / "model.gguf")["rope_freqs.weight"], expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
    def test_dtype(self, here: Path, dtype: Any) -> None:
        workspace = workspace_of(here, "llama")
        export(Path("model.gguf"), to="gguf", dtype=dtype)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(here / "model.gguf").tensors}
        matrix = tensors["blk.0.ffn_down.weight"]
        assert matrix.tensor_type == gguf.GGMLQuantizationType[dtype.upper()]
        assert {tensors[name].tensor_type.name for name in tensors if "norm" in name} == {"F32"}
        expected = workspace.model.state_dict()["blocks.0.feed_forward.down.weight"]
        found = torch.tensor(gguf.quants.dequantize(matrix.data, matrix.tensor_type))
        assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()

    @pytest.mark.parametrize(("pattern", "pre"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe")])
    @pytest.mark.parametrize("entries", [{}, CHAT], ids=["completion", "chat"])
    def test_tokenizer(self, here: Path, pattern: str, pre: str, entries: dict[str, Any]) -> None:
        tokenizer = small_tokenizer(f"data.tokenizer.pattern={pattern}")
        workspace_of(here, "llama", "vocab_size=310", **entries, tokenizer_fingerprint=tokenizer.fingerprint)
        tokenizer.save(here / "corpus/tokenizer")
        export(Path("model.gguf"), to="gguf")
        found = metadata(gguf.GGUFReader(here / "model.gguf"))
        own = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items()}
        names, types = own["tokens"], own["token_type"]
        assert (own["model"], own["pre"], own["add_bos_token"]) == ("gpt2", pre, False)
        assert (own["bos_token_id"], own["eos_token_id"]) == (tokenizer.end_of_text_id,) * 2
        assert own["padding_token_id"] == tokenizer.pad_id
        assert [names[index] for index in tokenizer.special_tokens.values()] == list(tokenizer.special_tokens)
        assert [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == sorted(
            tokenizer.special_tokens.values()
        )
        assert names[300:] == [f"[PAD{index}]" for index in range(300, 310)]
        assert set(types[300:]) == {gguf.TokenType.UNUSED}
        written = {byte: character for character, byte in BYTE_OF.items()}
        expected = "".join(written[byte] for byte in tokenizer.decode_bytes([299]))
        assert own["merges"][-1].replace(" ", "") == names[299] == expected
        assert own.get("eot_token_id") == (tokenizer.special_tokens["<|end|>"] if entries else None)
        assert found.get("tokenizer.chat_template") == (tokenizer.chat_template if entries else None)

    @pytest.mark.parametrize(
        ("kind", "settings", "message"),
        [
            ("arcee", ["bias=true"], "has no model.bias=true"),
            ("qwen3", [ROPE_SCALING], "has no model.rope_scaling.*trained with model.rope_scaling=null"),
        ],
    )
    def test_what_llama_cpp_lacks_is_named(self, here: Path, kind: str, settings: list[str], message: str) -> None:
        workspace_of(here, kind, *settings)
        before = sorted(here.iterdir())
        with pytest.raises(UserError, match=message):
            export(Path("model.gguf"), to="gguf")
        assert sorted(here.iterdir()) == before

    def test_only_a_gguf_file_is_replaced_and_only_by_force(self, here: Path) -> None:
        workspace_of(here, "llama")
        export(Path("model.gguf"), to="gguf")
        with pytest.raises(UserError, match="model.gguf exists. Add --force"):
            export(Path("model.gguf"), to="gguf")
        large = (here / "model.gguf").stat().st_size
        export(Path("model.gguf"), to="gguf", dtype="f16", force=True)
        assert (here / "model.gguf").stat().st_size < large
        for name, make in (("thesis.txt", Path.touch), ("folder", Path.mkdir)):
            make(here / name)
            with pytest.raises(UserError, match="exists and is no GGUF file"):
                export(Path(name), to="gguf", force=True)

    def test_a_dtype_of_llama_cpp_is_refused_elsewhere(self, here: Path) -> None:
        with pytest.raises(UserError, match="q8_0 is of llama.cpp"):
            export(Path("out"), dtype="q8_0")


class TestBadInput:
    def test_a_folder_that_exists_is_replaced_only_by_force(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        workspace_of(here)
        export(Path("out"))
        assert "Written to out: small-run, step 7, ApertusForCausalLM" in capsys.readouterr().out
        with pytest.raises(UserError, match="out exists. Add --force"):
            export(Path("out"))
        export(Path("out"), force=True, dtype="bf16")
        assert load(here / "out").dtype == torch.bfloat16
        (here / "out/thesis.txt").write_text("precious")
        with pytest.raises(UserError, match="holds other files .thesis.txt"):
            export(Path("out"), force=True)
        assert (here / "out/thesis.txt").read_text() == "precious"
        with pytest.raises(UserError, match="holds other files .thesis.txt"):
            export(Path("out/thesis.txt"), force=True)

    def test_a_disk_without_room_is_said_before_anything_is_written(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workspace_of(here, "llama")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(UserError, match="takes 20.* MB, and its disk has 0.0 MB left"):
            export(Path("deep/out"))
        with pytest.raises(UserError, match="takes 0.1 MB, and its disk has 0.0 MB left"):
            export(Path("deep/model.gguf"), to="gguf", dtype="q8_0")
        assert not (here / "deep").exists()

    def test_what_has_no_counterpart_is_named_and_nothing_left_behind(self, here: Path) -> None:
        make_workspace(here, "model.logit_soft_cap=30.0")
        before = sorted(here.iterdir())
        with pytest.raises(UserError, match="Only a model trained with model.logit_soft_cap=null can be exported"):
            export(Path("out"))
        assert sorted(here.iterdir()) == before

    def test_a_tokenizer_of_sentencepiece_is_refused(self, here: Path) -> None:
        kind = ("data.tokenizer.kind=sentencepiece-bpe", "data.tokenizer.encoder=auto")
        tokenizer = small_tokenizer(*kind, "data.tokenizer.vocab_size=400")
        workspace_of(here, tokenizer_fingerprint=tokenizer.fingerprint)
        shutil.rmtree(here / "corpus/tokenizer")
        tokenizer.save(here / "corpus/tokenizer")
        before = sorted(here.iterdir())
        with pytest.raises(UserError, match="trained with data.tokenizer.kind=bpe can be exported"):
            export(Path("out"))
        assert sorted(here.iterdir()) == before

    def test_a_tokenizer_that_gives_other_ids_there_is_told(self, exported: Exported) -> None:
        check_tokenizer(exported.folder, exported.workspace.tokenizer)
        with pytest.raises(UserError, match="other ids than this tokenizer for 'All human beings"):
            check_tokenizer(exported.folder, small_tokenizer("data.tokenizer.vocab_size=290"))
