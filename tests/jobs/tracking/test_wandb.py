"""Weights & Biases offline: what its files say, and what is told before an online job."""

import json
import struct

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from jobs.tracking.tracker import Run
from jobs.tracking.wandb import WandbTracker
from ppcl.config.schema import WandbTracking
from ppcl.errors import UserError


def records(path):
    """What `wandb sync` would send: a log of LevelDB's format behind seven bytes, in blocks of 32 KiB."""
    data, place, content, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if left < 7 or kind == 0:
            place += left
            continue
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(content))
            content = b""
    return found


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_job_is_one_run_with_steps_a_stage_and_a_summary(job):
    job.run({"wandb": {"mode": "offline", "project": "shapes"}}, end="failed")
    (path,) = job.artifacts.root.glob("wandb/offline-run-*/*.wandb")
    found = records(path)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"][:1]
    run_id = json.loads(job.artifacts.path("tracking.json").read_text())["id"]
    assert (run.project, run.run_id, run.display_name) == ("shapes", run_id, "result")
    history = [values(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    told = [row for row in history if "students/loss/1-2" in row]
    assert [(row["students/step"], row["students/loss/1-2"]) for row in told] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    summary = {}
    for record in found:
        summary |= values(record.summary.update)
    assert summary["seconds/students"] == job.artifacts.record("students").seconds and "variants/p90/R" in summary
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [1]


def test_the_files_are_complete_when_a_run_has_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setattr("jobs.tracking.wandb._INIT", 300.0)
    monkeypatch.setattr("jobs.tracking.wandb._FINISH", 300.0)
    # One after the other in a process, as a job that is continued.
    for number in range(3):
        tracker = WandbTracker(WandbTracking(mode="offline"))
        folder = tmp_path / str(number)
        folder.mkdir()
        tracker.start(Run(f"run{number}", "name", {}, folder))
        tracker.log_metrics({"students/loss/1-2": 0.5}, 0.0, 1)
        tracker.log_metrics({"seconds/students": 1.5}, 0.0)
        tracker.finish("finished")
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        found = records(path)
        assert {"seconds/students": 1.5} in [values(record.summary.update) for record in found]
        assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [0]


def test_an_online_run_without_a_key_is_told_before_the_job(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="there is no key for it; set WANDB_API_KEY, run wandb login, or set"):
        WandbTracker(WandbTracking())
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    WandbTracker(WandbTracking())
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(UserError, match="there is no key"):
        WandbTracker(WandbTracking())
