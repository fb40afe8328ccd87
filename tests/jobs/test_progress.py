"""What a job says of its progress, and what is read back from it."""

import io

import pytest
from rich.console import Console

from jobs import progress
from jobs.progress import Reporter, Told, told_by


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A reporter that writes a line at every update, on a clock that goes a second a look; gives it and what it said."""
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    seconds = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    text = io.StringIO()
    return Reporter(Console(file=text, width=200), tmp_path / "log.txt"), text.getvalue


def test_what_is_said_can_be_read_back(job):
    reporter, said = job
    assert told_by(said()) == Told()
    reporter.say("calibration: complete, skipped")
    assert told_by(said()) == Told("calibration", complete=("calibration",))
    with reporter.stage("students", "2 replacements, 600 steps") as update:
        assert told_by(said()) == Told("students", complete=("calibration",))
        update(0, 600)
        assert told_by(said()) == Told("students", 0, 600, complete=("calibration",))
        update(4, 600, {"a": 0.25, "b": 0.75})
        told = told_by(said())
        assert (told.done, told.total, told.loss) == (4, 600, 0.5) and told.seconds_left > 60
        reporter.say("students: 3 batches were left out")
        assert told_by(said()) == told
    assert told_by(said()) == Told("students", complete=("calibration", "students"), loss=0.5)
    reporter.say("report: s3://b/runs/report.html")
    assert told_by(said()) == Told(report="s3://b/runs/report.html", complete=("calibration", "students"))


def test_the_error_a_job_ended_with_is_told_beside_where_it_stood():
    log = "probes: 16 of 24, 3 s left\nTraceback: noise\nppcl: the disk is full; free space\n"
    assert told_by(log) == Told("probes", 16, 24, 3.0, error="the disk is full; free space")
