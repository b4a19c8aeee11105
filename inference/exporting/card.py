"""The page that lies beside exported weights: what the checkpoint tells about the model, and how to load it."""

from __future__ import annotations

from inference.exporting.subject import Subject

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [quern]
---

# {name}

{made}

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
{use}
```

or `{serve}`.

Special tokens spelled out in a text become special tokens; where the text comes from others, give the tokenizer
`split_special_tokens=True`.
"""
_COMPLETE = """\
inputs = tokenizer("The future of AI is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))"""
_CHAT = """\
messages = [{"role": "user", "content": "What is a quern?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))"""


def serve_command(subject: Subject, folder: str) -> str:
    """How vLLM serves the folder. Its own Apertus has another activation, so that one goes by way of `transformers`."""
    return f"vllm serve {folder}" + (" --model-impl transformers" if "Apertus" in subject.architecture else "")


def model_card(subject: Subject, folder: str) -> str:
    """README.md for the folder called `folder`, as Hugging Face's hub shows it."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in _facts(subject).items())
    return _CARD.format(
        name=subject.name,
        made="A language model trained with Quern." if subject.info.step else "A language model, written by Quern.",
        rows=rows,
        folder=folder,
        use=_CHAT if subject.chat else _COMPLETE,
        serve=serve_command(subject, folder),
    )


def _facts(subject: Subject) -> dict[str, str]:
    config, info = subject.config, subject.info
    heads = f"{config.n_heads} heads, {config.kv_heads} of keys and values"
    facts = {
        "architecture": f"`{subject.architecture}`: {config.n_layers} layers of width {config.d_model}, {heads}",
        "parameters": f"{subject.parameters:,}",
        "data type": str(subject.theirs.dtype).removeprefix("torch."),
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{subject.tokenizer.vocab_size:,} tokens, BPE",
    }
    if info.step:
        facts["steps of training"] = f"{info.step:,}"
    if subject.tokens is not None:
        facts["tokens trained on"] = f"{subject.tokens:,}"
    if info.finetuning is not None:
        facts["fine-tuned on"] = {"messages": "conversations, in the tokenizer's chat template"}.get(
            info.finetuning["format"], info.finetuning["format"]
        )
    if info.validation_loss is not None:
        unit = "pair" if info.finetuning and "reference" in info.finetuning else "token"
        facts["validation loss"] = f"{info.validation_loss:.4f} nats per {unit}"
    return facts
