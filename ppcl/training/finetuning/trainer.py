"""Fine-tuning the replacements end to end on the velocity, over plans drawn anew at every step.

The paper fine-tunes one fixed configuration, which is no longer freely pluggable. Here every step draws a plan, by default
a named variant or a part of one, plugs it in, and trains the replacements that are on to give the teacher's velocity; the
teacher itself is never changed. So each replacement learns to work with and without the others. A fixed plan is the
special case. What was distilled is kept beside it, for the plans that it is better for; see `ppcl.replacements.finetuned_selection`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl.config.schema import Finetuning
from ppcl.models import swap
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.replacements.finetuned_selection import FinetunedSelection, ratios_of
from ppcl.replacements.io import save_replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.storage.manifest import write_atomically
from ppcl.storage.tensor_files import load_tensors, save_tensors
from ppcl.training.data import Samples, batch_of
from ppcl.training.finetuning.plan_sampler import (
    FixedPlan,
    PlanSampler,
    VariantParts,
    plan_sampler,
    random_plans,
    trainable,
)
from ppcl.training.finetuning.rollouts import Rollouts, visited_timesteps
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.progress import ProgressReport
from ppcl.training.train_state import TrainState

_CHECKPOINT = "checkpoint.safetensors"
# Steps of which the losses are kept, at most about so many.
_HISTORY_POINTS = 200
# Held-out samples on which plans are measured, at most, and how many at once.
_MEASURED_SAMPLES, _MEASURED_BATCH = 192, 32
# Trajectories that run, in batches.
_POOL = 8


class _Recomputed(nn.Module):
    """A block whose inner activations are not kept for the backward pass but computed again."""

    context_pre_only = False

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, **arguments: Any) -> Any:
        return checkpoint(self.block, use_reentrant=False, **arguments)


class _Trainer:
    """One replica: the teacher, the replacements in training, and the optimizer."""

    def __init__(
        self,
        teacher: Teacher,
        files: Mapping[Replacement, Path],
        variants: Mapping[str, Sequence[Replacement]],
        samples: Samples,
        settings: Finetuning,
        dims: ParallelDims,
        seed: int,
        steps: int,
        device: str,
        bfloat16: bool,
    ):
        self.adapter = teacher.adapter
        self.samples, self.settings, self.dims, self.seed, self.device = samples, settings, dims, seed, device
        self.bfloat16, self.dtype = bfloat16, torch.bfloat16 if bfloat16 else torch.float32
        self.model = teacher.transformer(device=device, dtype=self.dtype)
        self.switch = VariantSwitcher(teacher, files)
        self.draws = plan_sampler(settings, files, variants, self.adapter.block_ranges(self.model))
        self.replacements = trainable(self.draws.replacements)
        self.modules = {
            replacement: self.switch.module(replacement, self.model.device, self.dtype) for replacement in files
        }
        for replacement in self.replacements:
            # Trained in float32 whatever the teacher runs in; autocast brings both together.
            self.modules[replacement].float().requires_grad_(True)
        parameters = {
            f"{replacement.name}.{name}": p
            for replacement in self.replacements
            for name, p in self.modules[replacement].named_parameters()
        }
        self.state = TrainState(parameters, settings, dims)
        self.ids = samples.ids(held_out=False)
        self.trajectories = self._begun(steps) if settings.rollout_share else None

    def _begun(self, steps: int) -> Rollouts:
        """Trajectories of `steps` steps, begun on the teacher's states, so that from the start they are at all timesteps."""
        inputs = self.samples.batch(self.ids[:: max(1, len(self.ids) // 512)], "cpu", torch.float32)
        grid = visited_timesteps(self._shares(inputs), steps)
        # More than one step learns on, so that those of one step are no neighbours of those of the step before.
        ids = np.random.default_rng([self.seed, self.dims.dp_rank]).permutation(self.ids)[
            : _POOL * self.settings.batch_size
        ]
        inputs = self.samples.batch(ids, "cpu", torch.float32)
        return Rollouts(ids, self._shares(inputs), inputs[self.adapter.latents], grid, self.ids)

    def _shares(self, inputs: dict[str, Any]) -> np.ndarray:
        """The timesteps of a batch as shares of noise."""
        return inputs[self.adapter.timestep].double().cpu().numpy() / self.adapter.timestep_scale

    def batch(self, step: int, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        """The teacher's states, and behind them the variants' own; the places of those, and the transformer's arguments."""
        ids = batch_of(step, self.ids, self.settings.batch_size, self.seed)[self.dims.dp_rank :: self.dims.dp]
        if self.trajectories is None:
            return np.array([], dtype=np.int64), self.samples.batch(ids, self.device, self.dtype)
        own = self.trajectories.draw(round(self.settings.rollout_share * len(ids)), rng)
        ids = np.array([*ids[: len(ids) - len(own)], *self.trajectories.ids[own]])
        inputs = self.samples.batch(ids, self.device, self.dtype)
        latents, timestep = inputs[self.adapter.latents], inputs[self.adapter.timestep]
        latents[len(ids) - len(own) :] = self.trajectories.latents[own].to(latents)
        shares = torch.from_numpy(self.trajectories.timesteps[own])
        timestep[len(ids) - len(own) :] = (shares * self.adapter.timestep_scale).to(timestep)
        return own, inputs

    def velocity(self, plan: Sequence[Replacement], inputs: dict[str, Any], training: bool) -> torch.Tensor:
        self.switch(self.model, plan)
        if training and self.settings.activation_checkpointing:
            swap(self.model, {n: _Recomputed(b) for n, b in enumerate(self.adapter.blocks(self.model))})
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.model(**{**inputs, "return_dict": False})[0]

    def train_step(self) -> dict[str, float]:
        """One optimizer step; the relative squared error of the drawn plan's velocity."""
        step = self.state.step
        # The same plan on all replicas; their rollouts differ.
        plan = self.draws.draw(np.random.default_rng([self.seed, step]))
        rng = np.random.default_rng([self.seed, step, self.dims.dp_rank])
        own, inputs = self.batch(step, rng)
        with torch.no_grad():
            target = self.velocity((), inputs, training=False).float()
        velocity = self.velocity(plan, inputs, training=True).float()
        term = (velocity - target).square().sum(), target.square().sum()
        # The gradient of the error's logarithm: a plan with few replacements, whose error is small, counts as much as one
        # with many. On the error itself the large plans decide everything, and the small ones get worse.
        losses = self.state.train_step({"velocity": term}, logarithm=True)
        if self.trajectories and len(own):
            self.trajectories.advance(own, velocity.detach()[-len(own) :], rng)
        self.switch(self.model, ())
        return {"loss": losses["loss"], "entries": len(plan)}

    @torch.no_grad()
    def errors(self, plans: Sequence[Sequence[Replacement]], report: ProgressReport) -> list[float]:
        """The velocity error of each plan on held-out samples, at most `_MEASURED_SAMPLES` of them, spread evenly."""
        ids = self.samples.ids(held_out=True)
        ids = ids[:: -(-len(ids) // _MEASURED_SAMPLES)]
        batches = [ids[start : start + _MEASURED_BATCH] for start in range(0, len(ids), _MEASURED_BATCH)]
        error, energy = torch.zeros(len(plans), dtype=torch.float64), 0.0
        for number, batch in enumerate(batches):
            inputs = self.samples.batch(batch, self.device, self.dtype)
            target = self.velocity((), inputs, training=False).double()
            energy += float(target.square().sum())
            for index, plan in enumerate(plans):
                velocity = self.velocity(plan, inputs, training=False).double()
                error[index] += (velocity - target).square().sum().cpu()
                done = number * len(plans) + index + 1
                report(done, len(batches) * len(plans), {}, phase="measuring plans")
        self.switch(self.model, ())
        return (error / energy).tolist()

    def train(self, checkpoints: Path, report: ProgressReport) -> None:
        """Train to the last step, with a checkpoint now and then; the parameters end as their averages."""
        settings, state = self.settings, self.state
        every = max(1, settings.steps // _HISTORY_POINTS)
        while state.step < settings.steps:
            losses = self.train_step()
            state.record(losses, every)
            if self.dims.dp_rank == 0 and (state.step % settings.checkpoint_every == 0 or state.step == settings.steps):
                self.save_checkpoint(checkpoints)
            report(state.step, settings.steps, {"velocity": losses["loss"]})
        state.use_ema()

    def save_checkpoint(self, folder: Path) -> None:
        """Write everything needed to go on."""
        tensors, metadata = self.state.state_dict()
        if self.trajectories:
            tensors |= self.trajectories.tensors()
        save_tensors(folder / _CHECKPOINT, tensors, metadata)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises `DamagedError`."""
        tensors, metadata = load_tensors(folder / _CHECKPOINT)
        self.state.load_state_dict(tensors, metadata)
        if self.trajectories:
            self.trajectories.restore(tensors)


def finetune(
    teacher: Teacher,
    files: Mapping[Replacement, Path],
    variants: Mapping[str, Sequence[Replacement]],
    sensitivity: Mapping[Replacement, float],
    samples: Samples,
    settings: Finetuning,
    sampling_steps: int,
    dims: ParallelDims,
    folder: Path,
    checkpoints: Path,
    seed: int,
    device: str,
    report: ProgressReport,
) -> None:
    """Train replacements and write those that were trained to `folder`, with `finetuning.json`: losses, and measured plans.

    `variants`: the named ones; they and `settings.measured_plans` drawn plans are measured before and after. `sensitivity`:
    what each replacement costs alone, by which plans are compared; see `ppcl.replacements.finetuned_selection`. `report`
    is called after every step and every measured plan. Goes on from what lies in `checkpoints`.
    """
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    trainer = _Trainer(teacher, files, variants, samples, settings, dims, seed, sampling_steps, device, bfloat16)
    writes = dims.dp_rank == 0
    plans = measured_plans(trainer.draws, variants, settings.measured_plans, seed)
    before = trainer.errors(plans, report) if writes else []
    has_checkpoint = (checkpoints / _CHECKPOINT).exists()
    dims.barrier()
    if has_checkpoint:
        trainer.load_checkpoint(checkpoints)
    trainer.train(checkpoints, report)
    if writes:
        after = trainer.errors(plans, report)
        for replacement in trainer.replacements:
            path = folder / f"{replacement.name}.safetensors"
            save_replacement(trainer.modules[replacement], replacement, teacher.adapter, path)
        record = {
            "steps": settings.steps,
            "fixed": isinstance(trainer.draws, FixedPlan),
            "curve": trainer.state.loss_history,
            "skipped_steps": trainer.state.skipped_steps,
            "plans": _plan_rows(plans, variants, before, after, trainer.replacements, sensitivity),
        }
        write_atomically(folder / "finetuning.json", json.dumps(record))
    dims.barrier()


def measured_plans(
    sampler: PlanSampler, variants: Mapping[str, Sequence[Replacement]], count: int, seed: int
) -> list[list[Replacement]]:
    """The plans whose velocity error is measured before and after: the variants with something to train, and drawn ones."""
    drawn = []
    if isinstance(sampler, FixedPlan):
        # Its parts, too: which of them are better with what was trained for the whole must be known.
        drawn, sampler = [sampler.replacements], VariantParts([sampler.replacements])
    drawn += [plan for plan in random_plans(sampler, count, seed) if plan not in drawn]
    named = {tuple(plan) for plan in variants.values() if trainable(plan)}
    kept = dict.fromkeys(tuple(plan) for plan in variants.values() if trainable(plan))
    return [*map(list, kept), *(plan for plan in drawn if tuple(plan) not in named)]


def _plan_rows(
    plans: Sequence[Sequence[Replacement]],
    variants: Mapping[str, Sequence[Replacement]],
    before: Sequence[float],
    after: Sequence[float],
    trained: Sequence[Replacement],
    sensitivity: Mapping[Replacement, float],
) -> list[dict[str, Any]]:
    """The rows of `finetuning.json`: each plan's error before and after, and which replacements it would take."""
    named = {tuple(plan): name for name, plan in variants.items() if trainable(plan)}
    rows: list[dict[str, Any]] = [
        {"plan": [str(r) for r in plan], "variant": named.get(tuple(plan)), "before": b, "after": a}
        for plan, b, a in zip(plans, before, after, strict=True)
    ]
    ratios = ratios_of(rows)
    for row, plan in zip(rows, plans, strict=True):
        # Of a drawn plan is told what would happen to one that was not measured.
        known = ratios if row["variant"] else {p: ratio for p, ratio in ratios.items() if p != frozenset(plan)}
        selection = FinetunedSelection(dict.fromkeys(trained, Path()), sensitivity, known)
        row["taken"] = selection.uses_finetuned(plan)
    return rows
