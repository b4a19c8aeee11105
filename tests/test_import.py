"""Models of the hub become checkpoints: the same tokens, logits and texts as `transformers` gives, by every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unicodedata import normalize

import gguf
import pytest
import torch
from tokenizers import Regex
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data.tokenization import load_tokenizer
from data.tokenization.byte_level import LLAMA3_PATTERN
from data.tokenization.chat import encode_messages
from data.tokenization.imported import adopt_tokenizer
from inference.engine import Engine, Request
from inference.prompting import chat_prompt
from inference.sampling import SamplingSettings
from model.checkpoint import load_model
from scripts.export import export
from tests.commands import here
from tests.hub_server import HubServer, Repo
from tests.small_runs import ROOT

SPECIAL = ["<|begin|>", "<|end_of_text|>", "<|eot|>", "<|role|>"]
TEXTS = [
    "",
    " ",
    "Hello world",
    " 2026, it's\r\n\tnew ",
    "naïve café 日本語 🙂\u200d",
    "<|eot|> and <|begin|>x",
    "<think>a</think>",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|role|>' + m['role'] + '\n' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|role|>assistant\n' }}{% endif %}"
)
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def library() -> Library:
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [Path(__file__).read_text()], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>"])
    made.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
    )
    return made


def write(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model with its tokenizer in `folder`; returns the model."""
    import transformers

    made = library()
    names = dict(zip(("bos_token", "eos_token"), SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = [made.token_to_id(name) for name in SPECIAL[1:3]]
    shared: dict[str, Any] = {
        "vocab_size": made.get_vocab_size(),
        "bos_token_id": made.token_to_id(SPECIAL[0]),
        "eos_token_id": ends[0],
    }
    torch.manual_seed(0)
    if kind == "GPT2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **shared, **options)
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3}
        config = getattr(transformers, f"{kind}Config")(**{**shape, **sizes, **shared, **options})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    return model


def run_import(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/import.py"), *map(str, arguments)]
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=whole, capture_output=True, text=True, timeout=900)


LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SCALING}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,dtype,options",
    [
        ("Llama", torch.float32, LLAMA3),
        ("Llama", torch.bfloat16, {"tie_word_embeddings": True}),
        ("GPT2", torch.float32, {}),
        ("Mistral", torch.float32, {"sliding_window": None}),
        ("Qwen3", torch.float32, {"head_dim": 12}),
    ],
    ids=["llama3", "bf16", "gpt2", "mistral", "qwen3"],
)
def test_an_import_gives_the_tokens_logits_and_texts_of_transformers(
    tmp_path: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = write(tmp_path / "theirs", kind, dtype, **options)
    here(tmp_path, "scripts/import.py", "theirs", "--output", "ours")
    model, info = load_model(tmp_path / "ours/model_step_0.pt")
    tokenizer = load_tokenizer(Path(info.config["data"]["tokenizer_dir"]))
    assert tokenizer.fingerprint == info.tokenizer_fingerprint

    reference = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in TEXTS:
        plain = reference(text, split_special_tokens=True)["input_ids"]
        assert [*tokenizer.prefix_ids, *tokenizer.encode(text)] == plain
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(tokenizer.encode(text)) == text

    saved = torch.load(tmp_path / "ours/model_step_0.pt", weights_only=True)["model"]
    rows = theirs.config.vocab_size
    assert torch.equal(saved["token_embedding.weight"][:rows], theirs.get_input_embeddings().weight)
    assert saved["token_embedding.weight"].dtype == dtype

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    ids = torch.randint(0, rows, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[..., :rows], loaded(ids).logits, rtol=0, atol=1e-4)

    prompt = [*tokenizer.prefix_ids, *tokenizer.encode("def test")]
    wanted = loaded.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
    pieces = Engine(model, tokenizer, 1).generate([Request(prompt, 20, SamplingSettings(temperature=0.0))])
    found = [piece.token for piece in pieces if piece.token is not None]
    ends = set(loaded.generation_config.eos_token_id)
    assert tokenizer.decode(found, skip_special_tokens=True) == tokenizer.decode(
        [index for index in wanted[len(prompt) :] if index not in ends], skip_special_tokens=True
    )

    messages = [{"role": "user", "content": "hello <|eot|>"}]
    asked, _ = chat_prompt(tokenizer, [{"role": "user", "content": "hello"}], 64, 0)
    plain = [{"role": "user", "content": "hello"}]
    assert asked == reference.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert chat_prompt(tokenizer, messages, 64, 0)[0].count(tokenizer.special_tokens["<|eot|>"]) == 1
    assert ends == set(tokenizer.ending_ids)


@pytest.fixture
def bring_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Write a model of theirs and import it; returns theirs."""

    def bring_in(kind: str = "Llama", **options: Any) -> Any:
        monkeypatch.chdir(tmp_path)
        theirs = write(tmp_path / "theirs", kind, **options)
        import_module("scripts.import").import_model("theirs", output=Path("ours"))
        return theirs

    return bring_in


@pytest.mark.parametrize(
    "kind,options", [("Llama", LLAMA3), ("GPT2", {}), ("Qwen3", {"head_dim": 8})], ids=["llama3", "gpt2", "qwen3"]
)
def test_an_import_leaves_as_it_came(bring_in: Callable[..., Any], kind: str, options: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = bring_in(kind, **options)
    export(Path("again"), checkpoint="ours")
    again = AutoModelForCausalLM.from_pretrained("again")
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert again.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    assert again.config.bos_token_id == theirs.config.bos_token_id
    assert getattr(again.config, "rope_parameters", None) == getattr(theirs.config, "rope_parameters", None)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in ("theirs", "again"))
    for text in TEXTS:
        assert before(text)["input_ids"] == after(text)["input_ids"]
    messages = [{"role": "user", "content": "hello"}]
    assert before.apply_chat_template(messages, tokenize=False) == after.apply_chat_template(messages, tokenize=False)
    assert "trained with" not in (Path("again") / "README.md").read_text()


def test_an_import_becomes_a_gguf_file(bring_in: Callable[..., Any]) -> None:
    theirs = bring_in(**LLAMA3)
    export(Path("model.gguf"), to="gguf", checkpoint="ours")
    reader = gguf.GGUFReader("model.gguf")
    own = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    names = {name: own["tokens"].index(name) for name in [*SPECIAL, "<think>"]}
    assert (own["bos_token_id"], own["add_bos_token"]) == (names["<|begin|>"], True)
    assert [own["eos_token_id"], own["eot_token_id"]] == theirs.generation_config.eos_token_id
    types = {name: gguf.TokenType(own["token_type"][index]).name for name, index in names.items()}
    assert types == {**dict.fromkeys(SPECIAL, "CONTROL"), "<think>": "USER_DEFINED"}
    assert own["tokenizer.chat_template"] == TEMPLATE


def test_a_tokenizer_that_composes_characters_does_so_in_chats_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path)
    _edit("tokenizer.json", normalizer={"type": "NFC"})(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    ours = adopt_tokenizer(theirs, (), None)
    apart = "e\u0301 n\u0303 \u1100\u1161\u11a8 \u0344\n"
    for text in [*TEXTS, apart, f"{apart}<think>{apart}"]:
        assert [*ours.prefix_ids, *ours.encode(text)] == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == normalize("NFC", text)
    ours.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    for said in (apart, f" {apart}", "  "):
        messages = [{"role": "user", "content": apart}, {"role": "assistant", "content": said}]
        ids, trained = encode_messages(ours, messages)
        asked = theirs.apply_chat_template(messages, chat_template=ours.chat_template, return_dict=False)
        assert ids == asked
        learned = ours.decode([index for index, flag in zip(ids, trained, strict=True) if flag])
        answer = f"{normalize('NFC', said)} "  # a token may begin with the space before it
        assert learned.endswith(answer) and len(learned) <= len(answer) + 1


def test_learned_scales_of_queries_and_keys_leave_for_gguf(bring_in: Callable[..., Any]) -> None:
    theirs = bring_in("Qwen3", head_dim=8)
    export(Path("model.gguf"), to="gguf", checkpoint="ours")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader("model.gguf").tensors}
    attention = theirs.model.layers[1].self_attn
    for name, norm in (("attn_q_norm", attention.q_norm), ("attn_k_norm", attention.k_norm)):
        found = tensors[f"blk.1.{name}.weight"]
        assert found.tensor_type == gguf.GGMLQuantizationType.F32
        assert found.data.tolist() == norm.weight.tolist()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    "damage,sentence",
    [
        (_pickled, "pickle"),
        (_edit("config.json", architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
        (_edit("config.json", quantization_config={"bits": 4}), "quantized"),
        (_edit("config.json", num_hidden_layers=3), "lacks the weight model.layers.2"),
        (_edit("config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "linear"),
        (_edit("tokenizer.json", normalizer={"type": "NFKC"}), "NFKC"),
        (_edit("tokenizer.json", decoder=None), "byte-level"),
    ],
)
def test_what_cannot_be_imported_is_named_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write(tmp_path / "theirs")
    damage(tmp_path / "theirs")
    capsys.readouterr()
    code, error = call_import(monkeypatch, tmp_path), capsys.readouterr().err
    assert code == 1 and re.search(sentence, error) and error.count("\n") == 1, error
    assert not (tmp_path / "ours").exists()


def write_adapter(folder: Path, base: Any, **options: Any) -> Any:
    """A LoRA with random weights for `base` in `folder`; returns the model with it."""
    from peft import LoraConfig, get_peft_model

    asked = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    adapted: Any = get_peft_model(base, asked)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(folder)
    return adapted.eval()


def call_import(monkeypatch: pytest.MonkeyPatch, where: Path, *arguments: str) -> object:
    """Import `theirs` as `ours`; returns the exit status."""
    monkeypatch.chdir(where)
    monkeypatch.setattr(sys, "argv", ["import.py", "theirs", "--output", "ours", *arguments])
    with pytest.raises(SystemExit) as ended:
        import_module("scripts.import").main()
    return ended.value.code


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_into_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dora: bool) -> None:
    base = write(tmp_path / "theirs")
    ids = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = base(ids).logits
    adapted = write_adapter(tmp_path / "adapter", base, use_dora=dora)
    assert call_import(monkeypatch, tmp_path, "--adapter", "adapter") == 0
    with torch.inference_mode():
        expected, own = adapted(ids).logits, load_model(tmp_path / "ours" / "model_step_0.pt")[0](ids)
    torch.testing.assert_close(own[..., : expected.shape[-1]], expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def _deeper(folder: Path) -> None:
    write_adapter(folder, write(folder.parent / "deeper", num_hidden_layers=3))


def _wider(folder: Path) -> None:
    write_adapter(folder, write(folder.parent / "wider", hidden_size=64))


def _shallower(folder: Path) -> None:
    write_adapter(folder, write(folder.parent / "shallower", num_hidden_layers=1))


@pytest.mark.parametrize(
    "prepare,sentence",
    [
        (_deeper, r"for another base.*layers\.2"),
        (_shallower, r"for another base.*layers\.1"),
        (_wider, "for another base.*size mismatch"),
        (lambda folder: None, "no adapter in adapter: adapter_config.json is missing"),
    ],
    ids=["deeper", "shallower", "wider", "none"],
)
def test_an_adapter_for_another_base_is_refused(
    tmp_path: Path, prepare: Callable[[Path], None], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write(tmp_path / "theirs")
    prepare(tmp_path / "adapter")
    capsys.readouterr()
    code, error = call_import(monkeypatch, tmp_path, "--adapter", "adapter"), capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1 and re.search(sentence, error), error
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
def test_a_model_of_the_hub_is_imported_and_finetuned(tmp_path: Path) -> None:
    write(tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with HubServer() as hub:
        hub.repos["some/tiny"] = Repo({"main": {**files, "pytorch_model.bin": b"cos\nsystem"}})
        home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        result = run_import("some/tiny", cwd=tmp_path, **home)
        assert result.returncode == 0, result.stderr
        assert not hub.bodies("pytorch_model.bin")
        absent = run_import("some/absent", cwd=tmp_path, **home)
        assert absent.returncode == 1 and "no model some/absent" in absent.stderr
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"messages": [{**conversation[0], "content": f"hi {n}"}, conversation[1]]}) for n in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    settings = ["training.epochs=2", "training.batch_size=4", "training.micro_batch_size=4", "training.wandb.mode=off"]
    tune = (tmp_path, "scripts/finetune.py")
    finetuned = here(*tune, "--checkpoint", "checkpoints/tiny", "--dataset", "chats.jsonl", *settings)
    written = re.search(r"--checkpoint (\S+)", finetuned.stdout.splitlines()[-1])
    assert written is not None
    here(tmp_path, "scripts/generate.py", "--checkpoint", written[1], "--prompt", "hi 3", "--temperature", "0")
    resumed = here(*tune, "--resume", written[1], *settings, "training.epochs=3")
    assert f"Going on from {written[1]}" in resumed.stdout and "model_step_14.pt" in resumed.stdout
    imported = here(*tune, "--resume", "checkpoints/tiny", "--dataset", "chats.jsonl", status=1)
    assert imported.stderr.count("\n") == 1
    assert "is no checkpoint of fine-tuning. To start from it: --checkpoint" in imported.stderr
