"""Which stages of a job run, what they read, and what happens when one fails."""

import io
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from jobs.pipeline import Job
from jobs.stage import Stage, stages_for
from jobs.stages.registry import STAGES
from ppcl.config.location import Location
from ppcl.config.schema import Config, Tracking
from ppcl.errors import UserError
from ppcl.storage.manifest import write_atomically
from ppcl.storage.results import STAGE_FILES


@pytest.fixture
def job(teacher_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
    return Job(
        Config(teacher=teacher_folder, prompts=tmp_path / "prompts.txt", output=tmp_path / "result"),
        Console(file=io.StringIO(), width=300),
    )


def stage(failures, resumes_from=None):
    """One that leaves a file, another in the folder that it resumes from, and fails as often as there are failures."""
    left = list(failures)

    def run(context):
        checkpoints = context.folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        before = sorted(path.name for path in context.folder.rglob("*") if path.is_file())
        (checkpoints / f"checkpoint {len(left)}").write_text("made")
        (context.folder / f"result {len(left)}").write_text("made")
        if left:
            raise left.pop(0)
        return {"found": before}

    return Stage("probes", run, lambda context: "a test", resumes_from=resumes_from)


@pytest.mark.parametrize(("resumes_from", "found"), [(None, []), ("checkpoints", ["checkpoint 1", "checkpoint 2"])])
def test_a_stage_that_loses_workers_is_tried_again_from_its_checkpoints_alone(job, resumes_from, found):
    job.run_stage(stage([RuntimeError("lost a worker\nand more of it"), OSError("gone")], resumes_from), "cpu")
    said = job.reporter.console.file.getvalue()
    assert re.search(
        r"probes: failed \(RuntimeError: lost a worker \(jobs/pipeline.py, line \d+\)\); "
        r"trying again from what is complete, 1 of 2 times",
        said,
    )
    assert "failed (OSError: gone (" in said
    assert job.artifacts.record("probes").info == {"found": found}
    assert list(job.artifacts.record("probes").files) == ["probes/result 0"]


def test_a_stage_that_goes_on_failing_ends_the_job_in_one_sentence_with_all_in_the_log(job):
    sentence = r"probes failed 3 times, the last time for RuntimeError: c \(.*\); log.txt in .* has all of it"
    with pytest.raises(UserError, match=sentence):
        job.run_stage(stage(map(RuntimeError, "abcd")), "cpu")
    assert job.artifacts.record("probes") is None
    log = job.artifacts.path("log.txt").read_text()
    assert log.count("Traceback") == 3 and "RuntimeError: a" in log


@pytest.mark.parametrize("error", [UserError("the teacher is gone"), OSError(28, "No space left on device")])
def test_what_no_repetition_mends_is_told_at_once(job, error):
    with pytest.raises(type(error)):
        job.run_stage(stage([error]), "cpu")
    assert "trying again" not in job.reporter.console.file.getvalue()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            KeyError(7),
            r"probes failed for KeyError: 7 \(.*\); trying again would not help: this is a bug of ppcl, or of",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            r"would not help: use smaller batches, more workers, or devices",
        ),
        (RuntimeError("No module named 'jobs.stages'"), "another module 'jobs' before ppcl's own"),
    ],
)
def test_what_would_fail_again_after_as_much_work_is_not_tried_again(job, error, sentence):
    with pytest.raises(UserError, match=sentence):
        job.run_stage(stage([error]), "cpu")
    assert "trying again from" not in job.reporter.console.file.getvalue()
    assert "Traceback" in job.artifacts.path("log.txt").read_text()


class Chain:
    """Two stages, of which the second copies what it reads; `content` is what the first one writes."""

    def __init__(self):
        self.content, self.runs = "1", []
        self.first = Stage("probes", self._run_first, lambda context: "writes", sections=("probes",))
        self.second = Stage("detection", self._run_second, lambda context: "copies", depends_on=("probes",))

    def _run_first(self, context):
        self.runs.append("probes")
        (context.folder / "a.txt").write_text(self.content)
        return {}

    def _run_second(self, context):
        self.runs.append("detection")
        (context.folder / "copy.txt").write_text("".join(p.read_text() for p in context.inputs["probes"].paths()))
        return {}

    def run(self, job):
        """Gives the stages that were run, and what the second one has."""
        self.runs.clear()
        for stage in (self.first, self.second):
            job.run_stage(stage, "cpu")
        return list(self.runs), job.artifacts.path("detection", "copy.txt").read_text()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("damage")])
