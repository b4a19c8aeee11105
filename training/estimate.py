"""What a training run takes before it is begun: parameters, arithmetic, memory by part, time and checkpoint size.

Parameters and floating-point operations are counted on the model itself, made without memory. So are activations: what
autograd keeps for the backward pass of one block is recorded in a forward pass on tensors that have shapes alone, at
two lengths; what grows between them belongs to a token, the rest to the weights. A compiled run recomputes some of it
and takes less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config.model import ModelConfig
from config.schema import Config
from config.section import divisors
from config.training import TrainingConfig
from model.loss import CHUNK
from model.transformer import DEAR, GradientCheckpointing, Transformer
from training.optimizers import sort_parameters
from training.plan import sequence_length

GIB = 2**30
CHINCHILLA_RATIO = 20  # tokens per parameter at the least loss for the compute; Hoffmann et al., 2022, table 3
MACHINE = 8  # GPUs, among which hsdp divides the model where training.shard_group does not say
STACK_BYTES = 16  # of each weight of the shape that has most: gradient, update, and two of the iteration
USABLE = 0.92  # of a GPU's memory; the rest goes to CUDA, the collectives' buffers and fragmentation


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU by its data sheet: dense bfloat16 FLOPs per second, and bytes of memory."""

    flops: float
    memory: int


