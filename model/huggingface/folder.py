"""A model's folder in the form of the Hugging Face hub, read for import: safetensors only, nothing of it is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import UserError

if TYPE_CHECKING:
    from model.transformer import Transformer

PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
"""The files of a repository that an import reads."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a folder's configuration says: `architecture` is the class of the model in `transformers`.

    `endings` are the ids that end what the model writes; `pad` fills up short rows.
    """

    architecture: str
    endings: tuple[int, ...]
    pad: int | None


def describe(folder: Path) -> Description:
    """Read the configuration of the model in `folder`.

    Raises `UserError` where it is missing, not a model that can be imported, quantized, or has no safetensors.
    """
    config = _read(folder / "config.json")
    if not list(folder.glob("*.safetensors")):
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
        if pickled:
            raise UserError(
                f"{folder} has its weights as a pickle ({pickled}), which can hold a program and is never opened here. "
                "Take a revision with safetensors."
            )
        raise UserError(f"{folder} has no weights: there is no .safetensors file in it.")
    if config.get("quantization_config"):
        raise UserError(f"The weights in {folder} are quantized, which cannot be imported; take the original ones.")
    from model.huggingface.names import CLASSES

    architecture = str((config.get("architectures") or ["model without architectures in config.json"])[0])
    if architecture not in CLASSES:
        raise UserError(f"A {architecture} cannot be imported; these can: {', '.join(CLASSES)}.")
    generation = folder / "generation_config.json"
    ends = (_read(generation) if generation.is_file() else {}).get("eos_token_id")
    ends = config.get("eos_token_id") if ends is None else ends
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Description(architecture, tuple(map(int, listed)), config.get("pad_token_id"))


def read_model(
    folder: Path, architecture: str, adapter: Path | None = None, context_length: int | None = None
) -> Transformer:
    """The model in `folder`, in the dtype of its configuration, on the CPU; the `adapter` in that folder merged in.

    With a `context_length`, it sees no more tokens at once.

    Raises `UserError` where weights are missing, left over or damaged, and for every option without a counterpart.
    """
    import transformers
    from safetensors import SafetensorError

    from model.huggingface.adapter import merge_adapter
    from model.huggingface.importing import from_huggingface

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        theirs, found = getattr(transformers, architecture).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The model in {folder} cannot be read: {reason}") from error
    for what, keys in (("lacks", found["missing_keys"]), ("has, beside those of its kind,", found["unexpected_keys"])):
        if keys:
            raise UserError(f"The model in {folder} {what} the weight {sorted(keys)[0]}.")
    return from_huggingface(theirs if adapter is None else merge_adapter(theirs, adapter), context_length)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no model in {path.parent}: {path.name} is missing.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file that can be read.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content
