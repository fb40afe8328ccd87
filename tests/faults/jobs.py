"""Whole jobs as processes that can be disturbed, and what must hold of them in the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.jobs.test_whole_job import STAGES

DEADLINE = 900  # seconds for any one job, on a busy machine
HOOK = Path(__file__).parent / "hook"
STEPS, EVERY = 60, 5  # of distillation, and between its checkpoints


def environment(fault=None, mark=None, tally=None):
    """The environment of processes that count their steps in `tally`; one makes the mark and lets the fault happen."""
    names = {"PPCL_FAULT": fault, "PPCL_FAULT_MARK": mark, "PPCL_TALLY": tally}
    hook = {"PYTHONPATH": os.pathsep.join([str(HOOK), os.environ["PYTHONPATH"]])}
    return dict(os.environ) | hook | {name: str(value) for name, value in names.items() if value is not None}


class Job:
    """`ppcl compress` as a process of its own.

    `beside`: where its configuration, its words and its tally go, by default beside `output`; jobs that continue each
    other share the tally.
    """

    def __init__(self, values, output, fault=None, mark=None, address=None, beside=None, env=None, **overrides):
        beside = beside or output
        config = Path(f"{beside}.yaml")
        config.write_text(yaml.safe_dump(values | {"output": str(output)}))
        sets = [part for key, value in overrides.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
        attached = ["--address", address] if address else []
        self.output, self.log = output, Path(f"{beside}.{time.monotonic_ns()}.said")
        self.tally = Path(f"{beside}.tally")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli.main", "compress", str(config), *sets, *attached],
                cwd=REPOSITORY,
                env=environment(fault, mark, self.tally) | (env or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self):
        return self.log.read_text()

    @property
    def error(self):
        """The sentence it ended with."""
        (sentence,) = (line for line in self.said.splitlines() if line.startswith("ppcl: "))
        return sentence

    def wait_until(self, happened):
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def until(self, words):
        """Let it run until it says so; what comes after is not needed, and killed."""
        try:
            self.wait_until(lambda: words in self.said)
        finally:
            self.kill()
        return self

    def end(self, code=0):
        try:
            assert self.process.wait(DEADLINE) == code, self.said
        finally:
            self.kill()
        return self

    def kill(self):
        """The driver, and then whatever of its Ray is left."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        gone, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)


def students(output):
    return {path.name: load_file(path) for path in sorted((Path(output) / "students").glob("*.safetensors"))}


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and a
    for name, tensors in a.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, b[name][key], rtol=0, atol=tolerance, msg=f"{name} {key}")


def before(whole, stage, where):
    """A copy of a finished job's folder in which a stage, and what follows it, have not run yet."""
    output = Path(shutil.copytree(whole, where / "result"))
    manifest = json.loads((output / "manifest.json").read_text())
    for name in STAGES[STAGES.index(stage) :]:
        if manifest["stages"].pop(name, None):
            shutil.rmtree(output / name)
    (output / "manifest.json").write_text(json.dumps(manifest))
    return output


def checkpoints(output):
    """Of the replacements that are trained: those in closed form have theirs from the beginning."""
    found = (Path(output) / "students" / "checkpoints").rglob("*.safetensors")
    return [path for path in found if not path.stem.endswith("-50")]


def steps(tally):
    """By replacement: the steps that the first process trained it, and those that the next ones did."""
    trained = defaultdict(dict)
    for line in Path(tally).read_text().splitlines():
        process, entry, step = line.split()
        trained[entry].setdefault(process, []).append(int(step))
    return {
        entry: (first, [step for again in later for step in again])
        for entry, (first, *later) in ((e, p.values()) for e, p in trained.items())
    }


def trained_no_more_than_needed(tally, started_over=(), at_any_moment=False):
    """Check that every step of every replacement was trained, and only those again that no checkpoint had.

    Gives the finished replacements. `started_over`: those without a checkpoint. `at_any_moment`: the end may have come
    between a step and its checkpoint.
    """
    finished = set()
    trained = steps(tally)
    assert trained
    for entry, (earlier, later) in trained.items():
        assert set(earlier) | set(later) == set(range(STEPS)), entry
        kept = 0 if entry in started_over else (len(earlier) - at_any_moment) // EVERY * EVERY
        assert min(later, default=STEPS) >= kept and len(later) == len(set(later)), (entry, earlier, later)
        if kept == STEPS:
            assert not later, entry
            finished.add(entry)
    return finished
