"""The stages of a job without worker processes: what workers do is done in this process, by the same functions.

For tests of what the stages make. That workers on Ray make the same is tested where their number and their loss are.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

_NO_HEARTBEAT = SimpleNamespace(start=lambda: None)


@contextlib.contextmanager
def stages_in_this_process(*names: str) -> Iterator[None]:
    """Let one worker of each kind be here, in all stages or in those that are named.

    Ray must be connected; it is asked for its nodes and for nothing else.
    """
    from jobs.stages import detection, distillation, evaluation, finetuning, probes, variants

    # Screening runs as the students do, selection as the variants.
    in_groups = {"probes": probes, "students": distillation, "finetuning": finetuning}
    in_pools = {"detection": detection, "variants": variants, "evaluation": evaluation}
    chosen = set(names) or {"calibration", *in_groups, *in_pools}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        if "calibration" in chosen:
            calibrate_in_this_process(patch)
        for name in chosen & in_groups.keys():
            patch.setattr(in_groups[name], "run_worker_group", _run_rank)
        for name in chosen & in_pools.keys():
            patch.setattr(in_pools[name], "EvaluatorPool", _EvaluatorHere)
        yield
    torch.set_num_threads(threads)


def calibrate_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Let calibration's actors run here, one batch after the other."""
    from jobs.stages import calibration

    def rows(actor: Any, work: Any, numbers: Any, heartbeat: Any) -> Iterator[dict[str, Any]]:
        made = actor(work, _NO_HEARTBEAT)
        for number in numbers:
            yield {name: values[0] for name, values in made({"number": [number]}).items()}

    patch.setattr(calibration, "_rows", rows)


def _run_rank(
    name: str, function: Callable[..., None], arguments: dict[str, Any], resources: Any, scratch: Any, progress: Any
) -> list[str]:
    """In place of `run_worker_group`: its function as the only rank; gives its notes."""
    notes: list[str] = []

    def report(done: int, total: int, values: Any, phase: str | None = None) -> None:
        progress(done, total, values, phase=phase)

    report.note = notes.append  # type: ignore[attr-defined]
    function(arguments | {"attempt": uuid.uuid4().hex}, report)
    return notes


class _EvaluatorHere:
    """In place of `EvaluatorPool`."""

    def __init__(
        self, context: Any, replacements: str | None = "students", workers_of: Any = None, draws_images: bool = False
    ):
        from jobs.runtime.evaluator_pool import _Evaluator

        self.evaluator = _Evaluator(_NO_HEARTBEAT)
        self.evaluator.load(context.for_workers(), replacements, 1, draws_images)

    def __enter__(self) -> _EvaluatorHere:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __getattr__(self, method: str) -> Any:
        """As an actor: its method's `remote` is the method."""
        return SimpleNamespace(remote=getattr(self.evaluator, method))

    def all(self, call: Callable[..., Any], items: list[Any], done: Callable[[int], None]) -> list[Any]:
        results = []
        for item in items:
            results.append(call(self, item))
            done(len(results))
        return results

    def one(self, call: Callable[..., Any]) -> Any:
        return call(self)
