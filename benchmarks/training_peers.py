"""One training run of a peer, by its own code, on our tokens: the process that `benchmarks/training.py` starts.

    python -m benchmarks.training_peers task.json result.json

nanoGPT and nanochat run their own training scripts, unchanged, and litgpt and Hugging Face their own loops. What is
ours here is the data (random windows of `train.bin`) and the score afterwards, by one function for all. Step times are
those that the peer prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.tokenization import load_tokenizer
from data.tokens import TokenFiles
from evaluation.perplexity import default_batch_size, evaluate_tokens

PRINTED_TIME = re.compile(r"(?:, time |\| dt: |iter time: )([\d.]+) ?ms")


@dataclass(frozen=True)
class Task:
    """What to train: a model of this shape for `steps` updates of `rows` x `length` tokens."""

    peer: str
    checkout: str
    tokens_dir: str
    tokenizer_dir: str
    vocab_size: int
    n_layers: int
    n_heads: int
    d_model: int
    rows: int
    length: int
    steps: int
    learning_rate: float
    seed: int
    device: str
    compile: bool
    score: bool
    folder: str


@dataclass(frozen=True)
class Result:
    """How it went: seconds of every update, FLOPs per token, peak memory in bytes; the score where it was asked for."""

    seconds: list[float]
    flops_per_token: float
    peak_memory: int
    loss: float | None
    bits_per_byte: float | None


class Windows:
    """Random windows of `train.bin`: `(rows, length + 1)` int64, from a seed."""

    def __init__(self, task: Task) -> None:
        self.tokens = TokenFiles(Path(task.tokens_dir), "train")
        self.rows, self.length = task.rows, task.length
        self.generator = np.random.default_rng(task.seed)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            starts = self.generator.integers(0, len(self.tokens) - self.length - 1, self.rows)
            rows = [self.tokens.read(int(start), self.length + 1).astype(np.int64) for start in starts]
            yield torch.from_numpy(np.stack(rows))


class Logits(nn.Module):
    """A peer's model behind the call that our evaluation makes: token ids to the logits of every position."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)`."""
        return self.call(self.model, tokens)


def nanogpt(task: Task) -> tuple[list[float], Logits]:
    """Its `train.py`, with the settings of its README's Shakespeare run but for the shape and what the task says."""
    folder = Path(task.folder)
    for name in ("train.bin", "val.bin"):
        (folder / name).symlink_to(Path(task.tokens_dir) / name)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": task.vocab_size}))
    flags: dict[str, Any] = {
        "dataset": folder,
        "out_dir": folder / "out",
        "device": task.device,
        "compile": task.compile,
        "eval_iters": 1,
        "eval_interval": 10 * task.steps,
        "log_interval": 1,
        "gradient_accumulation_steps": 1,
        "batch_size": task.rows,
        "block_size": task.length,
        "n_layer": task.n_layers,
        "n_head": task.n_heads,
        "n_embd": task.d_model,
        "dropout": 0.0,
        "learning_rate": task.learning_rate,
        "min_lr": task.learning_rate / 10,
        "max_iters": task.steps - 1,
        "lr_decay_iters": task.steps,
        "warmup_iters": min(100, task.steps // 10),
    }
    words = ["train.py", "config/train_shakespeare_char.py", *(f"--{name}={value}" for name, value in flags.items())]
    left, printed = _run(task, "train.py", words)
    return _times(printed), Logits(left["raw_model"], lambda model, tokens: model(tokens, targets=tokens)[0])


def nanochat(task: Task) -> tuple[list[float], Logits]:
    """Its `scripts/base_train.py` with its own defaults and scaling rules; every layer sees the whole context."""

    def batches(*_: Any, **__: Any) -> Iterator[tuple[Tensor, Tensor, dict[str, int]]]:
        for window in Windows(task):
            moved = window.to(task.device)
            yield moved[:, :-1].contiguous(), moved[:, 1:].contiguous(), {"epoch": 0, "pq_idx": 0, "rg_idx": 0}

    class Vocabulary:
        def get_vocab_size(self) -> int:
            return task.vocab_size

    _stand_in("nanochat.tokenizer", get_tokenizer=Vocabulary, get_token_bytes=lambda device: None)
    _stand_in(
        "nanochat.dataloader",
        tokenizing_distributed_data_loader_bos_bestfit=batches,
        tokenizing_distributed_data_loader_with_state_bos_bestfit=batches,
    )
    _stand_in("scripts.base_eval", evaluate_core=None)
    _stand_in("nanochat.engine", Engine=None)
    _stand_in("nanochat.checkpoint_manager", save_checkpoint=lambda *_, **__: None, load_checkpoint=None)
    os.environ["NANOCHAT_BASE_DIR"] = task.folder
    flags = {
        "depth": task.n_layers,
        "aspect-ratio": task.d_model // task.n_layers,
        "head-dim": task.d_model // task.n_heads,
        "max-seq-len": task.length,
        "window-pattern": "L",
        "num-iterations": task.steps,
        "device-batch-size": task.rows,
        "total-batch-size": task.rows * task.length,
        "eval-every": -1,
        "core-metric-every": -1,
        "sample-every": -1,
        "device-type": task.device,
    }
    left, printed = _run(task, "scripts/base_train.py", ["base_train", *(f"--{k}={v}" for k, v in flags.items())])
    return _times(printed), Logits(left["orig_model"], lambda model, tokens: model(tokens)[..., : task.vocab_size])


def transformers(task: Task) -> tuple[list[float], Logits]:
    """`Trainer` with GPT-2, AdamW and a cosine schedule as nanoGPT has them."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for window in Windows(task):
                for row in window:
                    yield {"input_ids": row[:-1], "labels": row[:-1]}  # the model shifts them itself

    class Clock(TrainerCallback):
        ends = [0.0]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if task.device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    shape: dict[str, Any] = {"n_layer": task.n_layers, "n_head": task.n_heads, "n_embd": task.d_model}
    shape |= {"n_positions": task.length, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=task.vocab_size, **shape))
    arguments = TrainingArguments(
        output_dir=task.folder,
        per_device_train_batch_size=task.rows,
        max_steps=task.steps,
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, task.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.99,
        bf16=task.device == "cuda",
        torch_compile=task.compile,
        use_cpu=task.device == "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=task.seed,
    )
    clock = Clock()
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock]).train()
    return np.diff(clock.ends)[1:].tolist(), Logits(model, lambda model, tokens: model(tokens).logits)


def litgpt(task: Task) -> tuple[list[float], Logits]:
    """Its `pretrain` with its GPT class in GPT-2's shape (it has no learned positions: rotary ones) and its AdamW."""
    package, pretrain, arguments, data = map(
        importlib.import_module, ("litgpt", "litgpt.pretrain", "litgpt.args", "litgpt.data")
    )
    found: list[nn.Module] = []

    class OurTokens(data.DataModule):  # type: ignore[misc, name-defined]
        def connect(self, *_: Any, **__: Any) -> None:
            pass

        def train_dataloader(self) -> Any:
            source: Any = _Endless(Windows(task))
            return torch.utils.data.DataLoader(source, batch_size=None)

        val_dataloader = train_dataloader

    def keep(_: Any, state: dict[str, Any], *__: Any) -> None:
        module = state["model"].module
        found.append(getattr(module, "_orig_mod", module))

    setattr(pretrain, "save_checkpoint", keep)
    shape = {"n_layer": task.n_layers, "n_head": task.n_heads, "n_embd": task.d_model, "block_size": task.length}
    config = package.Config(name="pythia-14m", vocab_size=task.vocab_size, padded_vocab_size=task.vocab_size, **shape)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pretrain.setup(
            model_name="pythia-14m",
            model_config=config,
            out_dir=Path(task.folder) / "out",
            precision="bf16-mixed" if task.device == "cuda" else "32-true",
            data=OurTokens(),
            train=arguments.TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=task.rows,
                micro_batch_size=task.rows,
                lr_warmup_steps=min(100, task.steps // 10),
                max_tokens=task.steps * task.rows * task.length,
                max_norm=1.0,
                min_lr=task.learning_rate / 10,
            ),
            eval=arguments.EvalArgs(
                interval=10 * task.steps, max_iters=1, initial_validation=False, final_validation=False
            ),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": task.learning_rate, "weight_decay": 0.1, "betas": [0.9, 0.99]},
            },
            devices=1,
            logger_name="csv",
            seed=task.seed,
        )
    return _times(printed.getvalue()), Logits(found[0], lambda model, tokens: model(tokens))


