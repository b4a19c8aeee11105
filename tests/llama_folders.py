"""Folders of tiny Llama-like models as the hub has them, whose tokenizer follows the rules of SentencePiece."""

from __future__ import annotations

import io
import json.decoder
from functools import cache
from pathlib import Path
from typing import Any

import torch

from data.tokenization.probes import LANGUAGES

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TINY_LLAMA = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SWALLOWING = ("<|user|>", "<|assistant|>", "<|end|>")
"""Phi-3's special tokens, which swallow the white space that follows."""
MARK = "\u2581"


@cache
def sentence_piece() -> bytes:
    """A `tokenizer.model` as Llama 2's is: BPE, a space in front, rare characters as bytes."""
    import sentencepiece

    model = io.BytesIO()
    lines = [*LANGUAGES[:12], *Path(json.decoder.__file__).read_text(encoding="utf-8").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        character_coverage=0.99,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_json(kind: str) -> dict[str, Any]:
    """`prepend` is that of Mistral and Phi-3, `first` and `always` of Llama's classes, `never` as in Gemma and Yi."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers.tokenization_utils_base import generate_merges

    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto.FromString(sentence_piece())
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    special = ["<unk>", "<s>", "</s>"]
    merges = generate_merges(vocabulary, skip_tokens=special)
    names = [*((name, True) for name in (*special, *SWALLOWING)), ("<think>", False)]
    added = [
        {
            "id": vocabulary.get(name, len(vocabulary) + place - len(special)),
            "content": name,
            "special": is_special,
            "single_word": False,
            "lstrip": False,
            "rstrip": name in SWALLOWING,
            "normalized": False,
        }
        for place, (name, is_special) in enumerate(names)
    ]
    marks: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": MARK}, marks]}
    metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": kind, "split": False}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": MARK}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [] if kind == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    template: dict[str, Any] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    template["single"] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template["pair"] = [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"prepend": prepend, "never": marks}.get(kind),
        "pre_tokenizer": metaspace if kind in ("first", "always") else None,
        "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": [*decoders, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges],
        },
    }


def write_tokenizer(folder: Path, kind: str, template: str | None = LLAMA2, **config: Any) -> None:
    """A tokenizer in `folder`: of a kind of `tokenizer_json`, or, for `model`, a `tokenizer.model` and no more."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "model":
        (folder / "tokenizer.model").write_bytes(sentence_piece())
    else:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(kind)))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kinds = {"model": "LlamaTokenizer", "first": "LlamaTokenizer"}
    classes = {"tokenizer_class": kinds.get(kind, "PreTrainedTokenizerFast")}
    config = {"add_bos_token": True, **config} if kind == "model" else config
    whole = {**names, **classes, "chat_template": template, "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))


def write_model(folder: Path, kind: str, family: str = "Llama", **options: Any) -> Any:
    """A tiny model with that tokenizer in `folder`; returns the model.

    It writes no single bytes, since of runs that are no UTF-8 `transformers` makes other texts than we do.
    """
    import transformers

    write_tokenizer(folder, kind)
    tokenizers: Any = transformers.AutoTokenizer
    size = len(tokenizers.from_pretrained(folder))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, "vocab_size": size}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**shape, **sizes, **tokens, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.lm_head.weight[3:259] = model.lm_head.weight[303:559] / 2
    model.save_pretrained(folder)
    return model
