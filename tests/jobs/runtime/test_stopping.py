"""SIGTERM ends `ppcl compress` as Ctrl-C does: with one sentence, and with every process that it started."""

import signal
import uuid

import psutil
import pytest
import yaml

from ppcl.storage.manifest import Artifacts
from tests.commands import as_process

_MARK = "PPCL_TEST_PROCESS_TREE"


@pytest.fixture(scope="module")
def job(tmp_path_factory, teacher_folder):
    """The configuration of a job that is stopped in its calibration, then in its distillation."""
    folder = tmp_path_factory.mktemp("stopped")
    shapes = ("circle", "square", "triangle")
    (folder / "prompts.txt").write_text("\n".join(f"a {c} {s}" for c in ("red", "green", "blue") for s in shapes))
    values = {
        "teacher": str(teacher_folder),
        "prompts": "prompts.txt",
        "output": str(folder / "result"),
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 1, "held_out": 0.3},
        "width": {"ffn_keep_percents": [], "text": False, "low_rank_modulations": False},
        "distillation": {"steps": 1000, "batch_size": 4, "warmup": 2, "pipeline_parallel": 2},
        "variants": {"budgets": [0.9]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


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


@pytest.mark.parametrize("stage", ["calibration", "students"])
def test_sigterm_ends_a_job_with_one_sentence_and_leaves_no_process_and_no_lock(job, stage, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(_MARK, mark)
    code, said, error = as_process("compress", job, stop_at=f"{stage}: ", by=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said + error
    assert error == "ppcl: stopped; the same command continues from what is complete\n"
    assert _started_with(mark) == []
    with Artifacts(job.parent / "result").exclusive_lock():
        pass
