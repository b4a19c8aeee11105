"""Which tasks there are: those of the project, of folders the user names, and the thousands that come with `lm-eval`.

The harness reads every task file of a folder before it knows a single name, which takes most of a minute for its own.
So its folders are searched for the names first, and it is given those alone that hold them.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from config.errors import UserError

SHIPPED = Path(__file__).parent / "tasks"
_NAME = re.compile(r"^(?:task|group|tag): *['\"]?([^\s'\"#\[{]+)|^ *- +([\w\-.]+) *$", re.M)


def check_names(names: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """`UserError` for a name that is no task or group, naming those like it, or for a folder that is none."""
    own = _managed(folders)
    known = own.task_index if all(name in own.task_index for name in names) else {**own.task_index, **_names()}
    for name in names:
        if name not in known:
            raise UserError(_unknown(name, [*known]))


def question_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the tasks of the project must know of a run's section `data`: how it divided the built-in corpus.

    Nothing of a run that did not train on it, which is asked the same questions as one that did as it ships.
    """
    if not any(data["sources"].get(name, {}).get("kind") == "sample" for name in data["use"]):
        return {}
    settings = data["preprocess"]
    return {"validation_fraction": settings["validation_fraction"], "clean": settings["clean"]}


def find_tasks(names: Sequence[str], folders: Sequence[Path] = (), **metadata: Any) -> dict[str, Any]:
    """The tasks and groups called `names`, with their data, as `lm-eval`'s evaluator takes them.

    `folders` hold further task files; `metadata` goes to their tasks and those of the project. Raises `UserError` for a
    name that is none, naming those like it, and where the files or the data of a task cannot be read.
    """
    own = [SHIPPED, *folders]
    here = _managed(folders, **metadata)
    asked: dict[bool, list[str]] = {True: [], False: []}
    for name in dict.fromkeys(names):
        asked[_complete(here, [name])].append(name)
    loaded = [_load(here, asked[True])]
    if rest := asked[False]:
        from lm_eval.tasks import TaskManager

        check_names(rest, folders)
        holding = sorted({place for name in rest for place in _names().get(name, ())})
        manager = TaskManager(include_path=[*holding, *own], include_defaults=False)
        if not _complete(manager, rest):
            manager = TaskManager(include_path=own)
        if missing := [name for name in rest if name not in manager.task_index]:
            raise UserError(_unknown(missing[0], manager.all_tasks))
        loaded.append(_load(manager, rest))
    return {part: {name: one for each in loaded for name, one in each[part].items()} for part in loaded[0]}


def _load(manager: Any, names: list[str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load(names)
    except UserError:
        raise
    except Exception as error:  # task files are code of others, and their data comes from anywhere
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"The tasks {', '.join(names)} cannot be loaded: {reason}") from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"The task {name} runs programs that the model writes, which is not done here.")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"The task {name} shows pictures or plays sounds, and the models here read text alone.")
    return found


def _managed(folders: Sequence[Path], **metadata: Any) -> Any:
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--include-path {folder} is no folder. Give one that holds task files in YAML.")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    return TaskManager(include_path=[SHIPPED, *folders], include_defaults=False, metadata=metadata)


@cache
def _names() -> dict[str, set[Path]]:
    """Everything that looks like a name in the task files of the library, and the folders that speak of it."""
    import lm_eval.tasks

    found: dict[str, set[Path]] = {}
    for folder in sorted(path for path in Path(lm_eval.tasks.__file__).parent.iterdir() if path.is_dir()):
        for file in folder.rglob("*.yaml"):
            for direct, listed in _NAME.findall(file.read_text(encoding="utf-8", errors="replace")):
                found.setdefault(direct or listed, set()).add(folder)
    return found


def _complete(manager: Any, names: Sequence[str]) -> bool:
    """Whether `names` and all that they are made of are known to the manager."""
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
        below = [member for member in members or [] if isinstance(member, str)]
        if not _complete(manager, below):
            return False
    return True


def _unknown(name: str, known: Sequence[str]) -> str:
    like = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(like)}?" if like else " Names of tasks: docs/evaluation.md."
    return f"There is no task {name}.{hint}"
