"""Which files of a repository make up one split of one subset, by the hub's own conventions.

The data set's card may say so (`configs:` with `data_files:`); else the names of folders and files do: `train`,
`validation`, `test` or one of their other names as a word in the path, and the subset as a folder.
https://huggingface.co/docs/hub/datasets-data-files-configuration
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from config.errors import UserError
from data.formats import suffix_of
from data.hub.repository import HubFile, Repository

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PROSE = (".md", ".txt")


def own_files(repository: Repository, subset: str | None, split: str) -> list[HubFile]:
    """The repository's own files of that split in a format we read, in order of path; none where there is none such.

    Raises `UserError` naming what there is, when the card declares subsets or splits and not these.
    """
    declared = [config for config in repository.configs if config.get("data_files")]
    if declared:
        patterns = _declared_patterns(repository.name, declared, subset, split)
        chosen = [file for file in repository.files if any(pattern.fullmatch(file.path) for pattern in patterns)]
        return [file for file in chosen if suffix_of(file.path)] if all(suffix_of(f.path) for f in chosen) else []
    files = [file for file in repository.files if suffix_of(file.path) and not file.path.endswith(PROSE)]
    if subset is not None:
        files = [file for file in files if subset in file.path.split("/")[:-1]]
    return _one_format(_of_split(files, split))


def converted_files(repository: Repository, subset: str | None, split: str) -> list[HubFile]:
    """The files of that split on the hub's Parquet branch, or `UserError` naming what there is."""
    tree: dict[str, dict[str, list[HubFile]]] = {}
    for file in repository.files:
        parts = file.path.split("/")
        if len(parts) == 3 and file.path.endswith(".parquet"):
            tree.setdefault(parts[0], {}).setdefault(parts[1], []).append(file)
    if not tree:
        return []
    name = _pick(repository.name, subset, list(tree))
    splits = tree[name]
    if split not in splits and f"partial-{split}" in splits:
        raise UserError(
            f"The hub has only the beginning of split {split!r} of {repository.name} as Parquet. "
            f"Name it as split: partial-{split} to take that, or choose another data set."
        )
    if split not in splits:
        raise UserError(_no_split(repository.name, split, splits))
    return splits[split]


def _declared_patterns(
    repository: str, configs: Sequence[dict[str, Any]], subset: str | None, split: str
) -> list[re.Pattern[str]]:
    from fsspec.utils import glob_translate

    names = [str(config.get("config_name", "default")) for config in configs]
    defaults = [name for name, config in zip(names, configs) if config.get("default")]
    name = _pick(repository, subset, names, defaults)
    splits = _splits(configs[names.index(name)]["data_files"])
    if split not in splits:
        raise UserError(_no_split(repository, split, splits))
    return [re.compile(glob_translate(pattern)) for pattern in splits[split]]


def _splits(data_files: Any) -> dict[str, list[str]]:
    """Globs by split, from any of the forms that a card may write them in."""
    if isinstance(data_files, dict):
        return {str(split): _as_list(paths) for split, paths in data_files.items()}
    entries = _as_list(data_files)
    if any(isinstance(entry, dict) for entry in entries):
        return {str(entry["split"]): _as_list(entry["path"]) for entry in entries}
    return {"train": entries}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _pick(repository: str, subset: str | None, names: Sequence[str], defaults: Sequence[str] = ()) -> str:
    if subset is not None:
        if subset in names:
            return subset
        near = difflib.get_close_matches(subset, names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"They are: {_some(names)}."
        raise UserError(f"{repository} has no subset {subset!r}. {hint}")
    for name in (*defaults, "default"):
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise UserError(f"{repository} has several subsets; set the source's subset to one of: {_some(names)}.")


def _no_split(repository: str, split: str, splits: Iterable[str]) -> str:
    return f"{repository} has no split {split!r}. Set the source's split to one of: {_some(list(splits))}."


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def _of_split(files: Sequence[HubFile], split: str) -> list[HubFile]:
    """Files whose path has the split as a word; all of them, for `train`, where no path has any split's."""
    words = {file.path: set(re.split(r"[/._\-\d]+", file.path.lower())) for file in files}
    chosen = [file for file in files if words[file.path].intersection(SPLIT_WORDS.get(split, (split.lower(),)))]
    known = {word for group in SPLIT_WORDS.values() for word in group}
    if not chosen and split == "train" and not any(known & found for found in words.values()):
        return list(files)
    return chosen


def _one_format(files: Sequence[HubFile]) -> list[HubFile]:
    """The files of one format: Parquet if there is any, else the most frequent, so that no text is taken twice."""
    counts = Counter(suffix_of(file.path) for file in files)
    if not counts:
        return []
    suffix = ".parquet" if ".parquet" in counts else counts.most_common(1)[0][0]
    return [file for file in files if suffix_of(file.path) == suffix]
