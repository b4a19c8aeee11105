"""An adapter in the format of `peft`, merged into the model in Hugging Face's form that it was trained beside."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def check_adapter(folder: Path) -> None:
    """Raise `UserError` where `folder` does not hold a LoRA or DoRA adapter in safetensors."""
    settings = folder / "adapter_config.json"
    try:
        kind = json.loads(settings.read_text(encoding="utf-8"))["peft_type"]
    except FileNotFoundError as error:
        raise UserError(f"There is no adapter in {folder}: {settings.name} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{settings} does not tell what kind of adapter it is of.") from error
    if kind != "LORA":
        raise UserError(f"{folder} holds a {kind} adapter; LORA is what can be merged (DoRA is a kind of it).")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; weights in a pickle (.bin) are never opened here.")


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base`, changed in place, with the adapter in `folder` merged into its weights.

    Raises `UserError` where the adapter is for another base: one with other matrices, or of other shapes.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    another = f"The adapter in {folder} is for another base than this {type(base).__name__}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers for what has another name by now
            settings = PeftConfig.from_pretrained(str(folder))
            adapted = get_peft_model(base, settings, autocast_adapter_dtype=False)
            found: Any = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{another}: {' '.join(str(error).split())[:200]}") from error
    missing = [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    if missing or found.unexpected_keys:
        what, key = ("has nothing for", missing[0]) if missing else ("has", sorted(found.unexpected_keys)[0])
        raise UserError(
            f"{another}: it {what} {key}, {'which' if missing else 'and'} this one "
            f"{'has' if missing else 'has not'}."
        )
    return cast("PreTrainedModel", adapted.merge_and_unload())
