"""What a picture costs the device, in seconds: profiled at the start, corrected by every batch since.

A forward's seconds are taken to grow linearly with its rows, between the two numbers of rows that were profiled of every variant
at the default size; another size costs by its pixels. That is a little wrong for real pictures (attention is not linear in the
pixels, other programs run), so every size has a factor that follows what its batches really took. Without batches it goes back to
one: a server that was slow for a while, and refused everything for that, would never learn that it is not any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.engine.batch_collation import join, rows_of
from serve.engine.batcher import Member
from serve.engine.generation import Order, Studio
from serve.engine.shared_pipeline import Kind, Plan, SharedPipeline

# Share of a size's factor that one batch changes, the farthest it believes one, and seconds after which a third of it is left.
_LEARNT = 0.1
_FARTHEST = 4.0
_FORGOTTEN = 5.0
_ROUNDS = 3


@dataclass(frozen=True)
class Profile:
    """Seconds of a forward of `few` rows, and of `many`, at the default size."""

    few: int
    few_seconds: float
    many: int
    many_seconds: float

    def seconds(self, rows: int) -> float:
        if self.many == self.few:
            return self.few_seconds * rows / self.few
        slope = (self.many_seconds - self.few_seconds) / (self.many - self.few)
        return self.few_seconds + (rows - self.few) * max(slope, 0.0)


class Costs:
    """`profiles` by plan; `around`: seconds a picture of `pixels`, the default size, takes besides its steps."""

    def __init__(
        self, profiles: dict[Plan, Profile], around: float, pixels: int, clock: Callable[[], float] = time.monotonic
    ):
        self.profiles, self.around, self.pixels, self._clock = dict(profiles), around, pixels, clock
        # By size: the factor, and when it was learnt.
        self._factors: dict[int, tuple[float, float]] = {}

    def undisturbed(self, kind: Kind, rows: int) -> float:
        """Seconds of one forward as it was profiled. A plan that was not is taken for the slowest one that was."""
        profile = self.profiles.get(kind.plan) or max(self.profiles.values(), key=lambda known: known.many_seconds)
        return profile.seconds(rows) * kind.pixels / self.pixels

    def forward(self, kind: Kind, rows: int) -> float:
        """Seconds of one forward as they are now."""
        return self.undisturbed(kind, rows) * self._factor(kind.pixels)

    def besides(self, kind: Kind) -> float:
        """Seconds for a picture's text and its decoding."""
        return self.around * kind.pixels / self.pixels

    def observe(self, group: tuple[Kind, Hashable], rows: int, seconds: float) -> None:
        """Called by one thread alone."""
        kind, _ = group
        ratio = min(max(seconds / self.undisturbed(kind, rows), 1 / _FARTHEST), _FARTHEST)
        factor = self._factor(kind.pixels)
        self._factors[kind.pixels] = factor + _LEARNT * (ratio - factor), self._clock()

    def _factor(self, pixels: int) -> float:
        factor, learnt = self._factors.get(pixels, (1.0, 0.0))
        return 1.0 + (factor - 1.0) * math.exp((learnt - self._clock()) / _FORGOTTEN)


def profile(studio: Studio, order: Order, plans: Iterable[Plan], rows: int) -> Costs:
    """Warm every plan up and measure it. Variants take turns, so that a drift of the machine's speed falls on all alike."""
    shared = studio.shared
    transformer, adapter = shared.stock.transformer, shared.adapter
    calls: list[dict] = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, arguments: calls.append(arguments), with_kwargs=True
    )
    try:
        studio.draw(order, Member())
        # Another prompt: that of the first is remembered.
        again = studio.draw(Order(**{**vars(order), "prompt": f"{order.prompt} again"}), Member())
    finally:
        hook.remove()
    few = rows_of(adapter, calls[0])
    times = max(1, rows // few)
    plans = list(plans)
    taken = shared.arithmetic(_measured, shared, [join(adapter, [calls[0]] * copies) for copies in (1, times)], plans)
    # The least: whatever else runs only adds to it.
    profiles = {plan: Profile(few, min(taken[plan, 0]), few * times, min(taken[plan, 1])) for plan in plans}
    return Costs(profiles, again.seconds["encoding"] + again.seconds["decoding"], order.height * order.width)


def _measured(
    shared: SharedPipeline, calls: Sequence[dict[str, Any]], plans: Sequence[Plan]
) -> dict[tuple[Plan, int], list[float]]:
    """Seconds of each of the calls, by its number, with each plan on."""
    taken: dict[tuple[Plan, int], list[float]] = {}
    for turn in range(1 + _ROUNDS):
        for plan in plans:
            for number, arguments in enumerate(calls):
                shared.plug(plan)
                began = time.perf_counter()
                output = shared.stock.transformer(**arguments)[0]
                if output.is_cuda:
                    torch.cuda.synchronize()
                if turn:
                    taken.setdefault((plan, number), []).append(time.perf_counter() - began)
    return taken