class _Endless(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.windows)


PEERS = {"nanogpt": nanogpt, "nanochat": nanochat, "transformers": transformers, "litgpt": litgpt}


def _run(task: Task, script: str, words: list[str]) -> tuple[dict[str, Any], str]:
    """Run a script of the checkout as if it had been called with `words`; its variables, and what it printed."""
    seed = torch.manual_seed
    torch.manual_seed = lambda _: seed(task.seed)  # type: ignore[assignment]  # theirs is a constant
    os.chdir(task.checkout)
    sys.path.insert(0, task.checkout)
    sys.argv = words
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        left = runpy.run_path(script, run_name="__main__")
    return left, printed.getvalue()


def _stand_in(module: str, **contents: Any) -> None:
    """Let an import of `module` find `contents`: nothing of it is used but these names."""
    stand_in = ModuleType(module)
    stand_in.__dict__.update(contents)
    sys.modules[module] = stand_in


def _times(printed: str) -> list[float]:
    return [float(found) / 1000 for found in PRINTED_TIME.findall(printed)]


def _matrix_parameters(model: nn.Module) -> int:
    """Weights that multiply: those of linear layers, the output matrix among them."""
    linear = (module for module in model.modules() if type(module).__name__ in ("Linear", "Conv1D"))
    weights: dict[int, Tensor] = {id(module.weight): module.weight for module in linear}  # type: ignore[misc]
    return sum(weight.numel() for weight in weights.values())


def _peak_memory() -> int:
    """Bytes, on Linux; unlike `ru_maxrss` not begun with the peak of the process that started this one."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def score_model(model: nn.Module, task: Task) -> tuple[float, float | None]:
    """Loss and bits per byte over every token of `val.bin`."""
    tokenizer = load_tokenizer(Path(task.tokenizer_dir))
    found = evaluate_tokens(
        model,
        TokenFiles(Path(task.tokens_dir), "val"),
        context_length=task.length,
        stride=task.length // 2,
        batch_size=default_batch_size(task.length, task.vocab_size, task.device),
        device=task.device,
        token_bytes=tokenizer.token_bytes(),
    )
    return found.loss, found.bits_per_byte


def main() -> None:
    """Run the task in the file that is the first argument; write the result to the second."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    target = Path(sys.argv[2]).resolve()
    load_tokenizer(Path(task.tokenizer_dir))  # before a peer's modules can stand in the way of ours
    seconds, model = PEERS[task.peer](task)
    on_gpu = task.device == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_memory()
    loss, bits_per_byte = score_model(model, task) if task.score else (None, None)
    flops = 6 * _matrix_parameters(model) + 12 * task.n_layers * task.d_model * task.length
    result = Result(seconds, flops, memory, loss, bits_per_byte)
    target.write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