def test_a_stage_is_made_again_where_what_it_reads_was_made_again_and_differs(job, damage):
    chain = Chain()
    assert chain.run(job) == (["probes", "detection"], "1")
    assert chain.run(job) == ([], "1")
    damage(job.artifacts.path("probes", "a.txt"))
    chain.content = "2"
    assert chain.run(job) == (["probes", "detection"], "2")


def test_a_stage_made_again_with_the_same_bytes_leaves_later_ones_skipped(job):
    chain = Chain()
    chain.run(job)
    job.artifacts.path("probes", "a.txt").unlink()
    assert chain.run(job) == (["probes"], "1")


def test_a_file_that_a_later_stage_does_not_read_does_not_change_its_key(job):
    chain = Chain()
    chain.second = replace(chain.second, reads={"probes": "*.txt"})
    chain.run(job)
    (job.artifacts.path("probes") / "times.json").write_text("1.5")
    job.artifacts.commit("probes", job.artifacts.record("probes").key)
    assert chain.run(job) == ([], "1")


def test_the_same_teacher_in_another_place_goes_on_with_the_result_and_another_in_its_place_does_not(
    job, teacher_folder, tmp_path
):
    chain = Chain()
    chain.run(job)
    copied = shutil.copytree(teacher_folder, tmp_path / "elsewhere")
    moved = Job(job.config.model_copy(update={"teacher": Location(str(copied))}), job.reporter.console)
    assert chain.run(moved) == ([], "1")
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="holds another job, of another teacher than this one's"):
        Job(moved.config, job.reporter.console)


def test_what_a_killed_writer_left_half_written_is_no_part_of_a_stage_and_is_removed(job):
    def run(context):
        (context.folder / "x.0123.partial").write_text("half")
        return {"found": [path.name for path in (context.folder / "checkpoints").iterdir()]}

    left = job.artifacts.path("probes", "checkpoints", "y.4567.partial")
    left.parent.mkdir(parents=True)
    left.write_text("half")
    job.run_stage(Stage("probes", run, lambda context: "a test", resumes_from="checkpoints"), "cpu")
    assert job.artifacts.record("probes").info == {"found": []} and not job.artifacts.record("probes").files


def test_a_stage_reads_what_the_manifest_names_and_not_what_else_lies_in_a_folder(job):
    chain = Chain()
    chain.run(job)
    job.artifacts.path("probes", "b.txt").write_text("a stranger's")
    job.artifacts.drop_record("detection")
    assert chain.run(job) == (["detection"], "1")


def test_files_of_an_earlier_run_are_gone_where_a_stage_is_made_again(job):
    chain = Chain()
    chain.run(job)
    job.artifacts.path("probes", "b.txt").write_text("of an earlier plan")
    job.artifacts.commit("probes", "another key")
    assert chain.run(job) == (["probes"], "1")
    assert list(job.artifacts.record("probes").files) == ["probes/a.txt"]


def test_a_key_changes_with_the_fields_that_matter_and_not_with_those_marked_operational(job):
    chain = Chain()
    chain.run(job)
    change = lambda **values: job.config.model_copy(update={"probes": job.config.probes.model_copy(update=values)})  # noqa: E731
    job.config = change(workers=3)
    assert chain.run(job)[0] == []
    job.config = job.config.model_copy(update={"tracking": Tracking(tensorboard="elsewhere")})
    assert chain.run(job)[0] == []
    job.config = change(ridge=0.5)
    assert chain.run(job)[0] == ["probes"]


def test_another_format_of_a_stage_makes_it_again_and_says_so(job):
    chain = Chain()
    chain.run(job)
    chain.first = replace(chain.first, format=2)
    assert chain.run(job)[0] == ["probes"]
    said = job.reporter.console.file.getvalue()
    assert (
        "probes: another version of ppcl wrote it, in format 1, and this one writes format 2; making it again" in said
    )


def test_what_the_version_before_wrote_is_made_again_and_that_is_said(job):
    chain = Chain()
    chain.run(job)
    manifest = job.artifacts.manifest()
    del manifest["stages"]["probes"]["format"]
    write_atomically(job.artifacts.path("manifest.json"), json.dumps(manifest))
    assert chain.run(job)[0] == ["probes"]
    assert "another version of ppcl wrote it, in format 0" in job.reporter.console.file.getvalue()


