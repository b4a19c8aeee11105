"""What a user is told to type: every line parses, and the README's road runs from raw text to generated text."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from config.load import load_config

ROOT = Path(__file__).parents[1]
ROAD = "The road, command by command"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

SMALL = [
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_model=32",
    "model.context_length=64",
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "training.log_interval=2",
    "training.eval_interval=4",
    "training.eval_tokens=1024",
    "training.checkpoint_interval=4",
    "training.sample_interval=8",
    "training.wandb.mode=off",
    "generation.max_new_tokens=8",
]
# The commands of the README's road, and what a test adds so that each takes seconds. Nothing is left out of this list
# but the installation, which CI runs, and the server.
TYPED: dict[str, list[str]] = {
    "python data/download_datasets.py": [],
    "python data/download_datasets.py --list": [],
    "python data/download_datasets.py --list --available": [],
    "python data/tokenizer.py": ["data.tokenizer.vocab_size=512", "data.tokenizer.max_training_bytes=500000"],
    "python data/preprocess.py --dry-run 1000": ["data.tokenizer.vocab_size=512"],
    "python data/preprocess.py": ["data.tokenizer.vocab_size=512", "data.preprocess.validation_fraction=0.01"],
    "python scripts/train.py": [*SMALL, "training.max_steps=8"],
    "python scripts/train.py --resume latest": ["training.max_steps=12"],
    "python scripts/distributed_train.py --gpus 4": [*SMALL, "training.max_steps=8"],
    "python scripts/eval.py": [],
    "python scripts/eval.py --tasks quern": ["--limit", "5"],
    'python scripts/generate.py --prompt "The future of AI is"': ["generation.max_new_tokens=8"],
    "python scripts/finetune.py --dataset path/to/custom_data.jsonl": [
        *[setting for setting in SMALL if not setting.startswith("model.")],
        "training.epochs=1",
    ],
    "python scripts/export.py --to huggingface exported": [],
    "python scripts/import.py exported": [],
    "python scripts/report.py": [],
}
INSTALLATION = {"pip install -r requirements.txt"}
ENDLESS = {"python scripts/serve.py"}  # tests/test_server.py types it


def shell_lines(page: Path, heading: str = "") -> list[str]:
    """The lines of a page's bash blocks (below `heading`, if given), continued ones joined, comments removed."""
    text = page.read_text(encoding="utf-8")
    if heading:
        text = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    bare = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [line for line in bare if line]


def python_commands() -> Iterator[Any]:
    """Page, script and arguments of every command of ours in any page, in pipes and after `&&` too."""
    for page in PAGES:
        for line in shell_lines(page):
            for part in re.split(r"\s(?:\||&&|;)\s", line):
                words = shlex.split(part)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words[:1] == ["python"] and words[1].endswith(".py"):
                    yield pytest.param(words[1], words[2:], id=f"{page.name}: {part.strip()}")


