"""The training loop, for pre-training and fine-tuning, on one process or many.

A step, in the order of the code:

1. The loader gives this process its rows of the global batch, and the processes tell one another how many targets (or
   pairs, as the objective counts) of the whole batch are valid. That number travels between the hosts; no device is
   waited for.
2. Each micro-batch adds the gradient of its *summed* loss over that global count. So every valid token weighs the same,
   in whichever micro-batch or process it lies, however many of its neighbours are masked.
3. Gradients are clipped by their global norm. A step whose norm is not finite is left out by the optimizers, on the
   device; one without a valid token is left out before the forward pass. Both are counted.

Between two log lines nothing is read back from the device. Whatever changes over the run is a pure function of the
step, so a checkpoint needs to remember no more than where the run stands.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.schema import Config
from data.data_loader import Batch, DataLoader, SampleSource
from data.places import places
from model.transformer import Transformer
from training import randomness
from training.adapters import weights_state
from training.checkpointing import GOES_ON
from training.console import Console, count, duration, size
from training.distributed import Process
from training.gauges import memory_in_use, temperature
from training.measuring import Ask, EarlyStopping, Evaluate, Measured, Sample, due_at
from training.meter import Meter
from training.objectives import Objective
from training.optimizers import Optimizers
from training.parallelism import aside, averaged_over, micro_batch
from training.plan import Plan
from training.precision import Precision
from training.profiling import Profile
from training.record import Record
from training.schedules import piece_length, rate_factor
from training.setup import Progress
from training.sharded_saving import ShardedSaving
from training.shares import agree_on_overflow, gradient_norm, take_gradients
from training.signals import SAVE, STOP, Requests
from training.spikes import PlacesOf, SpikeGuard
from training.tracking import SKIPPED


@dataclass
class Loop:
    """The parts of a run, and the loop over its steps. `forward` is `model`, compiled and parallel as need be."""

    config: Config
    plan: Plan
    process: Process
    precision: Precision
    model: Transformer
    forward: nn.Module
    optimizers: Optimizers
    progress: Progress
    meter: Meter
    console: Console
    record: Record | None
    sharded: ShardedSaving | None
    requests: Requests
    guard: SpikeGuard
    stopping: EarlyStopping
    objective: Objective
    evaluate: Evaluate
    ask: Ask | None
    sampler: Sample | None
    tokenizer_fingerprint: str
    finetuning: dict[str, Any] | None
    validation_loss: float | None
    profile: Profile | None = None
    reading: str = ""

    def run(self, source: SampleSource) -> int | None:
        """Take every step that is left, or as many as are of use; a signal or, for time, 0 where that ended the run."""
        training, plan, process = self.config.training, self.plan, self.process
        loader = DataLoader(
            source,
            batch_size=plan.batch_size,
            seed=training.seed,
            rank=process.data_rank,
            world_size=process.data_size,
            cursor=plan.sequences_through(self.progress.step),
            sizes=plan.sizes_after(self.progress.step),
            prefetch_batches=self.config.data.loader.prefetch_batches,
            pin_memory=process.device.type == "cuda",
        )
        places_of = partial(places, source, seed=training.seed)
        self.objective.begin(self.model, process)
        gc.freeze()
        try:
            if self._was_enough(self.progress.step):
                return None
            for step in range(self.progress.step + 1, plan.steps + 1):
                first = loader.cursor
                batch = next(loader)
                self._update(step, batch, range(first, loader.cursor))
                self.progress.step = step
                asking = self.requests.take(self.record.seconds_to_save if self.record else 0.0)
                asked, busy = process.largest_each(asking, int(self.sharded is not None and self.sharded.busy))
                stopped = asked >= STOP
                last = step == plan.steps or stopped

                due = last or step % training.checkpoint_interval == 0
                saving = due or asked == SAVE
                measured = {} if stopped else self._measure(step, due)
                enough = self._enough(step, measured)
                last, saving = last or enough, saving or enough
                if measured or saving or step % training.log_interval == 0:
                    self._account(places_of)
                    self._log(step, measured)
                if training.sample_interval and (step % training.sample_interval == 0 or step == plan.steps):
                    self._sample(step)
                if saving:
                    self._save(loader.cursor, measured, final=last)
                elif self.sharded is not None:
                    self.sharded.tend(partial(self._state, loader.cursor, {}), bool(busy))
                elif self.record is not None:
                    self.record.tend(partial(self._state, loader.cursor, {}))
                if stopped or enough:
                    return asked - STOP if stopped else None
                self.console.status(f"step {step}/{plan.steps}{self.reading}")
                if self.profile is not None:
                    self.profile.step()
            return None
        finally:
            gc.unfreeze()
            loader.close()
            if self.profile is not None:
                self.profile.close()

    def _update(self, step: int, batch: Batch, samples: range) -> None:
        """One optimizer step over the global batch `samples`; `batch` is this process's share of it, (rows, time)."""
        training, plan, process, device = self.config.training, self.plan, self.process, self.process.device
        length = piece_length(training.short_sequences, step, plan.steps, plan.sequence_length)
        flops_per_token = self.model.flops_per_token(length)
        self.meter.add(plan.tokens_of(step), flops_per_token)
        self.progress.flops += plan.tokens_of(step) * flops_per_token
        valid = process.total(self.objective.count(batch))
        if valid == 0:
            self.progress.empty_steps += 1
            return
        self.optimizers.set_rate_factor(rate_factor(training.schedule, step, plan.steps))
        if self.config.model.dropout > 0 or training.adapter.dropout > 0:
            randomness.seed_step(training.seed, step, process.data_rank)

        passes = len(batch.inputs) // plan.micro_rows_of(len(batch.inputs))
        micro_batches = batch.micro_batches(passes, length, device)
        loss_sum = torch.zeros((), device=device)
        for number, part in enumerate(micro_batches, start=1):
            with micro_batch(self.forward, last=number == len(micro_batches)):
                with self.precision.autocast():
                    loss = self.objective.loss(self.forward, part)
                scaled = self.precision.scaler.scale(loss * (averaged_over(self.forward) / valid))
                scaled.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()

        norm = self._clip()
        skip = self.guard.judge(norm, step, samples)
        for saving in (self.record, self.sharded):
            if saving is not None:
                saving.settle()
        self.optimizers.step(skip)
        if self.precision.scaler.is_enabled():
            self.precision.scaler.update()
        self.optimizers.zero_grad()
        self.meter.add_loss(loss_sum, valid, norm, skip)

    def _clip(self) -> Tensor:
        """Scale the gradients down to `gradient_clip`; returns their norm before, a scalar on the device."""
        take_gradients(self.optimizers.shares)
        for part in self.optimizers.parts.values():
            self.precision.scaler.unscale_(part)
            if self.plan.layout.shares_weights:
                agree_on_overflow(self.precision.scaler, part)
        parameters = self.optimizers.parameters
        norm = gradient_norm(self.optimizers.shares)
        if self.config.training.gradient_clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config.training.gradient_clip, norm)
        return norm

    def _measure(self, step: int, due: bool) -> Measured:
        """What is to be measured at this step; where a checkpoint is `due`, what the best one is told by, too."""
        wanted = due_at(self.config.training, step, step == self.plan.steps, due)
        judging, ask = "validation_loss" in wanted, self.ask if "task_accuracy" in wanted else None
        measured: Measured = {}
        if not judging and ask is None:
            return measured
        share = self.process.data_rank, self.process.data_size
        with self.meter.aside(), randomness.undisturbed(), aside(self.model):
            if judging:
                found = self.evaluate(self.model, *share)
                measured["validation_loss"] = self.validation_loss = found.loss
                measured |= {name: getattr(found, name) for name in self.objective.measures}
            if ask is not None:
                # A sharded model is run by all processes or none, so each answers every question.
                alone = self.plan.layout.shares_weights
                measured["task_accuracy"] = ask(self.model, *((0, 1) if alone else share))
            self.model.train()
        return measured

    def _enough(self, step: int, measured: Measured) -> bool:
        """Whether early stopping ends the run after `step`; all processes agree."""
        return self.stopping.judge(step, measured) and bool(self.process.largest(int(self.stopping.over)))

    def _was_enough(self, step: int) -> bool:
        """The same of the step that this run goes on from, where it was stopped before it could measure anything."""
        due = step % self.config.training.checkpoint_interval == 0
        return self.stopping.owes(step) and self._enough(step, self._measure(step, due))

    def _account(self, places_of: PlacesOf) -> None:
        """Count and write down the steps left out since the last reading; end a run that no longer gets anywhere."""
        with self.meter.aside():
            for each in self.guard.read():
                self.progress.count_skipped(each)
                if self.record is not None:
                    self.record.tracker.skipped(each.step, each.norm, each.reason, places_of(each.samples))
        run_dir = self.record.tracker.directory if self.record is not None else ""
        self.process.fail_together(self.guard.lost(places_of, f"{run_dir}/{SKIPPED}"))

    def _log(self, step: int, measured: Measured) -> None:
        reading = self.meter.read()
        left = duration((self.plan.steps - step) * reading.seconds_per_step)
        shown = "    -" if reading.loss is None else f"{reading.loss:.3f}"
        self.reading = f"  loss {shown}  {count(reading.tokens_per_second)} tok/s  MFU {reading.mfu:.0%}  ETA {left}"
        memory, degrees = memory_in_use(self.process.device), temperature(self.process.device)
        self.reading += f"  {size(memory)}" + ("" if degrees is None else f"  {degrees}°C")
        self.console.progress(f"step {step}/{self.plan.steps}{self.reading}")
        for name, value in measured.items():
            self.console.say(f"step {step}/{self.plan.steps}  {name.replace('_', ' ')} {value:.4f}")
        if self.record is None:
            return
        row = {
            "step": step,
            "tokens": self.plan.tokens_through(step),
            "loss": reading.loss,
            "validation_loss": measured.get("validation_loss"),
            **{name: measured.get(name) for name in self.objective.measures},
            **({} if self.ask is None else {"task_accuracy": measured.get("task_accuracy")}),
            "learning_rate": self.optimizers.learning_rate,
            "gradient_norm": reading.gradient_norm,
            "tokens_per_second": reading.tokens_per_second,
            "mfu": reading.mfu,
            "seconds": self.progress.elapsed(),
            "flops": self.progress.flops,
            "memory_bytes": memory,
            "gpu_temperature": degrees,
            "skipped_steps": self.progress.skipped_steps,
        }
        with self.meter.aside():
            self.record.tracker.log(row)
            if measured:
                self.record.tracker.draw()

    def _sample(self, step: int) -> None:
        together = self.plan.layout.shares_weights
        if self.sampler is None or (self.record is None and not together):
            return
        # A sharded model is run by all processes: each writes the same text. Its blocks are gathered for autocast.
        autocast = self.precision.autocast() if together else nullcontext()
        with self.meter.aside(), randomness.undisturbed(), aside(self.model), autocast:
            text = self.sampler(self.model)
            self.model.train()
        if self.record is None:
            return
        self.record.tracker.sample(step, text)
        self.console.say(f"step {step}/{self.plan.steps}  sample: {text}")

    def _save(self, cursor: int, measured: Measured, final: bool) -> None:
        with self.meter.aside():
            error = self._write(cursor, measured, final)
        if final:
            self.process.fail_together(error)
        elif error is not None:
            self.console.say(f"warning: {error} {GOES_ON}")

    def _write(self, cursor: int, measured: Measured, final: bool) -> UserError | None:
        """Write a checkpoint: of a sharded model all processes together, else the main one alone."""
        if self.sharded is not None:
            return self.sharded.save(self._state(cursor, measured), final)
        return None if self.record is None else self.record.save(self._state(cursor, measured), final)

    def _state(self, cursor: int, measured: Measured) -> dict[str, Any]:
        return {
            **weights_state(self.model),
            "optimizer": self.optimizers.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "spikes": self.guard.state_dict(),
            "stopping": self.stopping.state_dict(),
            "threads": torch.get_num_threads(),
            "rng": randomness.capture(),
            "step": self.progress.step,
            "cursor": cursor,
            "progress": self.progress.state_dict(),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "finetuning": self.finetuning,
            "validation_loss": measured.get("validation_loss"),
            "task_accuracy": measured.get("task_accuracy"),
        }
