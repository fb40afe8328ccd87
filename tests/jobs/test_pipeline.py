"""What the coordinator does when a stage fails."""

import io

import pytest
from rich.console import Console

from jobs.pipeline import Job, Stage
from ppcl.config.schema import Config
from ppcl.errors import UserError


@pytest.fixture
def job(teacher_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    return Job(
        Config(teacher=teacher_folder, prompts=tmp_path / "prompts.txt", output=tmp_path / "result"),
        Console(file=io.StringIO(), width=300),
    )


def stage(failures, keeps_checkpoints=False):
    """One that leaves a file, and fails as often as there are failures."""
    left = list(failures)

    def run(folder, update, key):
        before = sorted(path.name for path in folder.iterdir())
        (folder / f"{len(left)}").write_text("made")
        if left:
            raise left.pop(0)
        return {"found": before}

    return Stage("probes", "a test", [], run, keeps_checkpoints)


@pytest.mark.parametrize(("keeps", "found"), [(False, []), (True, ["1", "2"])])
def test_a_stage_that_loses_workers_is_tried_again_from_what_it_keeps(job, keeps, found):
    job._run_stage(stage([RuntimeError("Traceback\nsomewhere\nlost a worker"), OSError("gone")], keeps))
    said = job.reporter.console.file.getvalue()
    assert (
        "probes: failed (lost a worker); trying again from what is complete, 1 of 2 times" in said
        and "failed (gone)" in said
    )
    assert job.artifacts.entry("probes").info == {"found": found}


def test_a_stage_that_goes_on_failing_ends_the_job_in_one_sentence_with_all_in_the_log(job):
    with pytest.raises(UserError, match=r"probes failed 3 times, the last time for c; log.txt in .* has all of it"):
        job._run_stage(stage(map(RuntimeError, "abcd")))
    assert job.artifacts.entry("probes") is None
    log = job.artifacts.path("log.txt").read_text()
    assert log.count("Traceback") == 3 and "RuntimeError: a" in log


@pytest.mark.parametrize("error", [UserError("the teacher is gone"), OSError(28, "No space left on device")])
def test_what_no_repetition_mends_is_told_at_once(job, error):
    with pytest.raises(type(error)):
        job._run_stage(stage([error]))
    assert "trying again" not in job.reporter.console.file.getvalue()
