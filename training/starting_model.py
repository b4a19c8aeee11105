"""The model that fine-tuning begins or goes on with."""

from __future__ import annotations

import os

from config.errors import UserError
from model.checkpoint import load_checkpoint, load_weights
from model.devices import choose_device
from model.transformer import Transformer
from training.adapters import adapt
from training.finetuning import Finetuning
from training.measuring import Evaluate
from training.objectives import LOSS_BEFORE
from training.reproduction import weights_hash
from training.setup import new_model

FINGERPRINT = "base_fingerprint"  # of the weights that an adapter lies beside, among what a checkpoint tells


def starting_model(job: Finetuning, evaluate: Evaluate) -> Transformer | None:
    """The model with the weights that the run began with, adapted where that is asked for.

    `job.about` then tells their loss and, for an adapter, their fingerprint. None for a run that goes on without an
    adapter, whose weights are all in its checkpoint. Raises `UserError` where an adapter's are not those it began with.
    """
    adapter = job.config.training.adapter
    if job.resume is not None and adapter.method is None:
        return None
    if job.resume is not None and not job.start.exists():
        raise UserError(
            f"{job.resume} is an adapter for {job.start}, which is not there any more. Put it back, or start a new run "
            "without --resume."
        )
    model = new_model(job.config, choose_device(job.config.training.device, int(os.environ.get("LOCAL_RANK", 0))))
    load_weights(model, load_checkpoint(job.start), job.start)
    if job.resume is None:
        job.about["loss_before"] = LOSS_BEFORE if job.pairs else evaluate(model, 0, 1).loss
    if adapter.method is None:
        return model
    found = weights_hash(model)
    if found != job.about.setdefault(FINGERPRINT, found):
        raise UserError(
            f"{job.resume} is an adapter for another base: it was trained beside weights with the fingerprint "
            f"{job.about[FINGERPRINT][:12]}, and those of {job.start} have {found[:12]}. Put that checkpoint back, or "
            "start a new run without --resume."
        )
    adapt(model, adapter, job.config.training.seed)
    return model
