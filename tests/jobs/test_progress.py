"""What a job says of its progress, as lines and as events."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from jobs.events import PRINT_EVENTS, Event, JobProgress, printed_events, progress_after, without_events
from jobs.progress import Reporter, StageProgress, duration


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A reporter that writes a line at every update and prints its events; gives it and what it printed."""
    monkeypatch.setenv(PRINT_EVENTS, "1")
    text = io.StringIO()
    return Reporter(Console(file=text, width=200), tmp_path / "log.txt", line_every=0.0), text.getvalue


def told(log):
    return progress_after(printed_events(log))


def test_what_is_said_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv(PRINT_EVENTS, "1")
    text = io.StringIO()
    # New phases alone have lines: no line comes by itself.
    reporter, said = Reporter(Console(file=text, width=200), tmp_path / "log.txt", line_every=1e9), text.getvalue
    assert told(said()) == JobProgress()
    reporter.skipped("calibration", 1, 7)
    assert told(said()) == JobProgress("calibration", 1, 7, complete=("calibration",))
    with reporter.stage("students", "2 replacements, 600 steps", 4, 7) as update:
        assert told(said()) == JobProgress("students", 4, 7, complete=("calibration",))
        update(0, 600, phase="training")
        assert told(said()) == JobProgress("students", 4, 7, "training", 0, 600, complete=("calibration",))
        update(4, 600, {"a": 0.25, "b": 0.75}, phase="measuring")
        progress = told(said())
        assert (progress.phase, progress.done, progress.total, progress.loss) == ("measuring", 4, 600, 0.5)
        reporter.say("students: 3 batches were left out")
        assert told(said()) == progress
    assert told(said()) == JobProgress("students", 4, 7, loss=0.5, complete=("calibration", "students"))
    reporter.job_done("s3://b/runs/report.html")
    assert told(said()) == JobProgress(report="s3://b/runs/report.html", complete=("calibration", "students"))


def test_the_error_a_job_ended_with_is_told_beside_where_it_stood(job):
    reporter, said = job
    with pytest.raises(OSError), reporter.stage("probes", "24 fits", 2, 7):
        raise OSError
    reporter.job_failed("the disk is full; free space")
    progress = told(said())
    assert (progress.stage, progress.index, progress.error) == ("probes", 2, "the disk is full; free space")


def test_the_events_beside_the_log_are_those_that_are_printed(job):
    reporter, said = job
    with reporter.stage("probes", "24 fits") as update:
        update(16, 24, {"loss": 0.5})
    reporter.say("good")
    lines = reporter.log.with_name("events.jsonl").read_text().splitlines()
    events = [Event.from_json(json.loads(line)) for line in lines]
    assert events == printed_events(said())
    assert events[0].kind == "stage_started" and [event.kind for event in events[-2:]] == ["stage_done", "message"]


def test_events_are_printed_only_where_the_environment_asks_for_them(tmp_path, monkeypatch):
    monkeypatch.delenv(PRINT_EVENTS, raising=False)
    text = io.StringIO()
    reporter = Reporter(Console(file=text, width=200), tmp_path / "log.txt")
    reporter.say("good")
    assert text.getvalue() == "good\n" and "good" in reporter.events.read_text()


def test_the_first_line_says_which_stage_of_how_many_it_is_and_is_no_long_list(job):
    reporter, said = job
    with reporter.stage("probes", ", ".join(map(str, range(1000))), 3, 7):
        pass
    first = without_events(said()).splitlines()[0]
    assert first.startswith("probes: 0, 1, 2") and first.endswith("… (stage 3 of 7)") and len(first) < 200


def test_a_log_goes_on_without_updates(tmp_path):
    text = io.StringIO()
    reporter = Reporter(Console(file=text, width=200), tmp_path / "log.txt", line_every=0.01)

    def wait_for(pattern, times):
        deadline = time.monotonic() + 60
        while len(re.findall(pattern, text.getvalue(), re.M)) < times:
            assert time.monotonic() < deadline, text.getvalue()
            time.sleep(0.01)

    with reporter.stage("probes", "24 fits") as update:
        wait_for(r"^probes: starting workers, \d+ s$", 3)
        update(16, 24, phase="fitting")
        wait_for(r"^probes: fitting 16 of 24$", 3)


