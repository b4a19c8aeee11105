"""The plan of the house: who may import whom, what a command may load, and which names are taken."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"config": 0, "data": 1, "model": 1, "training": 2, "evaluation": 2, "inference": 2, "scripts": 3}
HEAVY = {
    "datatrove",
    "matplotlib",
    "numba",
    "polars",
    "pyarrow",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
}
GUARD = '\n\nif __name__ == "__main__":\n    main()\n'


def modules_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def is_command(path: Path) -> bool:
    """A file that a user runs, told by what it does: it hands itself to `config.command.run`, or guards a `main`."""
    text = path.read_text(encoding="utf-8")
    return "__main__" in text or any(
        isinstance(node, ast.ImportFrom)
        and node.module == "config.command"
        and any(alias.name == "run" for alias in node.names)
        for node in ast.walk(ast.parse(text))
    )


COMMANDS = [path for room in ("data", "scripts") for path in sorted((ROOT / room).glob("*.py")) if is_command(path)]
command_files = pytest.mark.parametrize("command", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.name}")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a file, those inside functions and of `from room import x` included."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*above, *([node.module] if node.module else [])])


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_rooms_on_floors_below(room: str) -> None:
    assert modules_of(room), f"the room {room}/ is empty"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules_of(room)
        for line, name in imported_modules(path)
        if (other := name.partition(".")[0]) in FLOORS and other != room and FLOORS[other] >= FLOORS[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_script_module() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for room in FLOORS
        for path in modules_of(room)
        for line, name in imported_modules(path)
        if name.partition(".")[0] == "scripts"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_in_the_root_bears_the_name_of_a_dependency_or_of_the_standard_library() -> None:
    owners = packages_distributions()
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    taken = [name for name in folders if name in sys.stdlib_module_names or set(owners.get(name, [])) - {"quern"}]
    assert not taken


def test_no_module_beside_a_command_shadows_a_dependency_or_the_standard_library() -> None:
    """`python data/x.py` puts `data/` itself in front of the import path, so its modules are top-level names there."""
    owners = packages_distributions()
    beside = [path for room in ("data", "scripts") for path in (ROOT / room).iterdir() if path.stem != "__init__"]
    taken = [
        str(path.relative_to(ROOT))
        for path in beside
        if path.stem in sys.stdlib_module_names or set(owners.get(path.stem, [])) - {"quern"}
    ]
    assert not taken


def test_every_script_is_a_command() -> None:
    strays = [path.name for path in (ROOT / "scripts").glob("*.py") if path not in COMMANDS and path.stem != "__init__"]
    assert not strays


def test_a_command_file_ends_in_the_guard_and_defines_no_class() -> None:
    """What workers unpickle must live in an importable module: the same class under `__main__` would be another one."""
    wrong = []
    for path in COMMANDS:
        text = path.read_text(encoding="utf-8")
        if not text.endswith(GUARD) or text.count("__main__") != 1:
            wrong.append(f"{path.relative_to(ROOT)} does not end in the guard")
        wrong += [
            f"{path.relative_to(ROOT)}:{node.lineno} defines the class {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ClassDef)
        ]
    assert not wrong, "\n".join(wrong)


def heavy_modules_after(code: str, *arguments: str) -> tuple[str, set[str]]:
    """Run `code` in a fresh interpreter; its standard output, and which of HEAVY it left in `sys.modules`."""
    listing = "\nimport sys; print('\\nLOADED', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code + listing, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr
    output, _, loaded = result.stdout.rpartition("\nLOADED ")
    return output, HEAVY & {name.partition(".")[0] for name in loaded.split()}


AS_A_PROGRAM = """
import runpy, sys
script, *arguments = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
for argument, status in zip(arguments, (0, 2), strict=True):
    sys.argv = [script, *argument.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert (stop.code or 0) == status, (argument, stop.code)
"""


@command_files
def test_help_and_a_wrong_option_answer_without_loading_anything_heavy(command: Path) -> None:
    """Loading torch takes seconds, these may not; what is loaded is the same on a fast machine and a slow one."""
    subcommands = re.findall(r'^    run\(\{"(\w+)"', command.read_text(encoding="utf-8"), re.M)
    options = [" ".join([*subcommands[:1], option]) for option in ("--help", "--no-such-option")]
    help_page, heavy = heavy_modules_after(AS_A_PROGRAM, str(command), *options)
    assert not heavy
    for option in ("--config", "--print-config", "SECTION.KEY=VALUE"):
        assert option in help_page
    description = [line.strip() for line in help_page.splitlines() if line.strip() and "Usage" not in line]
    assert re.match(r"[A-Z].{20,}", description[0]), "the help page opens with no sentence on what the command does"


def test_rooms_load_nothing_heavy_when_imported() -> None:
    inits = [path for room in FLOORS for path in modules_of(room) if path.name == "__init__.py"]
    packages = [".".join(path.parent.relative_to(ROOT).parts) for path in inits]
    _, heavy = heavy_modules_after(f"import importlib\nfor name in {packages}: importlib.import_module(name)")
    assert not heavy
