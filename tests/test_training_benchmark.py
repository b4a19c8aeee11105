"""The comparison with other trainers, against a stand-in for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.training import main, peak_memory
from tests.small_runs import SMALL, write_corpus

# nanoGPT as far as the comparison goes: its flags, the line it prints for every update, and the model it leaves.
NANOGPT = """
import pickle
import sys

import torch

assert sys.argv[1] == "config/train_shakespeare_char.py"
flags = dict(word[2:].split("=") for word in sys.argv[2:])
vocab_size = pickle.load(open(flags["dataset"] + "/meta.pkl", "rb"))["vocab_size"]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(int(flags["n_embd"]), vocab_size)

    def forward(self, tokens, targets):
        return torch.zeros(*tokens.shape, vocab_size), None

for step in range(int(flags["max_iters"]) + 1):
    print(f"iter {step}: loss 4.0000, time {1000 * (step + 1):.2f}ms, mfu 1.00%")
raw_model = Model()
"""


@pytest.mark.slow
def test_a_peer_and_ours_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    peer = tmp_path / "nanoGPT"
    peer.mkdir()
    (peer / "README.md").touch()
    (peer / "train.py").write_text(NANOGPT)
    (tmp_path / "recipe.yaml").write_text("training: {batch_size: 8}")
    words = ["speed", "--config", "recipe.yaml", "--peer", f"nanogpt={peer}", "--rounds", "1", "--no-compile"]
    monkeypatch.setattr("sys.argv", ["training.py", *words, "--steps", "6", *SMALL])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert not ended.value.code, shown.err
    rows = {cells[1]: cells for line in shown.out.splitlines() if len(cells := line.split("\u2502")) > 5}
    names = {name.strip(): [cell.strip() for cell in cells[2:-1]] for name, cells in rows.items()}
    assert list(names) == ["Quern, nanoGPT's model and AdamW", "Quern, as configured", "nanogpt"]
    updates, seconds, rate, *_ = names["nanogpt"]
    assert (updates, seconds) == ("6", "30.0"), "the first three updates, which warm up, count as an average one"
    assert rate == str(round(8 * 32 / 5.0)), "of the median of the others"


def test_memory_is_that_of_the_device() -> None:
    assert peak_memory(torch.device("cuda"), [3, 5, 4], process=100) == 5
    assert peak_memory(torch.device("cpu"), [3, 5, 4], process=100) == 100
