"""Rollouts: states of the variants' own trajectories, so that a variant learns on what it runs into itself.

A pool of trajectories runs beside the training. A step learns on some of them and moves those on by one Euler step of
the velocity that it computed anyway; one that has reached its end starts again from fresh noise, with another prompt.
So the states never run out, they hold the errors a variant makes on its way, and they cost only their memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch


class Rollouts:
    """A pool of `N` trajectories.

    `ids (N,)`: the samples whose prompts they have. `timesteps (N,)`: shares of noise in [0, 1]. `latents (N, …)`,
    float32. `grid`: the timesteps a trajectory visits, ascending. `samples`: what new trajectories take their prompts
    from.
    """

    def __init__(
        self,
        ids: Sequence[int] | np.ndarray,
        timesteps: Sequence[float] | np.ndarray,
        latents: torch.Tensor,
        grid: np.ndarray,
        samples: np.ndarray,
    ):
        self.grid, self.samples = grid, samples
        self.ids = np.array(ids, dtype=np.int64)
        self.timesteps = np.array(timesteps, dtype=np.float64)
        self.latents = latents.float().cpu().clone()

    def __len__(self) -> int:
        return len(self.ids)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Places of `count` trajectories, none twice; fewer where there are fewer."""
        return rng.choice(len(self), size=min(count, len(self)), replace=False)

    def advance(self, places: np.ndarray, velocity: torch.Tensor, rng: np.random.Generator) -> None:
        """Move trajectories on to the next timestep: `x_{t'} = x_t + (t' - t) v`, flow matching. `velocity`: `(B, …)`.

        Starts again where there is no next one or where the velocity is not finite.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for place, v in zip(places, velocity.float().cpu(), strict=True):
            later = self.grid[self.grid < self.timesteps[place] - 1e-6]
            noise = torch.randn(self.latents.shape[1:], generator=generator)
            if len(later) and torch.isfinite(v).all():
                self.latents[place] += (later[-1] - self.timesteps[place]) * v.view_as(self.latents[place])
                self.timesteps[place] = later[-1]
            else:
                self.ids[place], self.timesteps[place] = rng.choice(self.samples), self.grid[-1]
                self.latents[place] = noise

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state of all trajectories, for a checkpoint."""
        return {
            "trajectories.ids": torch.from_numpy(self.ids),
            "trajectories.timesteps": torch.from_numpy(self.timesteps),
            "trajectories.latents": self.latents,
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `tensors` gave."""
        self.ids = tensors["trajectories.ids"].numpy()
        self.timesteps = tensors["trajectories.timesteps"].numpy()
        self.latents = tensors["trajectories.latents"]


def visited_timesteps(timesteps: np.ndarray, steps: int) -> np.ndarray:
    """The timesteps of a trajectory of `steps` steps, from those of the samples, as shares of noise, ascending.

    On trajectories these are the sampler's own timesteps, elsewhere they are spread as the samples are.
    """
    return np.unique(np.quantile(timesteps, np.linspace(0, 1, steps), method="nearest"))