GPUS = {
    "a100-40gb": Gpu(312e12, 40 * GIB),
    "a100": Gpu(312e12, 80 * GIB),
    "h100": Gpu(989e12, 80 * GIB),
    "h200": Gpu(989e12, 141 * 10**9),
    "b200": Gpu(2250e12, 180 * 10**9),
    "l40s": Gpu(362e12, 48 * GIB),
    "a10": Gpu(125e12, 24 * GIB),
    "rtx-3090": Gpu(71e12, 24 * GIB),
    "rtx-4090": Gpu(165e12, 24 * GIB),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that autograd keeps: for each token; of weights cast for the blocks; and outside them, whatever the batch.

    The last are the head in the type of the products, and its gradient, which the fused loss makes going forward.
    """

    per_token: float
    recomputed: float
    """For each token, while the backward pass is at a block that it computes again; 0 without that."""
    cast_blocks: int
    outside: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, by part: what stays, what the height of a forward and backward pass takes, and other moments.

    Each of the `others` is a moment of its own, when what the height of a pass takes is not there.
    """

    state: dict[str, int]
    passes: dict[str, int]
    others: dict[str, int]

    @property
    def parts(self) -> dict[str, int]:
        """All of them."""
        return self.state | self.passes | self.others

    @property
    def total(self) -> int:
        """The most at any time."""
        return sum(self.state.values()) + max(sum(self.passes.values()), *self.others.values())


class Sizes:
    """The counts of a configuration; a vocabulary left to the tokenizer is the one that `data.tokenizer` asks for."""

    def __init__(self, config: Config) -> None:
        training, vocab_size = config.training, config.model.vocab_size or config.data.tokenizer.vocab_size
        model = config.model.model_copy(update={"vocab_size": vocab_size})
        self.model, self.training = model, training
        self.length = sequence_length(model, training)
        with torch.device("meta"):
            made = Transformer(model)
        self._kept_by_precision: dict[bool, Kept] = {}
        groups = sort_parameters(made, with_muon=training.optimizer == "muon")
        self.parameters = made.num_parameters()
        self.stored = sum(parameter.numel() for parameter in made.parameters())
        self.largest_block = max(sum(p.numel() for p in block.parameters()) for block in made.blocks)
        self.outside_blocks = self.stored - sum(parameter.numel() for parameter in made.blocks.parameters())
        self.muon = sum(parameter.numel() for parameter in groups["muon"])
        stacks = Counter(parameter.shape for parameter in groups["muon"])
        self.largest_stack = max((number * shape.numel() for shape, number in stacks.items()), default=0)
        self.flops_per_token = made.flops_per_token(self.length)

    @property
    def optimizer_bytes(self) -> int:
        """Float32 moments: two of every weight for AdamW, one for Muon."""
        return 8 * (self.stored - self.muon) + 4 * self.muon

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and moments."""
        return 4 * self.stored + self.optimizer_bytes

    @property
    def optimal_tokens(self) -> int:
        """Tokens at which a model of this size is the best for its compute."""
        return CHINCHILLA_RATIO * self.parameters

    def largest_micro_batch(self, rows: int, shards: int, gpus: int, limit: float) -> int | None:
        """The most rows at a time, a divisor of `rows`, whose `memory` is within `limit`; None if not even one's is."""
        fitting = [size for size in divisors(rows) if self.memory(size, shards, gpus).total <= limit]
        return max(fitting, default=None)

    def _kept(self, mixed: bool) -> Kept:
        if mixed not in self._kept_by_precision:
            self._kept_by_precision[mixed] = kept_for_backward(self.model, self.training, mixed)
        return self._kept_by_precision[mixed]

    def memory(self, micro_batch_rows: int, shards: int = 1, gpus: int = 1, mixed: bool = True) -> Memory:
        """Bytes on one of `gpus` GPUs, of which `shards` divide weights, gradients and moments; 1 is no division.

        `mixed` is products in bfloat16 with float32 weights beside them. Divided weights are gathered block by block:
        the one at work and the next; beside them lie the gradients of one, whole, and these in float32 on their way.
        What is outside the blocks is gathered in float32, and at the end of a pass its gradients are there twice, too.
        Matrices that Muon moves are dealt to all GPUs.
        """
        kept = self._kept(mixed)
        tokens = micro_batch_rows * self.length
        # In float32 a logit and its log-probability, which turns into its gradient, and that in the products' type.
        logits = (10 if mixed else 8) * min(CHUNK, tokens) * self.model.padded_vocab_size
        outside = 4 * self.outside_blocks if shards > 1 else 0
        gathered = outside + self.largest_block * (3 * (2 if mixed else 4) + 4) if shards > 1 else 0
        return Memory(
            state={
                "weights": 4 * self.stored // shards,
                "gradients": 4 * self.stored // shards,
                "optimizer": self.optimizer_bytes // shards,
            },
            passes={
                "working copies": (gathered or kept.cast_blocks) + kept.outside,
                "activations": round((kept.per_token + kept.recomputed) * tokens),
                "logits of a chunk": logits,
            },
            others={
                "or: gradients outside the blocks": 3 * outside,
                "or: Muon's step": STACK_BYTES * self.largest_stack // gpus,
            },
        )


def kept_for_backward(model: ModelConfig, training: TrainingConfig, mixed: bool) -> Kept:
    """What autograd keeps, by forward passes of one block and of two, at two numbers of tokens."""
    dtype = torch.bfloat16 if mixed else torch.float32
    mode = training.gradient_checkpointing
    (token, fixed), (block_token, block_fixed) = _line(model, mode, dtype)
    whole_block_token = _line(model, "none", dtype)[1][0] if mode != "none" else block_token
    return Kept(
        per_token=token + (model.n_layers - 1) * block_token,
        recomputed=whole_block_token - block_token,
        cast_blocks=round(model.n_layers * block_fixed),
        outside=round(fixed - block_fixed),
    )


def _line(
    model: ModelConfig, mode: GradientCheckpointing, dtype: torch.dtype
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes for each token, and besides: of a model of one block, and of every further block."""
    few, many = 1024, 2048  # past where attention on a CPU takes another way
    lines = []
    for layers in (1, 2):
        short, long = (_kept(model, layers, tokens, mode, dtype) for tokens in (few, many))
        slope = (long - short) / (many - few)
        lines.append((slope, short - few * slope))
    return lines[0], (lines[1][0] - lines[0][0], lines[1][1] - lines[0][1])


def _kept(model: ModelConfig, layers: int, tokens: int, mode: GradientCheckpointing, dtype: torch.dtype) -> int:
    """Bytes of all storages that the backward pass needs, weights not counted."""
    config = model.model_copy(update={"n_layers": layers, "context_length": tokens, "dropout": 0.0})
    with FakeTensorMode(), _recording() as kept:
        made = Transformer(config)
        # Selective checkpointing keeps its products where autograd does not see them: they are met on the way.
        made.set_gradient_checkpointing("none" if mode == "none" else "full")
        products = _Products()  # type: ignore[no-untyped-call]
        for block in made.blocks if mode == "selective" else ():
            block.register_forward_pre_hook(products.enter)
            block.register_forward_hook(products.leave)
        inputs = torch.zeros(1, tokens, dtype=torch.int64)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            made(inputs, inputs)
        weights = {parameter.untyped_storage()._cdata for parameter in made.parameters()}
        return products.bytes + sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what selective checkpointing keeps of the modules whose hooks `enter` and `leave` are."""

    bytes = 0

    def enter(self, *_: object) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, *_: object) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in DEAR:
            self.bytes += sum(part.nbytes for part in tree_leaves(result) if isinstance(part, Tensor))
        return result


@contextmanager
def _recording() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages of all tensors that autograd saves inside the context, each once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
