"""The states that a step learns on: the teacher's own, and those of the variants' trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ppcl.calibration.guidance import Guidance
from ppcl.calibration.schedules import Schedule
from ppcl.config.schema import Finetuning
from ppcl.models import ModelAdapter
from ppcl.training.data import Samples, batch_of
from ppcl.training.finetuning.rollouts import Rollouts
from ppcl.training.finetuning.solvers import EulerSolver, RolloutSolver, rollout_solver
from ppcl.training.run_context import RunContext

# Trajectories that run at once, in batches: more than one step learns on, so that successive steps see different ones.
_POOL = 8
# Samples that the timesteps of trajectories are taken from, at most.
_GRID_SAMPLES = 512


@dataclass(frozen=True)
class StateBatch:
    """`inputs`: arguments of the transformer. `places (n,)`: the rollouts that the last rows are taken from.

    With guidance these are `2 n` rows: the conditional side of each rollout, then the unconditional side of each.
    """

    inputs: dict[str, Any]
    places: np.ndarray


@dataclass(frozen=True)
class Sampler:
    """What draws the teacher's images: its scheduler, and the schedule that calibration recorded.

    `schedule`: None in a calibration set without one; trajectories of `steps` steps are then read off its samples.
    """

    scheduler: Any
    schedule: Schedule | None
    steps: int


class StateBatches:
    """One replica's share of each batch: the teacher's states first, the rollouts behind them.

    `sampler`: what moves a trajectory on. `guidance`: how it follows both sides of guidance, as the sampler does; None
    where the sampler makes one call a step.
    """

    def __init__(
        self,
        samples: Samples,
        adapter: ModelAdapter,
        settings: Finetuning,
        sampler: Sampler,
        run: RunContext,
        guidance: Guidance | None = None,
    ):
        self.samples, self.adapter, self.settings, self.run = samples, adapter, settings, run
        self.dtype = run.dtype(settings.precision)
        self.ids = samples.ids("train")
        self.guidance = guidance
        self.rollouts = self._start_rollouts(sampler) if settings.rollout_share else None

    def _start_rollouts(self, sampler: Sampler) -> Rollouts:
        """Trajectories that start on the teacher's states, and so at all timesteps from the first step on."""
        schedule = sampler.schedule
        if schedule is None:
            inputs = self.samples.batch(self.ids[:: max(1, len(self.ids) // _GRID_SAMPLES)], "cpu", torch.float32)
            schedule = Schedule.of_timesteps(self._noise_shares(inputs), sampler.steps)
        prompts = self.ids if self.guidance is None else conditional_ids(self.ids)
        order = np.random.default_rng([self.run.seed, self.run.dims.dp_rank]).permutation(prompts)
        ids = order[: _POOL * self.settings.batch_size]
        inputs = self.samples.batch(ids, "cpu", torch.float32)
        latents = inputs[self.adapter.latents]
        # Samples without a schedule may lie between the steps of one, where only Euler's method can begin.
        solver: RolloutSolver = EulerSolver(schedule)
        if sampler.schedule is not None:
            solver = rollout_solver(sampler.scheduler, schedule, len(ids), latents.shape[1:])
        return Rollouts(ids, self._noise_shares(inputs), latents, schedule, prompts, solver)

    def _noise_shares(self, inputs: dict[str, Any]) -> np.ndarray:
        """The timesteps of a batch as shares of noise in [0, 1]."""
        return inputs[self.adapter.timestep].double().cpu().numpy() / self.adapter.timestep_scale

    def draw(self, step: int, rng: np.random.Generator) -> StateBatch:
        """This replica's share of a step's batch."""
        dims, device = self.run.dims, self.run.device
        ids = batch_of(step, self.ids, self.settings.batch_size, self.run.seed)[dims.dp_rank :: dims.dp]
        if self.rollouts is None:
            return StateBatch(self.samples.batch(ids, device, self.dtype), np.array([], dtype=np.int64))
        sides = 1 if self.guidance is None else 2
        places = self.rollouts.draw(round(self.settings.rollout_share * len(ids) / sides), rng)
        prompts = self.rollouts.ids[places]
        own = prompts if sides == 1 else np.concatenate([prompts, other_side(prompts)])
        first = len(ids) - len(own)
        inputs = self.samples.batch(np.array([*ids[:first], *own]), device, self.dtype)
        latents, timestep = inputs[self.adapter.latents], inputs[self.adapter.timestep]
        rows = np.tile(places, sides)
        latents[first:] = self.rollouts.latents[rows].to(latents)
        shares = torch.from_numpy(self.rollouts.timesteps[rows])
        timestep[first:] = (shares * self.adapter.timestep_scale).to(timestep)
        return StateBatch(inputs, places)

    def advance(self, batch: StateBatch, velocity: torch.Tensor, rng: np.random.Generator) -> None:
        """Move the rollouts of a batch on by one step along the variant's velocity `(B, …)`."""
        count = len(batch.places)
        if self.rollouts is None or not count:
            return
        velocity = velocity.detach()
        if self.guidance is None:
            followed = velocity[-count:]
        else:
            followed = self.guidance(velocity[-2 * count : -count], velocity[-count:])
        self.rollouts.advance(batch.places, followed, rng)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state of all replicas' rollouts, for a checkpoint; all of them call it."""
        if self.rollouts is None:
            return {}
        dims = self.run.dims
        # One from each replica, then the next: the same number of replicas finds its own again.
        return {
            name: torch.stack(dims.all_gather(tensor), 1).flatten(0, 1)
            for name, tensor in self.rollouts.tensors().items()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `tensors` gave, of however many replicas: each takes its share."""
        if self.rollouts is not None:
            names, dims = self.rollouts.tensors().keys(), self.run.dims
            self.rollouts.restore({name: tensors[name][dims.dp_rank :: dims.dp].clone() for name in names})


def conditional_ids(ids: np.ndarray) -> np.ndarray:
    """Of the ids of samples those of the conditional side whose other side is there, too.

    See `ppcl.calibration.trajectory_recorder.StateSettings.sample_id`.
    """
    conditional = ids[ids % 2 == 0]
    return conditional[np.isin(other_side(conditional), ids)]


def other_side(conditional: np.ndarray) -> np.ndarray:
    """The ids of the same states on the unconditional side of guidance."""
    return conditional + 1
