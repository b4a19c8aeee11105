"""Whether a set of pairs, the objective and a run that goes on belong together."""

from __future__ import annotations

from config.errors import UserError
from training.finetuning import Finetuning

RECIPE = "config/recipes/dpo.yaml"


def require_objective(job: Finetuning) -> None:
    """Raise `UserError` unless `training.objective` goes with the set, and the set with the run that goes on."""
    dataset, objective = job.about["dataset"], job.config.training.objective
    if job.pairs and objective != "dpo":
        raise UserError(
            f"{dataset} holds pairs of a chosen and a rejected answer, of which training.objective={objective} can "
            f"learn nothing. To prefer the chosen ones (DPO): --config {RECIPE}. To train on the chosen answers alone: "
            f"--map {'messages' if job.about['format'] == 'messages' else 'completion'}=chosen"
        )
    if objective == "dpo" and not job.pairs:
        raise UserError(
            f"training.objective=dpo learns from pairs, and {dataset} has none: nothing in it is chosen and rejected. "
            "Set training.objective=next_token, or name such columns with --map."
        )
    reference = job.about.get("reference")
    if reference is not None and reference["validation_fingerprint"] != job.validation.fingerprint:
        raise UserError(
            "The pairs to validate on are not those that the run began with, and the weights it began with have not "
            "judged them. Name the same ones with --validation, or start a new run without --resume."
        )
