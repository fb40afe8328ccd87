"""Fine-tuning the replacements end to end on the velocity, over random plans, one per step.

The paper fine-tunes one fixed configuration, which is no longer freely pluggable. Here every step draws a plan, by
default a named variant or a part of one, plugs it in, and trains the replacements that are on to give the teacher's
velocity; the teacher itself is never changed. So each replacement learns to work with and without the others. A fixed
plan is the special case, and with `finetuning.train: all` the paper's: copies of the teacher's blocks that stay in the
plan are trained with it. The distilled replacements stay beside the fine-tuned ones, for the plans that they are better
for; see `ppcl.replacements.finetuned_selection`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ppcl.calibration.dataset import CalibrationSet
from ppcl.calibration.guidance import Guidance
from ppcl.calibration.schedules import Schedule
from ppcl.config.schema import Finetuning, Sampling
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, Replacement
from ppcl.replacements.io import save_replacement
from ppcl.storage.manifest import write_atomically
from ppcl.training.data import Samples
from ppcl.training.finetuning.checkpoints import load_rest, load_sharded, newest_checkpoint, save_checkpoint
from ppcl.training.finetuning.measured_plans import plan_rows, plans_to_measure, velocity_errors
from ppcl.training.finetuning.plan_sampler import ALL, FixedPlan, PlanSampler, plan_sampler, trainable
from ppcl.training.finetuning.state_batches import Sampler, StateBatches
from ppcl.training.finetuning.tuned_blocks import tuned_blocks
from ppcl.training.finetuning.variant_model import VariantModel
from ppcl.training.losses import LossTerm
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from ppcl.training.sharding import whole
from ppcl.training.train_state import TrainState

# Steps of which the losses are kept, at most about so many.
_HISTORY_POINTS = 200


@dataclass(frozen=True)
class DistilledReplacements:
    """What fine-tuning starts from.

    `files`: by replacement, its file. `variants`: the named plans. `sensitivity`: each replacement's velocity error
    alone, by which plans are compared; see `ppcl.replacements.finetuned_selection`.
    """

    files: Mapping[Replacement, Path]
    variants: Mapping[str, Sequence[Replacement]]
    sensitivity: Mapping[Replacement, float]


def finetune(
    teacher: Teacher,
    samples: Samples,
    distilled: DistilledReplacements,
    settings: Finetuning,
    run: RunContext,
    sampling: Sampling,
) -> None:
    """Train replacements and write them to `run.folder`, with `finetuning.json`: losses, and measured plans.

    The variants and `settings.measured_plans` drawn plans are measured before and after. `sampling`: how the variants'
    trajectories are sampled. A stopped run resumes from its checkpoint. Raises `UserError` where `settings` names a
    plan that cannot be.
    """
    trainer = _Trainer(teacher, samples, distilled, settings, run, sampling)
    writes = run.dims.dp_rank == 0
    plans = plans_to_measure(trainer.sampler, distilled.variants, settings.measured_plans, run.seed)
    before = velocity_errors(trainer.model, samples, plans, run)
    if checkpoint := newest_checkpoint(run.checkpoints, run.dims, run.report_damaged):
        trainer.resume(checkpoint)
    trainer.train()
    after = velocity_errors(trainer.model, samples, plans, run)
    trainer.write()
    if writes:
        errors = dict(zip(map(tuple, plans), zip(before, after, strict=True), strict=True))
        record = {
            "steps": settings.steps,
            "fixed": isinstance(trainer.sampler, FixedPlan),
            "train": settings.train,
            "curve": trainer.state.loss_history,
            "skipped_steps": trainer.state.skipped_steps,
            "plans": plan_rows(errors, distilled.variants, trainer.replacements, distilled.sensitivity),
        }
        write_atomically(run.folder / "finetuning.json", json.dumps(record))
    run.dims.barrier()


class _Trainer:
    """One data-parallel replica: the model, its batches, and the optimizer's state."""

    def __init__(
        self,
        teacher: Teacher,
        samples: Samples,
        distilled: DistilledReplacements,
        settings: Finetuning,
        run: RunContext,
        sampling: Sampling,
    ):
        self.settings, self.run, self.adapter = settings, run, teacher.adapter
        dtype = run.dtype(settings.precision)
        shard_over = run.dims if settings.shard and run.dims.dp > 1 else None
        block_ranges = self.adapter.block_ranges(teacher.empty_transformer())
        self.sampler: PlanSampler = plan_sampler(settings, distilled.files, distilled.variants, block_ranges)
        files, tuned = distilled.files, {}
        if settings.train == ALL:
            files = {one: distilled.files[one] for one in self.sampler.replacements}
            tuned = tuned_blocks(teacher, files)
            self.sampler = FixedPlan([*files, *tuned])
        self.model = VariantModel(
            teacher, files, tuned, run.device, dtype, settings.activation_checkpointing, shard_over
        )
        self.replacements = trainable(self.sampler.replacements)
        self.state = TrainState(self.model.trained_parameters(self.replacements), settings, run.dims)
        guidance = Guidance.of(teacher.adapter, teacher.pipeline_class, sampling)
        schedule = Schedule.of_call(samples.call, self.adapter) if isinstance(samples, CalibrationSet) else None
        sampler = Sampler(teacher.scheduler(), schedule, sampling.steps)
        self.batches = StateBatches(samples, self.adapter, settings, sampler, run, guidance)

    def train(self) -> None:
        """Train to the last step, with a checkpoint now and then; the parameters end as their averages."""
        settings, state = self.settings, self.state
        every = max(1, settings.steps // _HISTORY_POINTS)
        while state.step < settings.steps:
            losses = self.train_step()
            state.record(losses, every)
            due = state.step % settings.checkpoint_every == 0 or state.step == settings.steps
            if due:
                self.save_checkpoint()
            self.run.report(state.step, settings.steps, {"velocity": losses["loss"]})
        state.use_ema()

    def train_step(self) -> dict[str, float]:
        """One optimizer step; gives the relative squared velocity error of the drawn plan, and the plan's length.

        With `feature_loss` the loss is the sum of two logarithms, the velocity's error and that of the streams.
        """
        seed, step = self.run.seed, self.state.step
        # All replicas draw the same plan, and each its own rollouts.
        plan = self.sampler.draw(np.random.default_rng([seed, step]))
        rng = np.random.default_rng([seed, step, self.run.dims.dp_rank])
        batch = self.batches.draw(step, rng)
        wanted: list[torch.Tensor] | None = [] if self.settings.feature_loss else None
        features: list[torch.Tensor] | None = [] if self.settings.feature_loss else None
        with torch.no_grad():
            target = self.model.velocity((), batch.inputs, features=wanted).float()
        velocity = self.model.velocity(plan, batch.inputs, training=True, features=features).float()
        terms = {"velocity": ((velocity - target).square().sum(), target.square().sum())}
        if wanted is not None and features is not None:
            terms["features"] = feature_error(features, wanted, plan, self.run.dims)
        # The gradient of the error's logarithm: a plan with few replacements, whose error is small, counts as much as
        # one with many. On the error itself the large plans decide everything, and the small ones get worse.
        losses = self.state.train_step(terms, logarithm=True)
        self.batches.advance(batch, velocity, rng)
        self.model.unplug()
        return {"loss": losses["velocity"], "entries": len(plan)}

    def write(self) -> None:
        """Write the trained replacements. All replicas take part, and the first one writes."""
        for replacement in self.replacements:
            module = self.model.module(replacement)
            tensors = {name: whole(tensor) for name, tensor in module.state_dict().items()}
            if self.run.dims.dp_rank == 0:
                path = self.run.folder / f"{replacement.name}.safetensors"
                save_replacement(module, replacement, self.adapter, path, tensors)

    def save_checkpoint(self) -> None:
        """Write everything that a stopped run needs to continue. All replicas take part.

        The next run may have another number of them.
        """
        rest, metadata = self.state.rest()
        rest |= self.batches.tensors()
        dims = self.run.dims
        save_checkpoint(self.run.checkpoints, self.state.step, self.state.tensors(), rest, metadata, dims)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. All replicas take part."""
        rest, metadata = load_rest(checkpoint)
        load_sharded(checkpoint, self.state.restart(rest, metadata))
        self.batches.restore(rest)


def feature_error(
    features: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], plan: Sequence[Replacement], dims: ParallelDims
) -> LossTerm:
    """The mean over the blocks of the relative squared error of the image streams behind them, as a loss term.

    `features`, `wanted`: `(B, S, d)` of the variant and the teacher behind each block. Within an interval of the plan
    the variant has no stream of its own.
    """
    inside = {block for one in plan if isinstance(one, Interval) for block in one.blocks[:-1]}
    pairs = [(x, y) for block, (x, y) in enumerate(zip(features, wanted, strict=True)) if block not in inside]
    errors = torch.stack([(x.float() - y.float()).square().sum() for x, y in pairs])
    energies = torch.stack([y.float().square().sum() for _, y in pairs])
    # The energies of all replicas, so that a batch has the same loss however it is split.
    shares = errors / dims.all_reduce(energies.double()).to(errors)
    return shares.sum(), torch.tensor(len(pairs) / dims.dp)
