"""States of the variants' own trajectories, for learning on what a variant itself runs into.

A state is kept with the sample its prompt comes from. Each training step moves states one timestep on, by the velocity
that was computed anyway, so a trajectory costs nothing beyond its memory.
"""

from __future__ import annotations

import numpy as np
import torch


class Replay:
    """At most `capacity` states; the oldest leave first.

    `timesteps`: those of the calibration samples, as shares of noise in [0, 1]; a trajectory visits `steps` of them.
    """

    def __init__(self, capacity: int, timesteps: np.ndarray, steps: int):
        self.capacity = capacity
        # On trajectories these are the sampler's own timesteps, elsewhere they are spread as the samples are.
        self.grid = np.unique(np.quantile(timesteps, np.linspace(0, 1, steps), method="nearest"))
        self.ids: list[int] = []
        self.timesteps: list[float] = []
        self.latents: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.ids)

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Places of `count` states, none twice; fewer where there are fewer."""
        return rng.choice(len(self), size=min(count, len(self)), replace=False).tolist()

    def add(self, ids: np.ndarray, latents: torch.Tensor, timesteps: np.ndarray, velocity: torch.Tensor) -> None:
        """Move states on to the next timestep by an Euler step of `velocity`, and keep those that are not at the end.

        `latents`, `velocity`: `(B, …)`. Flow matching: `x_{t'} = x_t + (t' - t) v`.
        """
        for sample, x, t, v in zip(ids, latents, timesteps, velocity, strict=True):
            later = self.grid[self.grid < t - 1e-6]
            if len(later) and torch.isfinite(v).all():
                self.ids.append(int(sample))
                self.timesteps.append(float(later[-1]))
                self.latents.append((x.float() + (float(later[-1]) - float(t)) * v.float()).cpu())
        for kept in (self.ids, self.timesteps, self.latents):
            del kept[: max(0, len(kept) - self.capacity)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        if not self.ids:
            return {}
        return {
            "replay.ids": torch.tensor(self.ids), "replay.timesteps": torch.tensor(self.timesteps, dtype=torch.float64),
            "replay.latents": torch.stack(self.latents),
        }  # fmt: skip

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        if "replay.ids" in tensors:
            self.ids = tensors["replay.ids"].tolist()
            self.timesteps = tensors["replay.timesteps"].tolist()
            self.latents = list(tensors["replay.latents"])
