"""Which optimizer moves which parameter, and stepping them as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from config.training import TrainingConfig
from training.muon import Muon


class Optimizers:
    """The optimizers of a run, by name. Every group's rate is its own `initial_lr` times the schedule's factor."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self.parts = parts
        for group in self._groups():
            group["initial_lr"] = group["lr"]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter that is trained."""
        return [parameter for group in self._groups() for parameter in group["params"]]

    @property
    def learning_rate(self) -> float:
        """The rate of the first group at this step: Muon's where there is one."""
        return float(self._groups()[0]["lr"])

    def set_rate_factor(self, factor: float) -> None:
        """Scale every group's own rate by `factor`."""
        for group in self._groups():
            group["lr"] = group["initial_lr"] * factor

    def step(self, skip: Tensor) -> None:
        """Move the parameters; where `skip` (a 0-D bool tensor on the device) is true, leave everything as it is."""
        found_inf = skip.float()
        for part in self.parts.values():
            part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimizer by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved moments, but keep the rates and decays given at construction: those may change on resume."""
        for name, part in self.parts.items():
            options = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(state[name])
            for group, own in zip(part.param_groups, options, strict=True):
                group.update(own)


def make_optimizers(model: nn.Module, training: TrainingConfig, compiled: bool = False) -> Optimizers:
    """AdamW for everything, or Muon for the hidden matrices and AdamW beside it.

    Weight decay falls on matrices only (embeddings and the head among them), never on norms and biases. AdamW runs
    PyTorch's fused kernel; with `compiled`, Muon's step is compiled.
    """
    matrices, scalars = _split(model)
    hidden = {name: parameter for name, parameter in matrices.items() if name.startswith("blocks.")}
    muon = hidden if training.optimizer == "muon" else {}
    decayed = {name: parameter for name, parameter in matrices.items() if name not in muon}

    groups = [muon, decayed, scalars]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for group in groups for name in group) == sorted(
        trained
    ), "a parameter is in no group, or in two"

    parts: dict[str, torch.optim.Optimizer] = {}
    if muon:
        parts["muon"] = Muon(
            list(muon.values()),
            lr=training.muon.learning_rate,
            momentum=training.muon.momentum,
            weight_decay=training.muon.weight_decay,
            newton_schulz_steps=training.muon.newton_schulz_steps,
            compiled=compiled,
        )
    adamw = training.adamw
    adamw_groups = [
        {"params": list(decayed.values()), "weight_decay": adamw.weight_decay},
        {"params": list(scalars.values()), "weight_decay": 0.0},
    ]
    parts["adamw"] = torch.optim.AdamW(
        [group for group in adamw_groups if group["params"]],
        lr=adamw.learning_rate,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        fused=True,
    )
    return Optimizers(parts)


def _split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters that multiply as matrices, and those that scale or shift."""
    matrices: dict[str, nn.Parameter] = {}
    scalars: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else scalars)[name] = parameter
    return matrices, scalars
