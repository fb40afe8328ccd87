"""The schedule of a sampling trajectory: the noise levels it visits, as the teacher's own scheduler sets them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppcl.calibration.trajectory_recorder import Call
from ppcl.models import ModelAdapter

# Timesteps that differ by less are the same: they are stored as float32.
SAME = 1e-6


@dataclass(frozen=True)
class Schedule:
    """The evaluations of the transformer in one trajectory, from noise to image.

    `timesteps (n,)`: of each evaluation, as shares of noise, what the transformer is given. `sigmas (n + 1,)`: the
    noise levels that the sampler moves between. Both can differ: some schedulers round timesteps to integers.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    def position(self, timesteps: np.ndarray) -> np.ndarray:
        """The evaluations at timesteps `(N,)`; for one between two evaluations the earlier, before all of them -1.

        Of the two evaluations that Heun's method makes at a timestep it is the later one, which begins a step.
        """
        return (self.timesteps[None] >= np.asarray(timesteps, dtype=np.float64)[:, None] - SAME).sum(1) - 1

    def level(self, step: int, timestep: float) -> float:
        """The noise level at a timestep whose position is `step`: the evaluation's, or the timestep between two."""
        at_evaluation = step >= 0 and abs(self.timesteps[step] - timestep) < SAME
        return float(self.sigmas[step]) if at_evaluation else timestep

    @classmethod
    def of_call(cls, call: Call, adapter: ModelAdapter) -> Schedule | None:
        """What calibration recorded; None in a calibration set that has none yet."""
        if not call.timesteps:
            return None
        return cls(np.array(call.timesteps) / adapter.timestep_scale, np.array(call.sigmas))

    @classmethod
    def of_timesteps(cls, timesteps: np.ndarray, steps: int) -> Schedule:
        """A schedule of `steps` evaluations from the timesteps of samples `(N,)`, as shares of noise.

        On trajectories these are the sampler's own timesteps.
        """
        visited = np.unique(np.quantile(timesteps, np.linspace(0, 1, steps), method="nearest"))[::-1]
        return cls(visited, np.append(visited, 0.0))
