"""Folders of Llama 2's kind, imported, used and sent back: what the model reads and writes is as in `transformers`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import torch

from config.errors import UserError
from data.examples.encoding import encode_examples
from data.examples.preferences import PreferenceExample
from data.examples.reading import CompletionExample
from data.tokenization import load_tokenizer
from data.tokenization.probes import LANGUAGES, probe_texts
from evaluation.downstream import read_results
from inference.engine import Engine, Request
from inference.prompting import chat_prompt, with_token_ids
from inference.sampling import SamplingSettings
from model.checkpoint import load_model
from scripts.eval import evaluate
from scripts.export import export
from tests.llama_folders import MARK, sentence_piece, tokenizer_json, write_model
from tests.test_downstream import NAMES, TASKS, lines

TEXTS = [
    "",
    " ",
    "The end",
    "  two  ",
    " naïve café 日本語 🙂\u200d\n\n",
    "</s> and <s>x <|end|>\n y",
    "<think>a</think>",
]


def bring_in(folder: Path, kind: str, family: str = "Llama", length: int | None = None, **options: Any) -> Any:
    """A folder `theirs` of that kind, imported to `ours` beside it; returns the model."""
    theirs = write_model(folder / "theirs", kind, family, **options)
    import_module("scripts.import").import_model(str(folder / "theirs"), output=folder / "ours", context_length=length)
    return theirs


def test_a_prompt_that_is_cut_keeps_the_token_that_begins_every_text(tmp_path: Path) -> None:
    bring_in(tmp_path, "first")
    _, info = load_model(tmp_path / "ours/model_step_0.pt")
    tokenizer = load_tokenizer(Path(info.config["data"]["tokenizer_dir"]))
    asked, said = "All human beings are born free and equal " * 3, "The end"
    prompt, ending = tokenizer.encode(asked), [*tokenizer.encode(said, continued=True), tokenizer.end_of_text_id]
    pair = PreferenceExample("b:1", asked, said, "The")
    found = encode_examples(tokenizer, [CompletionExample("a:1", asked, said), pair], len(ending) + 5, "truncate")
    assert found.shortened == 2 and len(prompt) > 6
    for sample in found.samples[:2]:
        assert sample.ids.tolist() == [1, *prompt[-5:], *ending] and sample.trained.sum() == len(ending)
    assert found.samples[2].ids[:6].tolist() == [1, *prompt[-5:]]
    alone = CompletionExample("a:2", asked, said)
    assert len(encode_examples(tokenizer, [alone], len(ending), "truncate").samples[0].ids) == len(ending) + 1
    with pytest.raises(UserError, match="All 1 examples are longer"):
        encode_examples(tokenizer, [alone], len(ending) - 1, "truncate")


@pytest.mark.parametrize(
    ("kind", "family", "options"),
    [("first", "Llama", {}), ("prepend", "Mistral", {"sliding_window": 48}), ("model", "Llama", {})],
    ids=["llama2", "mistral", "tokenizer.model"],
)
def test_a_text_goes_on_as_in_transformers(tmp_path: Path, kind: str, family: str, options: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    theirs = bring_in(tmp_path, kind, family, options.get("sliding_window"), **options)
    model, info = load_model(tmp_path / "ours/model_step_0.pt")
    tokenizer = load_tokenizer(Path(info.config["data"]["tokenizer_dir"]))
    reference: Any = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer.prefix_ids == (1,) and tokenizer.ending_ids == (2,)

    length = model.config.context_length
    assert length == options.get("sliding_window", 64)
    ids = torch.randint(0, 700, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[..., : theirs.vocab_size], theirs(ids).logits, rtol=0, atol=1e-4)

    asked = "All human beings are"
    prompt = reference(asked, return_tensors="pt")["input_ids"]
    wanted = theirs.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)[0].tolist()
    assert prompt[0].tolist() == [*tokenizer.prefix_ids, *tokenizer.encode(asked)]
    greedy = SamplingSettings(temperature=0.0)
    requests = [Request(prompt[0].tolist(), 16, greedy), Request(prompt[0].tolist(), 16, greedy, answer=True)]
    texts = ["", ""]
    for piece in Engine(model, tokenizer, 2).generate(requests):
        texts[piece.sequence] += piece.text
    assert asked + texts[0] == reference.decode(wanted, skip_special_tokens=True)
    assert texts[1] == reference.decode(wanted[prompt.shape[1] :], skip_special_tokens=True)

    messages = [{"role": "user", "content": "Who?"}]
    question, _ = chat_prompt(tokenizer, messages, 64, 0)
    assert question == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_window_shorter_than_the_context_asks_for_a_shorter_context(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sees 48 tokens.*Add --context-length 48"):
        bring_in(tmp_path, "prepend", "Mistral", sliding_window=48)
    assert not (tmp_path / "ours").exists()


def test_a_text_names_the_token_that_it_is_within_a_sentence(tmp_path: Path) -> None:
    from config.load import load_config

    bring_in(tmp_path, "first")
    tokenizer = load_tokenizer(tmp_path / "ours/tokenizer")
    whole, inner = tokenizer.encode("a", continued=False), tokenizer.encode("a", continued=True)
    assert whole != inner
    settings = load_config().generation.model_copy(update={"logit_bias": {"a": 1.0, " a": 2.0}})
    assert with_token_ids(settings, tokenizer).logit_bias == {inner[0]: 1.0, whole[0]: 2.0}


def test_a_tokenizer_model_that_is_converted_wrongly_is_refused_with_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other ids than it for .* python -c") as refused:
        bring_in(tmp_path, "model", "Mistral", sliding_window=None)
    subprocess.run([sys.executable, "-c", str(refused.value).split('"')[1]], check=True, timeout=900)
    import_module("scripts.import").import_model(str(tmp_path / "theirs"), output=tmp_path / "ours")
    ours = load_tokenizer(tmp_path / "ours/tokenizer")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece())
    assert ours.prefix_ids == (1,) and ours.encode("The end") == theirs.encode("The end")


@pytest.mark.parametrize("kind", ["first", "prepend", "never", "model"])
def test_an_import_leaves_as_it_came(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = bring_in(tmp_path, kind)
    export(tmp_path / "again", checkpoint=str(tmp_path / "ours"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    before, after = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("theirs", "again"))
    for text in TEXTS:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids) == before.decode(ids)
    messages = [{"role": "user", "content": "hello"}]
    assert before.apply_chat_template(messages, tokenize=False) == after.apply_chat_template(messages, tokenize=False)
    import_module("scripts.import").import_model(str(tmp_path / "again"), output=tmp_path / "back")
    first, second = (load_tokenizer(tmp_path / f"{folder}/tokenizer") for folder in ("ours", "back"))
    assert first.fingerprint == second.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["first", "prepend"])
def test_figures_equal_those_of_lm_eval_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    bring_in(tmp_path, kind, max_position_embeddings=256)
    questions = [
        {"context": f"The {word} is", "choices": [f"{word}s", "the end", "  two"], "gold": number % 3}
        for number, word in enumerate(["mill", "café", "日本", "🙂", "quern", "stone"])
    ]
    lines(tmp_path / "tasks/choice.jsonl", questions)
    lines(tmp_path / "tasks/texts.jsonl", [{"text": text} for text in LANGUAGES[:4]])
    for task in TASKS:
        (tmp_path / f"tasks/{task.split()[1]}.yaml").write_text(task.replace("FOLDER", str(tmp_path / "tasks")))
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "theirs"), "dtype": "float32"},
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
    )
    settings = ["training.precision=fp32", "training.device=cpu"]
    evaluate(settings, checkpoint="ours", tasks=",".join(NAMES), include_path=[tmp_path / "tasks"])
    ours = read_results(tmp_path / "ours/tasks.json")
    assert theirs is not None
    for name in NAMES:
        found = {key: one["value"] for key, one in ours[name]["metrics"].items()}
        assert found == pytest.approx({key: theirs["results"][name][f"{key},none"] for key in found}, rel=1e-4)
    samples = sorted(theirs["samples"]["own_writing"], key=lambda sample: int(sample["doc_id"]))
    written = [sample["filtered_resps"][0] for sample in samples]
    assert any(text.strip() for text in written)
    lines(
        tmp_path / "again/choice.jsonl",
        [{**one, "choices": [text] * 3} for one, text in zip(questions, written, strict=True)],
    )
    task = (tmp_path / "tasks/own_writing.yaml").read_text()
    (tmp_path / "again/own_writing.yaml").write_text(task.replace("/tasks/", "/again/"))
    evaluate(settings, checkpoint="ours", tasks="own_writing", include_path=[tmp_path / "again"])
    assert read_results(tmp_path / "ours/tasks.json")["own_writing"]["outcomes"]["exact_match"] == [1.0] * 6


def of_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """SentencePiece's own library with the vocabulary of a GGUF file, and what the file says of the tokenizer."""
    from sentencepiece import sentencepiece_model_pb2

    fields = gguf.GGUFReader(path).fields.items()
    own = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields}
    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto.FromString(sentence_piece())
    del model.pieces[:]
    for name, score, kind in zip(own["tokens"], own["scores"], own["token_type"], strict=True):
        model.pieces.add(piece=name, score=score, type=kind)
    model.normalizer_spec.add_dummy_prefix = own["add_space_prefix"]
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()), own


