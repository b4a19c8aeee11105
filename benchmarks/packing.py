"""What packing the examples of fine-tuning saves: seconds for an epoch, packed and padded by turns.

    python -m benchmarks.packing --dataset corpus/finetuning/docstrings-prompt-completion.jsonl

The model is a checkpoint of your own; forward and backward passes are timed, without the optimizer, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from data.data_loader import SampleSource
from data.examples.encoding import encode_examples
from data.examples.packed import PackedExamples
from data.examples.reading import read_examples
from data.examples.samples import ExampleSamples
from data.tokenization.matching import matching_tokenizer
from model.checkpoint import load_model
from model.checkpoint_folder import resolve_checkpoint
from model.transformer import Transformer


def main() -> None:
    """Print the size of both forms of the set, and the seconds of every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", default="latest")
    parser.add_argument("--examples", type=int, default=512, help="of the set, the first so many")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, info = load_model(resolve_checkpoint(options.checkpoint, Path("checkpoints")))
    tokenizer = matching_tokenizer(info.tokenizer_fingerprint, [Path(info.config["data"]["tokenizer_dir"])])
    examples = read_examples(options.dataset)[: options.examples]
    context = model.config.context_length
    padded = ExampleSamples(
        encode_examples(tokenizer, examples, context, "drop").samples, tokenizer.pad_id, context_length=context
    )
    sources: dict[str, tuple[SampleSource, int]] = {"padded": (padded, 16)}
    packed = PackedExamples(padded, context)
    sources["packed"] = (packed, max(1, round(16 / packed.examples_per_sample)))
    for name, (source, rows) in sources.items():
        length = len(source.sample(0)[0])
        print(f"{name}: {len(source):,} sequences of {length} for {padded.tokens:,} tokens, {rows} in a batch")
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(options.rounds):
        for name, (source, rows) in sources.items():
            seconds[name].append(_epoch(model, source, rows))
    for name, found in seconds.items():
        print(f"{name}: {statistics.median(found):.2f} s an epoch ({', '.join(f'{each:.2f}' for each in found)})")
    ratios = [one / other for one, other in zip(seconds["padded"], seconds["packed"], strict=True)]
    print(f"packed is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def _epoch(model: Transformer, source: SampleSource, rows: int) -> float:
    """Seconds of process time for a forward and a backward pass over every sample of `source`, `rows` at once."""
    started = time.process_time()
    for first in range(0, len(source), rows):
        samples = [source.sample(index) for index in range(first, min(first + rows, len(source)))]
        parts = [torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*samples, strict=True)]
        model(parts[0], parts[1], documents=parts[2] if len(parts) == 3 else None).backward()
        model.zero_grad()
    return time.process_time() - started


if __name__ == "__main__":
    main()
