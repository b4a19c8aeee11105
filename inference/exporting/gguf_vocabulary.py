"""The tokenizer in a GGUF file: the vocabulary, what its tokens are, and what begins and ends a text.

llama.cpp has two kinds that matter here. "gpt2" is byte-level BPE, by merges. "llama" is SentencePiece: it joins
neighbours as long as the two make a token, that of the highest score first; so the scores must give the order of the
merges, and no token may be there that the merges do not make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from config.errors import UserError
from data.tokenization.byte_fallback import BYTE, steps
from data.tokenization.byte_level import LLAMA3_PATTERN
from data.tokenization.probes import probe_texts
from data.tokenization.special import SPACE
from inference.exporting.subject import Subject

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

Vocabulary = tuple[list[str], list[float], list[gguf.TokenType]]
"""Of every id: what is written, its score, and its type."""


def add_vocabulary(writer: gguf.GGUFWriter, subject: Subject, description: dict[str, Any]) -> None:
    """Describe the tokenizer of `subject`, whose `tokenizer.json` holds `description`.

    Raises `UserError` where llama.cpp's would give other ids.
    """
    size = subject.theirs.config.vocab_size
    if description["model"].get("byte_fallback"):
        _add_sentence_piece(writer, subject.tokenizer, description, size)
    else:
        _add_byte_level(writer, description, size)
    _add_offices(writer, subject)


def _add_offices(writer: gguf.GGUFWriter, subject: Subject) -> None:
    tokenizer = subject.tokenizer
    if len(subject.ends) > 3 or list(tokenizer.prefix_ids) not in ([], [subject.beginning]):
        raise UserError(
            "A GGUF file names at most three tokens that end a text, and one to stand before it; here are more."
        )
    writer.add_bos_token_id(subject.beginning)
    writer.add_pad_token_id(tokenizer.pad_id)
    for add, end in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), subject.ends):
        add(end)
    writer.add_add_bos_token(bool(tokenizer.prefix_ids))
    if subject.chat and tokenizer.chat_template is not None:  # programs of llama.cpp begin a chat wherever there is one
        writer.add_chat_template(tokenizer.chat_template)


def _add_byte_level(writer: gguf.GGUFWriter, description: dict[str, Any], size: int) -> None:
    names, types = _named(description)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pattern_name(description["pre_tokenizer"]))
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _named(description: dict[str, Any]) -> tuple[dict[int, str], dict[int, gguf.TokenType]]:
    names = {index: name for name, index in description["model"]["vocab"].items()}
    types = {index: gguf.TokenType.NORMAL for index in names}
    for token in description["added_tokens"]:
        names[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    return names, types


def _pattern_name(pre_tokenizer: dict[str, Any]) -> str:
    """What llama.cpp calls the pattern by which text is cut into words; `UserError` where it has none."""
    if pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer["use_regex"]:
        return "gpt-2"
    for step in pre_tokenizer.get("pretokenizers", []):
        if step["type"] == "Split" and step["pattern"] == {"Regex": LLAMA3_PATTERN}:
            return "llama-bpe"
    raise UserError("llama.cpp has no tokenizer that cuts text into words as this one does; it knows gpt2 and llama3.")


def _add_sentence_piece(writer: gguf.GGUFWriter, tokenizer: Tokenizer, description: dict[str, Any], size: int) -> None:
    unknown = tokenizer.named_tokens.get("unk_token", "<unk>")
    names, scores, types = vocabulary = _scored(description, size, unknown)
    prefixed = any(
        step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for part in ("normalizer", "pre_tokenizer")
        for step in steps(description[part])
    )
    _check_ids(tokenizer, vocabulary, prefixed)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefixed)
    if gguf.TokenType.UNKNOWN in types:
        writer.add_unk_token_id(types.index(gguf.TokenType.UNKNOWN))


def _scored(description: dict[str, Any], size: int, unknown: str) -> Vocabulary:
    """A token's score is its place among what the merges make, below zero, as SentencePiece numbers them."""
    names, types = _named(description)
    places: dict[str, int] = {}
    for merge in description["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, len(places))
    for index, name in names.items():
        if BYTE.fullmatch(name):
            types[index] = gguf.TokenType.BYTE
        elif name == unknown:
            types[index] = gguf.TokenType.UNKNOWN
    everything = range(size)
    written = [names.get(index, f"[PAD{index}]") for index in everything]
    kinds = [types.get(index, gguf.TokenType.UNUSED) for index in everything]
    normal = (gguf.TokenType.NORMAL,)
    scores = [-float(places.get(name, len(places))) if kind in normal else 0.0 for name, kind in zip(written, kinds)]
    return written, scores, kinds


def _check_ids(tokenizer: Tokenizer, vocabulary: Vocabulary, prefixed: bool) -> None:
    """Raise `UserError` unless SentencePiece, with that vocabulary, gives the ids of `tokenizer`.

    Where a text begins with a space, it puts another one in front, and some imported tokenizers do not; that is left
    to it, since their models were trained with SentencePiece's own ids.
    """
    library = _library(vocabulary, prefixed)
    texts = [text for text in probe_texts() if not text.startswith((" ", SPACE))]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if not np.array_equal(library.encode(text), ids):
            raise UserError(
                f"llama.cpp's tokenizer would give other ids than this one for {text[:40]!r}, so it cannot be exported "
                "to gguf; the folder of --to huggingface has it as it is."
            )


def _library(vocabulary: Vocabulary, prefixed: bool) -> Any:
    """SentencePiece's own library, which joins tokens by the rules of llama.cpp's."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    for name, score, kind in zip(*vocabulary, strict=True):
        model.pieces.add(piece=name, score=score, type=int(kind))
    if gguf.TokenType.UNKNOWN not in vocabulary[2]:
        model.pieces.add(piece="<unk>", type=int(gguf.TokenType.UNKNOWN))
    model.trainer_spec.model_type = messages.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefixed
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())
