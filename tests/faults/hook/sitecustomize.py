"""Imported by every Python that starts with this folder on its path: makes one thing go wrong, in one process, once.

`PPCL_FAULT` names it, `PPCL_FAULT_MARK` is a file that whoever lets it happen makes first. `PPCL_TALLY` is a file with
a line for every step that a replacement is trained: the process, the replacement, the step. The code under test is the
real one: what is wrapped here is called by it, and calls it.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time

FAULT, MARK, TALLY = (os.environ.get(f"PPCL_{name}") for name in ("FAULT", "FAULT_MARK", "TALLY"))


def once():
    try:
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wrap(owner, name, around):
    inner = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: around(inner, *a, **k))


def counted(module):
    def learn(inner, trainee, *a):
        made = inner(trainee, *a)
        if trainee.state.dims.dp_rank == 0:
            tally = os.open(TALLY, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(tally, f"{os.getpid()} {trainee.objective.replacement.name} {trainee.state.step - 1}\n".encode())
            os.close(tally)
        return made

    wrap(module.Trainee, "train_step", learn)


def at_step(module, step, stage, action):
    """`action(segment, captured)` when the pipeline's rank `stage` has run the segment for the `step`-th time."""
    calls = [0]

    def run(inner, segment, inputs, pipeline_stage, wanted):
        captured = inner(segment, inputs, pipeline_stage, wanted)
        if pipeline_stage.pp_rank == stage:
            calls[0] += 1
            if calls[0] == step and once():
                action(segment, captured)
        return captured

    wrap(module.TeacherSegment, "run", run)


def before_step(module, step, stage, action):
    """`action()` before the first replacement of the rank `stage` is trained this step, after the ranks before it."""

    def learn(inner, trainee, *a):
        if trainee.state.dims.pp_rank == stage and trainee.state.step == step - 1 and once():
            time.sleep(5)
            action()
        return inner(trainee, *a)

    wrap(module.Trainee, "train_step", learn)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_node(*_):
    """The raylet, whose child every worker is: Ray loses all that runs on this node."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(*_):
    raise RuntimeError("the worker fails")


def nan(_, captured):
    for streams in captured.boundaries.values():
        streams.img.mul_(float("nan"))


def in_mid_checkpoint(module, step):
    saves = [0]

    def save(inner, trainee, path):
        saves[0] += 1
        if saves[0] == step and once():
            os.replace = kill
        inner(trainee, path)

    wrap(module.Trainee, "save", save)


def in_calibration(module, action):
    calls = [0]

    def states(inner, *a, **k):
        calls[0] += 1
        if calls[0] == 2 and once():
            action()
        return inner(*a, **k)

    wrap(module, "write_states", states)


def in_probe(module, action):
    calls = [0]

    def walk(inner, segment, pipeline_stage, *rest):
        calls[0] += 1
        if pipeline_stage.pp_rank == 1 and calls[0] == 2 and once():
            action()
        yield from inner(segment, pipeline_stage, *rest)

    wrap(module, "_walk", walk)


def in_evaluation(module, action):
    def errors(inner, *a):
        if once():
            action()
        return inner(*a)

    wrap(module, "variant_errors", errors)


STEP, LAST = 30, 60
FAULTS = {
    "raises": ("ppcl.training.distillation.trainer", lambda m: at_step(m, STEP, 1, fail)),
    "first killed": ("ppcl.training.distillation.trainer", lambda m: at_step(m, STEP, 0, kill)),
    "last killed": ("ppcl.training.distillation.trainee", lambda m: before_step(m, LAST, 1, kill)),
    "last killed between": ("ppcl.training.distillation.trainer", lambda m: at_step(m, STEP, 1, kill)),
    "stopped": ("ppcl.training.distillation.trainer", lambda m: at_step(m, STEP, 0, stop)),
    "nan": ("ppcl.training.distillation.trainer", lambda m: at_step(m, STEP, 0, nan)),
    "checkpoint": ("ppcl.training.distillation.trainee", lambda m: in_mid_checkpoint(m, 4)),
    "probe": ("ppcl.detection.fit_probes", lambda m: in_probe(m, kill)),
    "calibration stopped": ("ppcl.calibration.dataset", lambda m: in_calibration(m, stop)),
    "evaluation stopped": ("ppcl.evaluation.velocity_error", lambda m: in_evaluation(m, stop)),
    "evaluation": ("ppcl.evaluation.velocity_error", lambda m: in_evaluation(m, kill)),
    "node in calibration": ("ppcl.calibration.dataset", lambda m: in_calibration(m, kill_node)),
    "node in probes": ("ppcl.detection.fit_probes", lambda m: in_probe(m, kill_node)),
    "node in students": ("ppcl.training.distillation.trainer", lambda m: at_step(m, STEP, 1, kill_node)),
    "node in evaluation": ("ppcl.evaluation.velocity_error", lambda m: in_evaluation(m, kill_node)),
}


class Finder(importlib.abc.MetaPathFinder):
    """Wraps modules right after they were loaded."""

    def __init__(self):
        self.hooks = [("ppcl.training.distillation.trainee", counted)] if TALLY else []
        if FAULT:
            self.hooks.append(FAULTS[FAULT])

    def find_spec(self, name, path, target=None):
        hooks = [hook for module, hook in self.hooks if module == name]
        if not hooks:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for hook in hooks:
                hook(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
