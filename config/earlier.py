"""Configurations saved before a key existed: what the program did then.

A default may be anything that is good for new runs, so it cannot stand for what an older checkpoint was trained with.
"""

from __future__ import annotations

from typing import Any

BEFORE: dict[str, Any] = {
    "model": {
        "d_head": None,
        "rope_scaling": None,
        "logit_soft_cap": None,
        "value_embeddings": "none",
        "residual_scaling": False,
        "window": None,
        "window_pattern": "L",
    },
    "training": {
        "learning_rate": None,
        "adamw": {"embedding_learning_rate": None, "head_learning_rate": None, "scalar_learning_rate": None},
        "muon": {"orthogonalisation": "newton_schulz", "second_moment": None},
        "objective": "next_token",
        "dpo": {"beta": 0.1, "label_smoothing": 0.0},
        "cautious_weight_decay": False,
        "z_loss": 0.0,
        "fp8": False,
        "documents": "attend_across",
        "task_interval": None,
        "task_questions": 100,
        "best_metric": "validation_loss",
        "early_stopping": {"patience": None, "min_delta": 0.0},
        "price_per_device_hour": None,
    },
    "data": {
        "loader": {
            "packing": "contiguous",
        },
        "finetuning": {
            "packing": False,
            "before_after": 0,
        },
    },
    "generation": {
        "stop_tokens": [],
        "context": "auto",
        "precision": "auto",
        "quantize": "none",
        "compile": False,
        "context_length": None,
        "prompt_lookup_tokens": 0,
    },
}


def with_keys_added_since(saved: Any, before: dict[str, Any] = BEFORE) -> Any:
    """`saved`, the resolved configuration of an earlier run, with the keys of `before` that its sections lack.

    What is a section of a section may be lacking as a whole.
    """
    if not isinstance(saved, dict):
        return saved
    whole = dict(saved)
    for key, value in before.items():
        if not isinstance(value, dict):
            whole.setdefault(key, value)
        elif key in whole or before is not BEFORE:
            whole[key] = with_keys_added_since(whole.get(key, {}), value)
    return whole
