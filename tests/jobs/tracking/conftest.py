"""A finished job whose events are told once more, to the trackers of a test."""

import io

import pytest
from rich.console import Console

from jobs.progress import Reporter
from jobs.tracking.listener import tracked, trackers_of
from ppcl.config.schema import Config
from ppcl.storage.manifest import Artifacts
from tests.ppcl.report import made


class Tracked:
    """A job's folder with its report; `said` is what its console has."""

    def __init__(self, root):
        self.artifacts = Artifacts(made.job(root))
        self.artifacts.path("report.html").write_text("<html>the report</html>")
        self.console = Console(file=io.StringIO(), width=1000)

    @property
    def said(self):
        return self.console.file.getvalue()

    def run(self, tracking, steps=(1, 2, 3), end="done", **settings):
        """Tell of two stages, the first with losses at `steps`, and of the end."""
        config = Config(teacher="t", prompts="p.txt", output=self.artifacts.root, tracking=tracking, **settings)
        reporter = Reporter(self.console, self.artifacts.path("log.txt"), line_every=0.0)
        with tracked(trackers_of(config), config, self.artifacts, reporter):
            with reporter.stage("students", "2 replacements", 1, 2) as update:
                for step in steps:
                    update(step, 10, {"1-2": 1 / step, "ffn:3/50": 2.0})
            reporter.skipped("variants", 2, 3)
            reporter.skipped("evaluation", 3, 3)
            if end == "done":
                reporter.job_done("report.html")
            elif end == "failed":
                reporter.job_failed("the disk is full")
            elif end == "stopped":
                reporter.job_stopped()


@pytest.fixture
def job(tmp_path, monkeypatch):
    # A busy machine may start a tracker's own process slowly; what a job would not wait for, a test does.
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setattr("jobs.tracking.sender._END", 300.0)
    monkeypatch.setattr("jobs.tracking.wandb._INIT", 300.0)
    monkeypatch.setattr("jobs.tracking.wandb._FINISH", 300.0)
    return Tracked(tmp_path / "result")
