"""SIGTERM ends `ppcl compress` as Ctrl-C does: with one sentence, and with every process that it started.

Here in calibration, on Ray Data; `tests/jobs/test_whole_job.py` has Ctrl-C there, and both signals on Ray Train.
"""

import signal

import pytest
import yaml

from tests.commands import stopped_cleanly


@pytest.fixture(scope="module")
def job(tmp_path_factory, teacher_folder):
    """The configuration of a job that is stopped in its calibration."""
    folder = tmp_path_factory.mktemp("stopped")
    shapes = ("circle", "square", "triangle")
    (folder / "prompts.txt").write_text("\n".join(f"a {c} {s}" for c in ("red", "green", "blue") for s in shapes))
    values = {
        "teacher": str(teacher_folder),
        "prompts": "prompts.txt",
        "output": str(folder / "result"),
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 1, "validation": 0.3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_sigterm_ends_a_job_with_one_sentence_and_leaves_no_process_and_no_lock(job):
    stopped_cleanly(job, "calibration", signal.SIGTERM)