@pytest.mark.parametrize("kind", ["first", "prepend", "never", "model"])
def test_an_import_becomes_a_gguf_file_of_sentencepiece(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    bring_in(tmp_path, kind)
    export(tmp_path / "model.gguf", to="gguf", checkpoint=str(tmp_path / "ours"))
    library, own = of_gguf(tmp_path / "model.gguf")
    assert (own["model"], own["add_space_prefix"]) == ("llama", kind != "never")
    assert (own["bos_token_id"], own["eos_token_id"], own["unknown_token_id"]) == (1, 2, 0)
    assert own["add_bos_token"] is True
    types = dict(zip(own["tokens"], map(gguf.TokenType, own["token_type"])))
    assert types["<unk>"] == gguf.TokenType.UNKNOWN and types["<0x0A>"] == gguf.TokenType.BYTE
    assert types["</s>"] == gguf.TokenType.CONTROL and types[MARK] == gguf.TokenType.NORMAL
    if kind != "model":
        assert types["<think>"] == gguf.TokenType.USER_DEFINED and types["<|end|>"] == gguf.TokenType.CONTROL
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    texts = [text for text in [*TEXTS, *probe_texts()[:200]] if not text.startswith((" ", MARK, "<think>"))]
    for text in texts:
        assert library.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_merges_fewer_than_sentencepiece_would_make_are_not_written_to_gguf(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "prepend")
    whole = tokenizer_json("prepend")
    first = {left + right: [left, right] for left, right in reversed(whole["model"]["merges"])}
    whole["model"]["merges"] = [merge for merge in whole["model"]["merges"] if merge == first["".join(merge)]]
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(whole))
    import_module("scripts.import").import_model(str(tmp_path / "theirs"), output=tmp_path / "ours")
    with pytest.raises(UserError, match="llama.cpp's tokenizer would give other ids"):
        export(tmp_path / "model.gguf", to="gguf", checkpoint=str(tmp_path / "ours"))
    assert not (tmp_path / "model.gguf").exists()
