"""Fine-tuning the replacements end to end on the velocity, over plans drawn anew at every step.

The paper fine-tunes one fixed configuration, which is no longer freely pluggable. Here every step draws a plan, by default
a named variant or a part of one, plugs it in, and trains the replacements that are on to give the teacher's velocity; the
teacher itself is never changed. So each replacement learns to work with and without the others. A fixed plan is the
special case. What was distilled is kept beside it, for the plans that it is better for; see `ppcl.replacements.finetuned_selection`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl.config.schema import Finetuning
from ppcl.models import swap
from ppcl.models.teacher import Teacher
from ppcl.replacements.finetuned_selection import FinetunedSelection, ratios_of
from ppcl.replacements.io import save_replacement
from ppcl.replacements.plan import Replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.storage.tensor_files import load_tensors, save_tensors
from ppcl.training.data import Samples, batch_of
from ppcl.training.finetuning.plan_sampler import FixedPlan, VariantParts, plan_sampler, random_plans, trainable
from ppcl.training.finetuning.rollouts import Rollouts, visited_timesteps
from ppcl.training.optim import learning_rate
from ppcl.training.parallel_dims import ParallelDims

_CHECKPOINT = "checkpoint.safetensors"
_CURVE_POINTS = 200
_MEASURED_BATCH = 32
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
        self.parameters = {
            f"{replacement.name}.{name}": p
            for replacement in self.replacements
            for name, p in self.modules[replacement].named_parameters()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()} if settings.ema else {}
        self.ids = samples.ids(held_out=False)
        self.trajectories = self._begun(steps) if settings.rollout_share else None
        self.step, self.skipped = 0, 0
        self.loss_history: list[dict[str, float]] = []

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
        step = self.step
        # The same plan on all replicas; their own states differ.
        plan = self.draws.draw(np.random.default_rng([self.seed, step]))
        rng = np.random.default_rng([self.seed, step, self.dims.dp_rank])
        own, inputs = self.batch(step, rng)
        with torch.no_grad():
            target = self.velocity((), inputs, training=False).float()
        made = self.velocity(plan, inputs, training=True).float()
        error = (made - target).square().sum()
        sums = torch.stack([error.detach().double().cpu(), target.square().sum().double().cpu()])
        whole, energy = self.dims.all_reduce(sums).tolist()
        self.optimizer.zero_grad(set_to_none=True)
        # The gradient of the error's logarithm: a plan with few replacements, whose error is small, counts as much as one
        # with many. On the error itself the large plans decide everything, and the small ones get worse.
        (error / max(whole, 1e-12 * energy)).backward()
        self._reduce_gradients()
        learning = [p for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learning, self.settings.gradient_clip)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.settings)
            self.optimizer.step()
            if self.ema:
                weight = 1 - min(self.settings.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        else:
            self.skipped += 1
        if len(own):
            self.trajectories.advance(own, made.detach()[-len(own) :], rng)
        self.step += 1
        self.switch(self.model, ())
        return {"loss": whole / energy, "replacements": len(plan)}

    def _reduce_gradients(self) -> None:
        if self.dims.dp == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = self.dims.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))

    @torch.no_grad()
    def errors(self, plans: Iterable[Sequence[Replacement]]) -> list[float]:
        """The velocity error of plans on the held-out samples."""
        plans = list(plans)
        ids = self.samples.ids(held_out=True)
        error, energy = torch.zeros(len(plans), dtype=torch.float64), 0.0
        for start in range(0, len(ids), _MEASURED_BATCH):
            inputs = self.samples.batch(ids[start : start + _MEASURED_BATCH], self.device, self.dtype)
            target = self.velocity((), inputs, training=False).double()
            energy += float(target.square().sum())
            for index, plan in enumerate(plans):
                made = self.velocity(plan, inputs, training=False).double()
                error[index] += (made - target).square().sum().cpu()
        self.switch(self.model, ())
        return (error / energy).tolist()

    def save_checkpoint(self, folder: Path) -> None:
        """Everything needed to go on."""
        tensors = {f"parameter.{k}": p for k, p in self.parameters.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, p in self.parameters.items():
            if state := self.optimizer.state.get(p):
                tensors |= {f"{name}.{k}": torch.as_tensor(state[name]) for name in ("exp_avg", "exp_avg_sq", "step")}
        if self.trajectories:
            tensors |= self.trajectories.tensors()
        metadata = {"step": str(self.step), "skipped": str(self.skipped), "curve": json.dumps(self.loss_history)}
        save_tensors(folder / _CHECKPOINT, tensors, metadata)

    def load_checkpoint(self, folder: Path) -> None:
        tensors, metadata = load_tensors(folder / _CHECKPOINT)
        self.step, self.skipped = int(metadata["step"]), int(metadata["skipped"])
        self.loss_history = json.loads(metadata["curve"])
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(tensors[f"parameter.{k}"])
                if self.ema:
                    self.ema[k].copy_(tensors[f"ema.{k}"])
                if f"exp_avg.{k}" in tensors:
                    self.optimizer.state[p] = {
                        "step": tensors[f"step.{k}"],
                        **{name: tensors[f"{name}.{k}"].to(p.device) for name in ("exp_avg", "exp_avg_sq")},
                    }
        if self.trajectories:
            self.trajectories.restore(tensors)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averages where averages are kept."""
        for k, value in self.ema.items():
            self.parameters[k].copy_(value)


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
    report: Callable[[int, int, dict[str, float]], None],
) -> None:
    """Train replacements and write those that were trained to `folder`, with `finetuning.json`: the curve, and plans before
    and after.

    `variants`: the named ones; they and `settings.measured_plans` drawn plans are measured. `sensitivity`: what each replacement costs alone, by
    which plans are compared; see `ppcl.replacements.finetuned_selection`.
    `report(step, steps, losses)` is called after every step. Continues from what lies in `checkpoints`.
    """
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    trainer = _Trainer(teacher, files, variants, samples, settings, dims, seed, sampling_steps, device, bfloat16)
    named = {tuple(plan): name for name, plan in variants.items() if trainable(plan)}
    drawn, draws = [], trainer.draws
    if fixed := isinstance(draws, FixedPlan):
        # Its parts, too: which of them are better with what was trained for the whole must be known.
        drawn, draws = [draws.replacements], VariantParts([draws.replacements])
    drawn += [plan for plan in random_plans(draws, settings.measured_plans, seed) if plan not in drawn]
    plans = [*map(list, named), *(plan for plan in drawn if tuple(plan) not in named)]
    before = trainer.errors(plans) if dims.dp_rank == 0 else []
    found = (checkpoints / _CHECKPOINT).exists()
    dims.barrier()
    if found:
        trainer.load_checkpoint(checkpoints)
    every = max(1, settings.steps // _CURVE_POINTS)
    while trainer.step < settings.steps:
        told = trainer.train_step()
        step = trainer.step
        if (step - 1) % every == 0 or step == settings.steps:
            trainer.loss_history.append({"step": step - 1, **{k: round(v, 6) for k, v in told.items()}})
        if dims.dp_rank == 0 and (step % settings.checkpoint_every == 0 or step == settings.steps):
            trainer.save_checkpoint(checkpoints)
        report(step, settings.steps, {"velocity": told["loss"]})
    trainer.finish()
    if dims.dp_rank == 0:
        after = trainer.errors(plans)
        for replacement in trainer.replacements:
            save_replacement(
                trainer.modules[replacement], replacement, teacher.adapter, folder / f"{replacement.name}.safetensors"
            )
        rows = [
            {"plan": [str(e) for e in plan], "variant": named.get(tuple(plan)), "before": b, "after": a}
            for plan, b, a in zip(plans, before, after, strict=True)
        ]
        ratios = ratios_of(rows)
        for row, plan in zip(rows, plans, strict=True):
            # Told of a drawn plan is what would happen to one that was not measured.
            known = ratios if row["variant"] else {p: r for p, r in ratios.items() if p != frozenset(plan)}
            row["taken"] = FinetunedSelection(
                dict.fromkeys(trainer.replacements, folder), sensitivity, known
            ).uses_finetuned(plan)
        record = {
            "steps": settings.steps,
            "fixed": fixed,
            "curve": trainer.loss_history,
            "skipped_steps": trainer.skipped,
            "plans": rows,
        }
        (folder / "finetuning.json").write_text(json.dumps(record))
    dims.barrier()
