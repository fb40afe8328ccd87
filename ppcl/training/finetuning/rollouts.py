"""Rollouts: states of the variants' own trajectories, so that a variant learns on what it runs into itself.

A pool of trajectories runs beside the training. A step learns on some of them and moves those on by one step of the
sampler, with the velocity that it computed anyway; one that has reached its end starts again from fresh noise, with
another prompt. So the states never run out, they hold the errors a variant makes on its way, and they cost only their
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ppcl.calibration.schedules import Schedule
from ppcl.training.finetuning.solvers import EulerSolver, RolloutSolver


class Rollouts:
    """A pool of `N` trajectories.

    `ids (N,)`: the samples whose prompts they have. `timesteps (N,)`: what the transformer is given next, as shares of
    noise in [0, 1]. `steps (N,)`: their positions in the schedule. `latents (N, …)`, float32. `samples`: what new
    trajectories take their prompts from. `solver`: how they move on.
    """

    def __init__(
        self,
        ids: Sequence[int] | np.ndarray,
        timesteps: Sequence[float] | np.ndarray,
        latents: torch.Tensor,
        schedule: Schedule,
        samples: np.ndarray,
        solver: RolloutSolver | None = None,
    ):
        """`solver`: Euler's steps by default."""
        self.schedule, self.samples = schedule, samples
        self.solver = EulerSolver(schedule) if solver is None else solver
        self.ids = np.array(ids, dtype=np.int64)
        self.timesteps = np.array(timesteps, dtype=np.float64)
        self.steps = schedule.position(self.timesteps)
        self.latents = latents.float().cpu().clone()

    def __len__(self) -> int:
        return len(self.ids)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Places of `count` trajectories, none twice; fewer where there are fewer."""
        return rng.choice(len(self), size=min(count, len(self)), replace=False)

    def advance(self, places: np.ndarray, velocity: torch.Tensor, rng: np.random.Generator) -> None:
        """Move trajectories on to the next evaluation. `velocity`: `(B, …)`.

        Starts again where there is no next one or where the velocity is not finite.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for place, v in zip(places, velocity.float().cpu(), strict=True):
            step = int(self.steps[place])
            noise = torch.randn(self.latents.shape[1:], generator=generator)
            if step + 1 < len(self.schedule) and torch.isfinite(v).all():
                level = self.schedule.level(step, float(self.timesteps[place]))
                latents = self.latents[place]
                self.latents[place] = self.solver.step(int(place), step, level, latents, v.view_as(latents))
                self.steps[place] = step + 1
            else:
                self.solver.start(int(place))
                self.ids[place], self.steps[place] = rng.choice(self.samples), 0
                self.latents[place] = noise
            self.timesteps[place] = self.schedule.timesteps[self.steps[place]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state of all trajectories, for a checkpoint."""
        return {
            "trajectories.ids": torch.from_numpy(self.ids),
            "trajectories.timesteps": torch.from_numpy(self.timesteps),
            "trajectories.steps": torch.from_numpy(self.steps),
            "trajectories.latents": self.latents,
            **self.solver.tensors(),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `tensors` gave."""
        self.ids = tensors["trajectories.ids"].numpy()
        self.timesteps = tensors["trajectories.timesteps"].numpy()
        self.steps = tensors["trajectories.steps"].numpy()
        self.latents = tensors["trajectories.latents"]
        self.solver.restore(tensors)
