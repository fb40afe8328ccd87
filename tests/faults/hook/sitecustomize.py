"""Imported by every Python that starts with this folder on its path: makes one thing go wrong, in one process, once.

`PPCL_FAULT` names it, `PPCL_FAULT_MARK` is a file that whoever lets it happen makes first. The code under test is the real one:
what is wrapped here is called by it, and calls it.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys

FAULT, MARK = os.environ.get("PPCL_FAULT"), os.environ.get("PPCL_FAULT_MARK")


def once():
    try:
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def wrap(owner, name, around):
    inner = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: around(inner, *a, **k))


def at_step(module, step, stage, action):
    """`action(segment, seen)` when the pipeline's rank `stage` has run the segment for the `step`-th time."""
    calls = [0]

    def run(inner, segment, inputs, chain, wanted):
        seen = inner(segment, inputs, chain, wanted)
        if chain.stage == stage:
            calls[0] += 1
            if calls[0] == step and once():
                action(segment, seen)
        return seen

    wrap(module.Segment, "run", run)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(*_):
    raise RuntimeError("the worker fails")


def nan(_, seen):
    for streams in seen.boundaries.values():
        streams.img.mul_(float("nan"))


def in_mid_checkpoint(module, step):
    saves = [0]

    def save(inner, pupil, path):
        saves[0] += 1
        if saves[0] == step and once():
            module.os.replace = kill
        inner(pupil, path)

    wrap(module.Pupil, "save", save)


def in_probe(module):
    calls = [0]

    def walk(inner, segment, chain, *rest):
        calls[0] += 1
        if chain.stage == 1 and calls[0] == 2 and once():
            kill()
        yield from inner(segment, chain, *rest)

    wrap(module, "_walk", walk)


def in_evaluation(module):
    def errors(inner, *a):
        if once():
            kill()
        return inner(*a)

    wrap(module, "variant_errors", errors)


STEP = 30
FAULTS = {
    "raises": ("ppcl.distillation.run", lambda m: at_step(m, STEP, 1, fail)),
    "first killed": ("ppcl.distillation.run", lambda m: at_step(m, STEP, 0, kill)),
    "last killed": ("ppcl.distillation.run", lambda m: at_step(m, STEP, 1, kill)),
    "stopped": ("ppcl.distillation.run", lambda m: at_step(m, STEP, 0, stop)),
    "nan": ("ppcl.distillation.run", lambda m: at_step(m, STEP, 0, nan)),
    "checkpoint": ("ppcl.distillation.pupil", lambda m: in_mid_checkpoint(m, 4)),
    "probe": ("ppcl.probes.run", in_probe),
    "evaluation": ("ppcl.evaluation.velocity", in_evaluation),
}


class Finder(importlib.abc.MetaPathFinder):
    """Wraps a module right after it was loaded."""

    def find_spec(self, name, path, target=None):
        if FAULT not in FAULTS or name != FAULTS[FAULT][0]:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = spec.loader
        load = loader.exec_module

        def exec_module(module):
            load(module)
            FAULTS[FAULT][1](module)

        loader.exec_module = exec_module
        return spec


if FAULT:
    sys.meta_path.insert(0, Finder())
