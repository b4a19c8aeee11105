"""Which optimizer moves which parameter, and stepping them as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from config.training import TrainingConfig
from training.adamw import CautiousAdamW
from training.dealing import deal_matrices
from training.layout import Layout
from training.muon import Muon
from training.shares import Share, drop_gradients, part_state, shares_of, whole_state


class Optimizers:
    """The optimizers of a run, by name. Every group's rate is its own `initial_lr` times the schedule's factor.

    They move the parts in `shares`, which is all that is trained. Their state, as it is saved, is that of the wholes.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer], shares: list[Share]) -> None:
        self.parts = parts
        self.shares = shares
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
        drop_gradients(self.shares)

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimizer by name, what is sharded as `DTensor`s."""
        return {name: whole_state(part, self.shares) for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved moments, but keep the groups given at construction: their settings may change on resume.

        Moments belong to parameters by their place in the concatenated groups. Raises `ValueError` where there is
        another number of parameters, and `KeyError` where an optimizer is missing.
        """
        for name, part in self.parts.items():
            own, saved = part.state_dict()["param_groups"], state[name]
            if sum(len(group["params"]) for group in own) != sum(
                len(group["params"]) for group in saved["param_groups"]
            ):
                raise ValueError(f"the saved {name} moved another number of parameters")
            part.load_state_dict({**part_state(part, saved, self.shares), "param_groups": own})


def make_optimizers(
    model: nn.Module, training: TrainingConfig, compiled: bool = False, layout: Layout = Layout()
) -> Optimizers:
    """AdamW for everything, or Muon for the hidden matrices and AdamW beside it.

    Weight decay falls on matrices only (embeddings and the head among them), never on norms and biases. AdamW runs
    PyTorch's fused kernel; with `compiled`, Muon's step is compiled. All processes of `layout` must call this.
    """
    shares = shares_of(model)
    part_of = {share.whole: share.part for share in shares}
    sorted_parameters = sort_parameters(model, training.optimizer == "muon").items()
    groups = {name: [part_of[parameter] for parameter in parameters] for name, parameters in sorted_parameters}
    muon = groups.pop("muon")
    parts: dict[str, torch.optim.Optimizer] = {}
    if muon:
        parts["muon"] = Muon(
            muon,
            lr=training.muon.learning_rate,
            momentum=training.muon.momentum,
            weight_decay=training.muon.weight_decay,
            orthogonalisation=training.muon.orthogonalisation,
            steps=training.muon.steps,
            second_moment=training.muon.second_moment,
            cautious=training.cautious_weight_decay,
            compiled=compiled,
            dealings=deal_matrices(shares, layout),
        )
    adamw = training.adamw
    rates = {
        "embedding": adamw.embedding_learning_rate,
        "hidden": None,
        "head": adamw.head_learning_rate,
        "scalar": adamw.scalar_learning_rate,
    }
    adamw_groups = [
        {
            "params": parameters,
            "lr": rates[name] or adamw.learning_rate,
            "weight_decay": 0.0 if name == "scalar" else adamw.weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]
    kind = CautiousAdamW if training.cautious_weight_decay else torch.optim.AdamW
    parts["adamw"] = kind(
        adamw_groups, lr=adamw.learning_rate, betas=(adamw.beta1, adamw.beta2), eps=adamw.eps, fused=True
    )
    return Optimizers(parts, shares)


def sort_parameters(model: nn.Module, with_muon: bool) -> dict[str, list[nn.Parameter]]:
    """Every parameter that is trained, in exactly one group, each group in the order of the model.

    `muon` are the matrices of the blocks, unless they are AdamW's like the rest, `hidden`; `embedding` are tables that
    are looked up (the head too, where it is tied); `scalar` is what scales or shifts: norms, biases, learned factors.
    """
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("muon", "embedding", "hidden", "head", "scalar")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in tables:
            groups["embedding"].append(parameter)
        elif parameter.ndim < 2:
            groups["scalar"].append(parameter)
        elif name == "head.weight":
            groups["head"].append(parameter)
        else:
            groups["muon" if with_muon else "hidden"].append(parameter)
    return groups
