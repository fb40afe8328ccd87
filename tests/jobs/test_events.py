"""Events of a job: what they say as JSON, what is read back from a driver's log, and what people see of it."""

import pytest

from jobs.events import (
    Event,
    EventFilter,
    JobProgress,
    event_line,
    printed_events,
    progress_after,
    without_events,
)

WHEN = "2026-01-01T00:00:00.000+00:00"
PROGRESS = Event("progress", WHEN, "probes", 2, 7, "fitting", 16, 24, 3.0, 0.25)


def test_an_event_is_the_same_after_json():
    assert Event.from_json(PROGRESS.to_json()) == PROGRESS
    assert set(Event("job_done", WHEN, message="report.html").to_json()) == {"kind", "time", "message"}


def test_a_loss_that_is_no_number_is_left_out():
    event = Event("progress", WHEN, "probes", loss=float("nan"))
    assert "loss" not in event.to_json()


def test_fields_of_a_later_version_are_left_out():
    assert Event.from_json(PROGRESS.to_json() | {"colour": "red"}) == PROGRESS


@pytest.mark.parametrize("values", [{"kind": "colour", "time": WHEN}, {"kind": "progress"}, [], "progress"])
def test_what_is_no_event_is_refused(values):
    with pytest.raises(ValueError, match="no event"):
        Event.from_json(values)


def test_events_are_read_from_a_log_between_other_lines():
    log = f"hello\n{event_line(PROGRESS)}\nppcl-event {{\nppcl-event []\nppcl-event\n{event_line(PROGRESS)[:-5]}"
    assert printed_events(log) == [PROGRESS]


def test_people_see_a_log_without_its_events():
    log = f"hello\n{event_line(PROGRESS)}\n\ngood"
    assert without_events(log) == "hello\n\ngood"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_followed_log_has_no_events_however_it_comes_in_pieces(size):
    log = f"hello\n{event_line(PROGRESS)}\n{event_line(PROGRESS)}\n\nlast"
    readable = EventFilter()
    pieces = [readable(log[start : start + size]) for start in range(0, len(log), size)]
    assert "".join(pieces) == "hello\n\n"
    assert readable.rest() == "last"


def test_progress_follows_the_events_of_a_job():
    events = [Event("stage_skipped", WHEN, "calibration", 1, 7), Event("stage_started", WHEN, "probes", 2, 7)]
    assert progress_after(events) == JobProgress("probes", 2, 7, complete=("calibration",))
    events += [PROGRESS, Event("message", WHEN, message="probes: 3 batches were left out")]
    assert progress_after(events) == JobProgress("probes", 2, 7, "fitting", 16, 24, 3.0, 0.25, ("calibration",))
    failed = progress_after([*events, Event("job_failed", WHEN, message="the disk is full")])
    assert (failed.stage, failed.done, failed.error) == ("probes", 16, "the disk is full")
    events += [Event("stage_done", WHEN, "probes", 2, 7, loss=0.5)]
    assert progress_after(events) == JobProgress("probes", 2, 7, loss=0.5, complete=("calibration", "probes"))
    events += [Event("job_done", WHEN, message="s3://b/report.html")]
    assert progress_after(events) == JobProgress(complete=("calibration", "probes"), report="s3://b/report.html")
