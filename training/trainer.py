"""A training run from configuration to last checkpoint: its parts are made, or restored, and handed to the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.schema import Config
from data.data_loader import SampleSource
from model.checkpoint import load_checkpoint
from model.devices import is_out_of_memory
from model.float8 import use_float8
from model.onednn import use_onednn
from model.transformer import Transformer
from training import randomness
from training.checkpointing import Best, best_checkpoint
from training.console import Console, count
from training.determinism import determinism, fix_threads
from training.distributed import Process, open_process
from training.environment import keep_freed_memory
from training.loop import Loop
from training.measuring import Ask, EarlyStopping, Evaluate, Sample
from training.meter import Meter
from training.objectives import NextToken, Objective
from training.optimizers import Optimizers, make_optimizers
from training.parallelism import deal, parallelise
from training.plan import Plan, make_plan
from training.precision import Precision, require_float8
from training.probing import largest_micro_batch, memory_advice
from training.profiling import PROFILE, Profile
from training.record import Record
from training.reproduction import weights_hash, write_result
from training.resume import require_same_data, require_same_tokenizer
from training.scaling import choose_rates, describe
from training.setup import Progress, load_state, new_model, run_name, should_compile, with_run_name
from training.sharded_saving import ShardedSaving
from training.signals import Requests, catch_signals
from training.spikes import SpikeGuard
from training.throughput import measure_peak_flops
from training.tracking import Page


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a call of `train` ended.

    `stopped_by` is the signal that cut it short, 0 for `training.max_hours`, None where the run is complete; that is
    also where early stopping ended it, after `in_vain` measurements that were no better. `best` is the best checkpoint
    by `training.best_metric`, as far as there is one; only the main process knows that of a run it trained.
    """

    step: int
    steps: int
    run_dir: Path
    checkpoint: Path | None
    validation_loss: float | None
    stopped_by: int | None
    already_complete: bool
    is_main: bool
    in_vain: int = 0
    best: Best | None = None


