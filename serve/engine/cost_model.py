"""Cost model: device-seconds of an image, profiled at the start and corrected by every batch since.

The seconds of a forward are taken to grow linearly with its rows, between two profiled numbers of rows per variant, and
in proportion to the image's pixels. Real images deviate (attention is not linear in the pixels, other programs run), so
each size has a correction factor that follows the measured batches. Without batches the factor decays to one: otherwise
a server that was slow for a while, and refused every request for it, would never learn that it has recovered.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.engine.batch_collation import join, rows_of
from serve.engine.batcher import Ticket
from serve.engine.generation import GenerationTask, ImageGenerator
from serve.engine.shared_pipeline import Plan, SharedPipeline, WorkloadKey

# Weight of one batch in a size's factor.
_LEARNING_RATE = 0.1
# Largest ratio of measured to profiled seconds, and its inverse the smallest, that one batch can report.
_MAX_RATIO = 4.0
# Time constant of the factor's decay, in seconds.
_DECAY_S = 5.0
_PROFILE_ROUNDS = 3


@dataclass(frozen=True)
class Profile:
    """Seconds of a forward of `few` rows and of `many` rows, at the default size."""

    few: int
    few_seconds: float
    many: int
    many_seconds: float

    def seconds(self, rows: int) -> float:
        """Interpolate the seconds of a forward of `rows` rows."""
        if self.many == self.few:
            return self.few_seconds * rows / self.few
        slope = (self.many_seconds - self.few_seconds) / (self.many - self.few)
        return self.few_seconds + (rows - self.few) * max(slope, 0.0)


class CostModel:
    """`profiles` by plan. `overhead_s`: seconds of an image of `pixels`, the default size, outside its steps."""

    def __init__(
        self, profiles: dict[Plan, Profile], overhead_s: float, pixels: int, clock: Callable[[], float] = time.monotonic
    ):
        self.profiles, self.overhead_s, self.pixels, self._clock = dict(profiles), overhead_s, pixels, clock
        # By size: the factor, and when it was updated.
        self._factors: dict[int, tuple[float, float]] = {}

    def undisturbed(self, workload: WorkloadKey, rows: int) -> float:
        """Return the seconds of one forward as profiled. A plan without a profile costs as much as the slowest one."""
        profile = self.profiles.get(workload.plan) or max(self.profiles.values(), key=lambda known: known.many_seconds)
        return profile.seconds(rows) * workload.pixels / self.pixels

    def forward(self, workload: WorkloadKey, rows: int) -> float:
        """Return the seconds of one forward, corrected by recent batches."""
        return self.undisturbed(workload, rows) * self._factor(workload.pixels)

    def overhead(self, workload: WorkloadKey) -> float:
        """Return the seconds of an image's text encoding and decoding."""
        return self.overhead_s * workload.pixels / self.pixels

    def observe(self, group: tuple[WorkloadKey, Hashable], rows: int, seconds: float) -> None:
        """Update the size's factor with a measured batch. Only one thread may call this."""
        workload, _ = group
        ratio = min(max(seconds / self.undisturbed(workload, rows), 1 / _MAX_RATIO), _MAX_RATIO)
        factor = self._factor(workload.pixels)
        self._factors[workload.pixels] = factor + _LEARNING_RATE * (ratio - factor), self._clock()

    def _factor(self, pixels: int) -> float:
        factor, updated_at = self._factors.get(pixels, (1.0, 0.0))
        return 1.0 + (factor - 1.0) * math.exp((updated_at - self._clock()) / _DECAY_S)


def profile(generator: ImageGenerator, task: GenerationTask, plans: Iterable[Plan], rows: int) -> CostModel:
    """Warm up and measure every plan. `task`: an image of the default size; `rows`: of a full batch."""
    shared = generator.shared
    transformer, adapter = shared.stock.transformer, shared.adapter
    calls: list[dict[str, Any]] = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, arguments: calls.append(arguments), with_kwargs=True
    )
    try:
        generator.generate(task, Ticket())
        # Another prompt, since the embeddings of the first are cached.
        image = generator.generate(dataclasses.replace(task, prompt=f"{task.prompt} again"), Ticket())
    finally:
        hook.remove()
    few = rows_of(adapter, calls[0])
    copies = max(1, rows // few)
    plans = list(plans)
    batches = [join(adapter, [calls[0]] * count) for count in (1, copies)]
    seconds = shared.compute(_measure, shared, batches, plans)
    # The minimum, since other programs only add to it.
    profiles = {plan: Profile(few, min(seconds[plan, 0]), few * copies, min(seconds[plan, 1])) for plan in plans}
    return CostModel(profiles, image.seconds["encoding"] + image.seconds["decoding"], task.height * task.width)


def _measure(
    shared: SharedPipeline, calls: Sequence[dict[str, Any]], plans: Sequence[Plan]
) -> dict[tuple[Plan, int], list[float]]:
    """Return the seconds of each call with each plan, by plan and index of the call, for every round.

    Plans alternate, so that a drift of the machine's speed affects all alike. The first round only warms up.
    """
    seconds: dict[tuple[Plan, int], list[float]] = {}
    for round_number in range(1 + _PROFILE_ROUNDS):
        for plan in plans:
            for number, arguments in enumerate(calls):
                shared.activate(plan)
                started_at = time.perf_counter()
                output = shared.stock.transformer(**arguments)[0]
                if output.is_cuda:
                    torch.cuda.synchronize()
                if round_number:
                    seconds.setdefault((plan, number), []).append(time.perf_counter() - started_at)
    return seconds
