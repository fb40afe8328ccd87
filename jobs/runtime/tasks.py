"""Results of Ray tasks, with a word to the user while none of them has begun."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.runtime import usage
from jobs.runtime.resources import Resources

# Seconds between two looks at what tasks wait for.
_LOOK_EVERY = 5.0


class _Begun:
    """Whether a task has begun: Ray has no record of that which a driver could read."""

    def __init__(self) -> None:
        self.begun = False

    def set(self) -> None:
        self.begun = True

    def get(self) -> bool:
        return self.begun


_BegunActor: Any = ray.remote(num_cpus=0)(_Begun)


def task_results(
    calls: Sequence[Callable[[Any], Any]], resources: Resources, tell: Callable[[str], None]
) -> Iterator[Any]:
    """The results of tasks, in order. `calls`: each submits one, and gives it the actor whose `set` it calls first.

    `resources`: what one task needs; `tell` is called with what the tasks wait for until one has begun. Raises
    `UserError` as `resources` do.
    """
    # On this node: another's loss must not take it away while the tasks go on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    begun = _BegunActor.options(scheduling_strategy=here).remote()
    # Tasks that have a worker but have not begun yet are among all tasks; before, none is ours.
    others = usage.usage(resources.kind).by_tasks
    try:
        waits = True
        for reference in [call(begun) for call in calls]:
            while waits and not ray.wait([reference], timeout=_LOOK_EVERY)[0]:
                waits = not ray.get(begun.get.remote())
                if waits and usage.usage(resources.kind).by_tasks <= others and (sentence := resources.waits_for()):
                    tell(sentence)
            yield ray.get(reference)
    finally:
        ray.kill(begun)
