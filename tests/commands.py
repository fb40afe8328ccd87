"""The command line as tests run it: in this process, on the Ray of the session, or as a process that can be stopped."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import REPOSITORY

# In the environment of all processes of one command.
_MARK = "PPCL_TEST_PROCESS_TREE"

# Exit code, standard output, standard error.
Ended = tuple[int, str, str]


def in_process(*arguments: Any) -> Ended:
    """Run a command here, on the Ray of this process. What connects to another one must be a process of its own."""
    from jobs.cli.main import main

    @contextlib.contextmanager
    def connected(address: str | None, config: Any) -> Iterator[str]:
        yield "cpu"

    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        patch.setattr("jobs.runtime.cluster.connected", connected)
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def as_process(*arguments: Any, stop_at: str | None = None, by: int = signal.SIGINT) -> Ended:
    """Run a command in a process of its own. `stop_at`: send it the signal `by` when that is first printed.

    Ctrl-C goes to the whole group, as from a terminal; other signals to the command alone, as by `kill`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli.main", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    send: Callable[[int, int], None] = os.killpg if by == signal.SIGINT else os.kill
    printed = []
    for line in process.stdout:
        printed.append(line)
        if stop_at and stop_at in line:
            send(process.pid, by)
            stop_at = None
    error = process.stderr.read()
    return process.wait(timeout=120), "".join(printed), error


def stopped_cleanly(configuration: Path, stage: str, by: int) -> None:
    """Run `ppcl compress`, stop it by a signal in a stage: it says one sentence and leaves no process and no lock."""
    from ppcl.storage.manifest import Artifacts

    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_MARK, mark)
        code, said, error = as_process("compress", configuration, stop_at=f"{stage}: ", by=by)
    assert code == 128 + by, said + error
    assert error == "ppcl: stopped; the same command continues from what is complete\n"
    assert _started_with(mark) == []
    with Artifacts(Path(yaml.safe_load(configuration.read_text())["output"])).exclusive_lock():
        pass


def _started_with(mark: str) -> list[list[str]]:
    """Command lines of the processes that have the mark in their environment."""
    lines = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                lines.append(process.cmdline())
        except psutil.Error:
            continue
    return lines