def test_a_terminal_has_one_live_line_with_a_clock(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, legacy_windows=False)
    reporter = Reporter(console, tmp_path / "log.txt", line_every=0.01)
    with reporter.stage("probes", "24 fits", 3, 7) as update:
        update(16, 24, phase="fitting")
        deadline = time.monotonic() + 60
        while not ("fitting 16 of 24" in text.getvalue() and "0:00:01" in text.getvalue()):
            assert time.monotonic() < deadline, text.getvalue()
            time.sleep(0.05)
    assert "stage 3 of 7" in text.getvalue()
    # Lines of the log do not come between: the live line ends, and is replaced by the last word.
    assert text.getvalue().count("\n") == 2


def test_a_phase_replaces_what_the_count_means():
    progress = StageProgress("finetuning", 6, 7, 0.0)
    for step in range(30):
        progress.update(float(step), step, 100, {"loss": 1.0}, None)
    assert progress.seconds_left is not None and progress.loss == 1.0
    progress.update(30.0, 0, 62, None, "measuring plans")
    assert progress.line(31.0) == "finetuning: measuring plans 0 of 62"
    progress.update(32.0, 12, 62, None, "measuring plans")
    assert progress.line(33.0) == "finetuning: measuring plans 12 of 62, 8 s left"


def test_the_time_left_does_not_count_the_time_to_the_first_update():
    progress = StageProgress("probes", 2, 7, 0.0)
    progress.update(1000.0, 10, 40, None, None)
    assert progress.seconds_left is None
    progress.update(1002.0, 20, 40, None, None)
    assert progress.seconds_left == pytest.approx(4.0)


def test_the_time_left_follows_a_changed_pace_and_not_a_single_slow_step():
    progress = StageProgress("probes", 2, 7, 0.0)
    now = 0.0
    for done in range(100):
        progress.update(now, done, 1000, None, None)
        now += 1.0
    steady = progress.seconds_left
    progress.update(now + 20.0, 100, 1000, None, None)
    assert progress.seconds_left < 4 * steady  # this step alone would make it 21 times as much
    for done in range(101, 300):
        now += 0.1
        progress.update(now + 20.0, done, 1000, None, None)
    assert progress.seconds_left == pytest.approx(0.1 * 701, rel=0.1)


def test_the_loss_is_a_running_mean():
    progress = StageProgress("students", 4, 7, 0.0)
    for step in range(200):
        progress.update(float(step), step, 400, {"a": 2.0 * (step % 2), "b": 2.0 * (step % 2)}, None)
    assert progress.loss == pytest.approx(1.0, abs=0.1)


def test_a_duration_is_in_minutes_and_seconds():
    assert [duration(seconds) for seconds in (0.4, 59.4, 75.2)] == ["0 s", "59 s", "1 min 15 s"]


def test_a_phase_that_counts_nothing_yet_is_its_sentence_alone():
    progress = StageProgress("students", 4, 7, 0.0)
    progress.update(5.0, 0, None, None, "waiting for 4 GPUs; 8 exist, 6 are in use by tasks")
    assert progress.line(9.0) == "students: waiting for 4 GPUs; 8 exist, 6 are in use by tasks"
    progress.update(10.0, 0, 600, None, "training")
    assert progress.line(11.0) == "students: training 0 of 600"


def test_listeners_hear_every_event_with_the_last_losses_by_name(tmp_path):
    reporter = Reporter(Console(file=io.StringIO()), tmp_path / "log.txt", line_every=1e9)
    heard = []
    reporter.listeners.append(lambda event, values: heard.append((event.kind, event.done, values)))
    with reporter.stage("students", "2 replacements", 1, 1) as update:
        update(1, 9, {"a": 0.5, "b": 0.25})
        update(2, 9, {"a": 0.125})
    reporter.job_stopped()
    assert heard == [
        ("stage_started", None, {}),
        # At once, so that a stage that goes on says from where.
        ("progress", 1, {"a": 0.5, "b": 0.25}),
        ("progress", 2, {"a": 0.125, "b": 0.25}),
        ("stage_done", None, {}),
        ("job_stopped", None, {}),
    ]