def train(
    config: Config,
    source: SampleSource,
    *,
    tokenizer_fingerprint: str,
    evaluate: Evaluate,
    ask: Ask | None = None,
    sampler: Sample | None = None,
    model: Transformer | None = None,
    resume: Path | None = None,
    data_fingerprint: str | None = None,
    finetuning: dict[str, Any] | None = None,
    objective: Objective | None = None,
    recipe: Config | None = None,
    page: Page | None = None,
    profile: bool = False,
    keep_name: bool = False,
) -> TrainResult:
    """Train on `source` as `config.training` says, writing checkpoints and a record of the run.

    `model` gives start weights (fine-tuning), else they are drawn from `training.seed`; `resume` is a checkpoint to
    continue bit for bit. `finetuning` is what every checkpoint is to tell of the examples: their format above all.
    `objective` is what to learn: by default, the next token.
    `recipe` is the configuration before single settings changed it, for the record; `page` draws the run's page now
    and then; `profile` watches a few steps and writes to `profile/` in the run's folder.
    With `keep_name`, a run of the same name that came to no checkpoint is this one, and is begun again.
    Every process calls `evaluate` at the same steps, and `ask`, which tells the share of questions answered rightly;
    the main one alone calls `sampler`; none disturbs the run.
    Raises `UserError` where configuration, data and checkpoint do not go together, where no gradient is finite any
    more, and where the last checkpoint cannot be written.
    """
    keep_freed_memory()
    requests = Requests(config.training.max_hours)
    with (
        open_process(config.training.device, config.training.tensor_parallel) as process,
        catch_signals(requests),
        determinism(config.training.deterministic),
    ):
        shape = (getattr(source, "examples_per_sample", 1.0), getattr(source, "sample_rows", 1))
        plan = make_plan(config, len(source), process.world_size, *shape)
        config = choose_rates(config, plan)
        training = config.training
        precision = Precision(training.precision, process.device)
        if training.fp8:
            require_float8(precision)
        compiling = should_compile(config, process.device)
        peak_flops = measure_peak_flops(process.device, precision.dtype)
        randomness.seed_all(training.seed)

        spread = partial(deal, layout=plan.layout, process=process, precision=precision)
        if model is None:
            model = new_model(config, process.device, spread)
        else:
            spread(model.to(process.device))
        model.set_gradient_checkpointing(training.gradient_checkpointing)
        model.z_loss = training.z_loss
        if training.fp8:
            use_float8(model)
        elif not precision.mixed and plan.layout.tensor == 1:
            use_onednn(model)
        optimizers = make_optimizers(model, training, compiling and process.device.type == "cuda", plan.layout)
        guard = SpikeGuard(training.spike_factor, training.max_skipped_in_a_row, process.device)
        progress = Progress(samples=len(source), data_fingerprint=data_fingerprint)
        state: dict[str, Any] = {}
        stopping = EarlyStopping(training)
        if resume is not None:
            state = load_checkpoint(resume)
            require_same_tokenizer(resume, state, tokenizer_fingerprint)
            require_same_data(resume, state, len(source), data_fingerprint)
            progress = load_state(state, resume, model, optimizers, precision, guard)
            stopping = EarlyStopping(training, state.get("stopping"))
            fix_threads(state.get("threads"))

        name = state["run_name"] if state else run_name(config, keep=keep_name)
        run_dir = Path(training.runs_dir) / name
        loss = state.get("validation_loss")
        if progress.step >= plan.steps or stopping.over:
            result = TrainResult(progress.step, plan.steps, run_dir, resume, loss, None, True, process.is_main)
            in_vain = stopping.in_vain if stopping.over else 0
            return replace(result, in_vain=in_vain, best=best_checkpoint(training, state.get("best")))
        if stopped := process.largest(requests.stop or 0):
            return TrainResult(progress.step, plan.steps, run_dir, resume, loss, stopped, False, process.is_main)

        console = Console(enabled=process.is_main)
        inputs = {
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "data_fingerprint": data_fingerprint,
            "finetuned": finetuning is not None,
            "device": process.device.type,
            "precision": precision.name,
        }
        record = _open_record(process, with_run_name(config, name), run_dir, console, state, recipe, page, inputs)
        console.say(_headline(name, model, plan, process, precision, progress))
        if chosen := describe(config):
            console.say(chosen)
        if training.micro_batch_size == "auto":
            plan = replace(plan, micro_rows=_probe(model, plan, precision, process, optimizers))
            console.say(f"micro_batch_size: auto chose {plan.micro_rows}")
        loop = Loop(
            config=config,
            plan=plan,
            process=process,
            precision=precision,
            model=model,
            forward=parallelise(model, plan.layout, compiling),
            optimizers=optimizers,
            progress=progress,
            meter=Meter(process, peak_flops),
            console=console,
            record=record,
            sharded=ShardedSaving(training, process, record, console.say) if plan.layout.shares_weights else None,
            requests=requests,
            guard=guard,
            stopping=stopping,
            objective=objective or NextToken(),
            evaluate=evaluate,
            ask=ask,
            sampler=sampler,
            tokenizer_fingerprint=tokenizer_fingerprint,
            finetuning=finetuning,
            validation_loss=loss,
            profile=Profile(run_dir / PROFILE, process.device, console.say) if profile and process.is_main else None,
        )
        try:
            stopped_by = loop.run(source)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise memory_advice(training, plan.rows, plan.micro_rows_of(plan.rows), plan.sequence_length) from error
            raise
        finally:
            console.close()
            if loop.sharded is not None:
                loop.sharded.close()
            if record is not None:
                record.close()
        checkpoint = record.checkpoints.latest if record is not None else None
        best = best_checkpoint(training, record.checkpoints.best) if record is not None else None
        loss = loop.validation_loss
        if record is not None and stopped_by is None:
            write_result(run_dir, progress.step, loss, None if plan.layout.shares_weights else weights_hash(model))
        result = TrainResult(progress.step, plan.steps, run_dir, checkpoint, loss, stopped_by, False, process.is_main)
        return replace(result, in_vain=stopping.in_vain if stopping.over else 0, best=best)


def _probe(model: Transformer, plan: Plan, precision: Precision, process: Process, optimizers: Optimizers) -> int:
    """The micro-batch that fits. Moments that are not there yet will take twice the weights, as AdamW's do."""
    owners = {parameter for part in optimizers.parts.values() for parameter in part.state}
    coming = sum(2 * parameter.nbytes for parameter in optimizers.parameters if parameter not in owners)
    length, each = plan.sequence_length, plan.sample_rows
    return largest_micro_batch(model, plan.rows, length, precision, process, coming, sample_rows=each)


def _open_record(process: Process, *parts: Any) -> Record | None:
    """The record, in the main process alone; all others wait until its files are in place."""
    record, error = None, None
    if process.is_main:
        try:
            record = Record(*parts)
        except UserError as raised:
            error = raised
    process.fail_together(error)
    return record


def _headline(
    name: str, model: Transformer, plan: Plan, process: Process, precision: Precision, progress: Progress
) -> str:
    where = f"{process.world_size} x {process.device.type}" if process.world_size > 1 else process.device.type
    steps = f"steps {progress.step + 1} to {plan.steps}" if progress.step else f"{plan.steps} steps"
    return (
        f"{name}: {count(model.num_parameters())} parameters, {steps} of {count(plan.tokens_per_step)} tokens, "
        f"{precision.name} on {where}"
    )