def test_the_list_of_stages_has_dependencies_first_and_every_summary_that_the_report_reads():
    names = [stage.name for stage in STAGES]
    for number, stage in enumerate(STAGES):
        assert set(stage.depends_on) <= set(names[:number]), stage.name
    assert set(STAGE_FILES) < set(names)
    for stage in STAGES:
        assert all(section in Config.model_fields for section in stage.sections)


def test_an_ablation_stands_in_place_of_everything_after_detection():
    names = lambda target: [stage.name for stage in stages_for(target, STAGES)]  # noqa: E731
    assert names("ablation") == ["calibration", "probes", "detection", "ablation"]
    assert names("evaluation") == [
        "calibration",
        "probes",
        "detection",
        "screening",
        "selection",
        "students",
        "variants",
        "finetuning",
        "evaluation",
    ]


def test_an_error_that_ends_a_job_is_its_last_event(job):
    with pytest.raises(UserError), job._last_event():
        raise UserError("the disk is full; free space")
    last = json.loads(job.artifacts.path("events.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["message"]) == ("job_failed", "the disk is full; free space")


def test_a_job_that_is_stopped_has_not_failed(job):
    with pytest.raises(KeyboardInterrupt), job._last_event():
        raise KeyboardInterrupt
    (last,) = map(json.loads, job.artifacts.path("events.jsonl").read_text().splitlines())
    assert last["kind"] == "job_stopped"


@pytest.fixture
def own_teacher(teacher_folder, tmp_path):
    """A copy of the teacher that a test may change."""
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def job_of(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
    config = Config(teacher=teacher, prompts=tmp_path / "prompts.txt", output=tmp_path / "result")
    return Job(config, Console(file=io.StringIO(), width=300))


def during(change, failure=None):
    """A stage that leaves a checkpoint and a result, during which something is changed."""

    def run(context):
        for name in ("checkpoints/half", "result"):
            write_atomically(context.folder / name, "made")
        write_atomically(context.folder.parent / "cache" / "states", "made")
        change()
        if failure:
            raise failure
        return {}

    return Stage("probes", run, lambda context: "a test", resumes_from="checkpoints")


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


@pytest.mark.parametrize("name", [WEIGHTS, ENCODER])
@pytest.mark.parametrize("failure", [None, UserError("a student does not fit")])
def test_a_teacher_that_is_replaced_during_a_stage_ends_the_job_and_nothing_of_the_stage_stays(
    own_teacher, tmp_path, name, failure
):
    job, path = job_of(own_teacher, tmp_path), own_teacher / name
    before, status = path.read_bytes(), path.stat()

    def change():
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(UserError, match=f"{own_teacher}/{name} was replaced during the job; .* put that one back"):
        job.run_stage(during(change, failure), "cpu")
    assert job.artifacts.record("probes") is None
    assert not job.artifacts.path("probes").exists() and not job.artifacts.path("cache").exists()
    path.write_bytes(before)
    job.run_stage(during(lambda: None), "cpu")
    assert job.artifacts.record("probes")


def test_a_teacher_that_is_replaced_between_two_stages_ends_the_job_before_the_second(own_teacher, tmp_path):
    job, ran = job_of(own_teacher, tmp_path), []
    job.run_stage(during(lambda: None), "cpu")
    (own_teacher / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS} was replaced during the job"):
        job.run_stage(replace(during(lambda: ran.append(1)), name="detection"), "cpu")
    assert not ran and job.artifacts.record("probes")


def test_a_teacher_whose_files_were_copied_over_with_the_same_content_is_the_same(own_teacher, tmp_path):
    job, path = job_of(own_teacher, tmp_path), own_teacher / WEIGHTS
    job.run_stage(during(lambda: path.write_bytes(path.read_bytes())), "cpu")
    assert job.artifacts.record("probes")


def test_a_teacher_in_a_bucket_that_is_replaced_during_a_stage_ends_the_job(store, teacher_folder, tmp_path):
    for path in sorted(path for path in teacher_folder.rglob("*") if path.is_file()):
        store.upload(path, str(path.relative_to(teacher_folder)))
    job = job_of(store.url, tmp_path)
    job.run_stage(during(lambda: None), "cpu")
    change = during(lambda: store.write(WEIGHTS, store.read(WEIGHTS) + b"\0"))
    with pytest.raises(UserError, match=f"{store.url}/{WEIGHTS} was replaced during the job"):
        job.run_stage(replace(change, name="detection"), "cpu")
    assert job.artifacts.record("detection") is None and job.artifacts.record("probes")
