"""How a rollout moves on: by the step of the teacher's own scheduler, with a history of its own where that has one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ppcl.calibration.schedules import Schedule
from ppcl.models.schedulers import EULER, SOLVERS


class RolloutSolver(Protocol):
    """Moves trajectories on, each known by its place in the pool."""

    def start(self, place: int) -> None:
        """Forget the history of a trajectory."""
        ...

    def step(self, place: int, step: int, level: float, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """The latents at evaluation `step + 1`, from those at `step` and their velocity, all of one shape, float32.

        `level`: their noise level, that of evaluation `step` or one between it and the next.
        """
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept of all trajectories, one row each, for a checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `tensors` gave."""
        ...


def rollout_solver(scheduler: Any, schedule: Schedule, places: int, shape: torch.Size) -> RolloutSolver:
    """The solver of `places` trajectories of latents of a shape, by the scheduler that samples the teacher's images."""
    if type(scheduler).__name__ == EULER:
        return EulerSolver(schedule)
    return SchedulerSolver(scheduler, schedule, places, shape)


class EulerSolver:
    """`x_{i+1} = x_i + (σ_{i+1} - σ_i) v`: the step of `FlowMatchEulerDiscreteScheduler`, which remembers nothing."""

    def __init__(self, schedule: Schedule):
        self.sigmas = schedule.sigmas

    def start(self, place: int) -> None:
        pass

    def step(self, place: int, step: int, level: float, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        return latents + (float(self.sigmas[step + 1]) - level) * velocity

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class SchedulerSolver:
    """The stock scheduler's own step. Each trajectory has a copy of it, which is its history. All lie on its levels.

    Memory: two or three tensors of the latents' shape a trajectory, by the solver's order.
    """

    def __init__(self, scheduler: Any, schedule: Schedule, places: int, shape: torch.Size):
        self.shape, self.solver = shape, SOLVERS[type(scheduler).__name__]
        self.fresh = copy.deepcopy(scheduler)
        # This also clears the history; the levels are those of the pipeline's call, which depend on its arguments.
        shift = {"mu": 0.0} if scheduler.config.get("use_dynamic_shifting") else {}
        self.fresh.set_timesteps(len(schedule), **shift)
        self.fresh.timesteps = torch.from_numpy(schedule.timesteps * scheduler.config.num_train_timesteps).float()
        self.fresh.sigmas = torch.from_numpy(schedule.sigmas).float()
        self.fresh.num_inference_steps = len(schedule)
        self.own = [copy.deepcopy(self.fresh) for _ in range(places)]

    def start(self, place: int) -> None:
        self.own[place] = copy.deepcopy(self.fresh)

    def step(self, place: int, step: int, level: float, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        scheduler = self.own[place]
        scheduler._step_index = step
        # Some keep the sample itself, which changes in its place in the pool.
        sample = latents[None].clone()
        return scheduler.step(velocity[None], scheduler.timesteps[step], sample, return_dict=False)[0][0]

    def tensors(self) -> dict[str, torch.Tensor]:
        histories = [self._history(scheduler) for scheduler in self.own]
        zeros = torch.zeros(self.shape)
        return {
            "trajectories.histories": torch.stack(
                [torch.stack([zeros if one is None else one[0].float().cpu() for one in each]) for each in histories]
            ),
            "trajectories.counters": torch.tensor(
                [
                    [*(one is not None for one in each), *self._counters(scheduler)]
                    for each, scheduler in zip(histories, self.own, strict=True)
                ],
                dtype=torch.float64,
            ),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        histories, counters = tensors["trajectories.histories"], tensors["trajectories.counters"]
        self.own = [copy.deepcopy(self.fresh) for _ in range(len(histories))]
        for scheduler, tensor, numbers in zip(self.own, histories, counters.tolist(), strict=True):
            kept = [one[None].clone() if there else None for one, there in zip(tensor, numbers, strict=False)]
            self._set_history(scheduler, kept)
            for name, number in zip(self.solver.counters, numbers[len(kept) :], strict=True):
                whole = int(number) if number == number and number.is_integer() else number
                setattr(scheduler, name, None if number != number else whole)

    def _history(self, scheduler: Any) -> list[torch.Tensor | None]:
        """The tensors `(1, …)` that a scheduler keeps between evaluations, in a fixed order; None for absent ones."""
        kept: list[torch.Tensor | None] = []
        for name in self.solver.histories:
            value = getattr(scheduler, name, None)
            kept += value if isinstance(value, list) else [value]
        return kept

    def _set_history(self, scheduler: Any, kept: list[torch.Tensor | None]) -> None:
        position = 0
        for name in self.solver.histories:
            value = getattr(scheduler, name, None)
            if isinstance(value, list):
                setattr(scheduler, name, kept[position : position + len(value)])
                position += len(value)
            else:
                setattr(scheduler, name, kept[position])
                position += 1

    def _counters(self, scheduler: Any) -> list[float]:
        """The numbers that a scheduler keeps; NaN for None."""
        values = [getattr(scheduler, name, None) for name in self.solver.counters]
        return [float("nan") if value is None else float(value) for value in values]