def function_of(script: str, arguments: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """The function that a command file hands to `config.command.run` for these arguments, and those that it gets."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    handed: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", handed.append)
        module.main()
    if isinstance(handed[0], dict):
        return handed[0][arguments[0]], arguments[1:]
    return handed[0], arguments


class TestWhatIsWrittenDown:
    @pytest.mark.parametrize(("script", "arguments"), list(python_commands()))
    def test_it_parses_and_its_settings_exist(self, script: str, arguments: list[str]) -> None:
        app = typer.Typer()
        function, arguments = function_of(script, arguments)
        app.command()(function)
        values = get_command(app).make_context(script, list(arguments)).params
        recipes = [Path("finetune")] if script == "scripts/finetune.py" else []
        recipe = values.get("recipe")
        recipes += [recipe] if recipe and recipe.parts[0] == "config" else []
        with contextlib.chdir(ROOT):
            load_config(recipes, [word for word in values.get("overrides") or [] if "=" in word])

    def test_the_road_of_the_readme_is_the_one_that_is_tested(self) -> None:
        assert set(shell_lines(ROOT / "README.md", ROAD)) == TYPED.keys() | INSTALLATION | ENDLESS

    def test_make_demo_takes_that_road(self) -> None:
        lines = subprocess.run(
            ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        run = [match[0] for line in lines if (match := re.search(r"(data|scripts)/\w+\.py", line))]
        road = [line.split()[1] for line in TYPED if not re.search("--(list|dry-run|resume)", line)]
        left_out = {"scripts/distributed_train.py", "scripts/finetune.py", "scripts/export.py", "scripts/import.py"}
        assert [script for script in run if script in road] == [script for script in road if script not in left_out]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the typed paths exist, and nothing else does."""
    for name in ("config", "data", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def type_in(folder: Path, typed: str, *more: str, status: int = 0, standard_input: str = "") -> tuple[str, str]:
    """Type a command as the README has it, with what `TYPED` adds; standard output and error. There are no GPUs."""
    result = subprocess.run(
        [sys.executable, *shlex.split(typed)[1:], *TYPED.get(typed, []), *more],
        cwd=folder,
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == status, f"{typed}\n{result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr
    return result.stdout, result.stderr


def proposed(output: str) -> str:
    """The command that the last line tells the user to type next."""
    match = re.search(r"(?:Next|Go on with|To train on): python (\S+\.py)(.*)", output.strip().splitlines()[-1])
    assert match is not None, output
    assert (ROOT / match[1]).exists()
    return f"python {match[1]}{match[2]}"


def losses(folder: Path) -> list[float]:
    """The training losses of the newest run, in order."""
    newest = max((folder / "runs").iterdir(), key=lambda run: (run / "metrics.jsonl").stat().st_mtime)
    rows = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_the_road_from_raw_text_to_fine_tuned_answers(clone: Path) -> None:
    """One folder, and in it what the README says, word for word and in its order."""
    typed = iter(TYPED)

    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python data/tokenizer.py")
    output, _ = type_in(clone, next(typed))
    assert "sample" in output and "corpus/raw/sample" in output
    output, _ = type_in(clone, next(typed))
    assert "HuggingFaceFW/fineweb" in output
    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python data/preprocess.py")
    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python data/preprocess.py")
    assert (clone / "corpus/dry-run.html").exists() and not (clone / "corpus/tokens").exists()
    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python scripts/train.py")
    assert {"train.bin", "val.bin", "manifest.json"} <= {path.name for path in (clone / "corpus/tokens").iterdir()}

    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python scripts/eval.py")
    assert (clone / "checkpoints/model_step_8.pt").exists()
    assert losses(clone)[-1] < losses(clone)[0]
    output, _ = type_in(clone, next(typed))
    assert (clone / "checkpoints/model_step_12.pt").exists()
    assert len(losses(clone)) == 6, "the resumed run goes on in the record of the first"

    distributed = next(typed)
    _, errors = type_in(clone, distributed, status=1)
    assert errors.splitlines()[-1] == (
        "error: --gpus 4: PyTorch finds 0 GPUs on this machine. "
        "Add --device cpu to run the same training as 4 processes on the CPU."
    )
    output, _ = type_in(clone, distributed.replace("4", "2"), *TYPED[distributed], "--device", "cpu")
    assert proposed(output).startswith("python scripts/eval.py")
    assert (clone / "checkpoints/model_step_8.pt").exists()
    assert list((clone / "checkpoints/previous").rglob("model_step_12.pt")), "the earlier run's are kept"

    output, _ = type_in(clone, next(typed))
    assert "perplexity" in output
    assert proposed(output).startswith("python scripts/generate.py --prompt")
    output, _ = type_in(clone, next(typed))
    assert "quern_arithmetic" in output
    assert proposed(output).startswith("python scripts/report.py")
    output, _ = type_in(clone, next(typed))
    assert output.startswith("The future of AI is")
    output, _ = type_in(clone, "python scripts/generate.py", "generation.max_new_tokens=8", standard_input="def add(\n")
    assert output.strip()

    examples = [
        {"messages": [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(20)
    ]
    (clone / "path/to").mkdir(parents=True)
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (clone / "path/to/custom_data.jsonl").write_text(lines, encoding="utf-8")
    output, _ = type_in(clone, next(typed))
    assert re.search(r"Loss on 2 held-out examples: [\d.]+ before, [\d.]+ after", output)
    output, _ = type_in(clone, proposed(output), "generation.max_new_tokens=8", "--no-chat")
    assert "+ 1" in output, "without the chat template the prompt is a text to go on with"

    output, _ = type_in(clone, next(typed))
    assert "Next: AutoModelForCausalLM.from_pretrained" in output
    assert "| tokens trained on | 2,048 |" in (clone / "exported/README.md").read_text(encoding="utf-8")
    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python scripts/generate.py --checkpoint checkpoints/exported")
    output, _ = type_in(clone, next(typed))
    assert proposed(output).startswith("python scripts/generate.py")
    assert list((clone / "runs").rglob("report.html"))
    assert next(typed, None) is None


@pytest.mark.slow
def test_the_examples_that_every_machine_can_make(clone: Path) -> None:
    """docs/finetuning.md begins with them: the command's last line is a command that takes them."""
    for form in ("prompt-completion", "messages"):
        output, _ = type_in(clone, f"python data/make_examples.py --format {form}")
        path = clone / f"corpus/finetuning/docstrings-{form}.jsonl"
        assert proposed(output) == f"python scripts/finetune.py --dataset {path.relative_to(clone)}"
        assert len(path.read_text(encoding="utf-8").splitlines()) > 500
