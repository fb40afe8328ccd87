"""TensorBoard's files as TensorBoard itself reads them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.tracking import tensorboard
from ppcl.errors import UserError


def read(folder):
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return events


def curve(events, name):
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_losses_have_the_steps_of_their_stage_and_results_their_names(job, tmp_path):
    job.run({"tensorboard": tmp_path / "tb"}, distillation={"steps": 10})
    events = read(tmp_path / "tb")
    assert curve(events, "students/loss/1-2") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve(events, "students/loss/ffn-3-50") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert curve(events, "students/mean_loss")[0] == (1, 1.5)
    names = events.Tags()["scalars"]
    assert {"seconds/students", "seconds/evaluation", "sensitivity/1-2", "variants/p90/R"} <= set(names)
    assert {
        f"variants/{v}/{m}" for v in ("teacher", "all") for m in ("velocity_error", "speed_up", "parameters")
    } <= set(names)
    assert (
        b"| distillation.steps | `10` |" in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    )
    assert events.Tensors("outcome/text_summary")[0].tensor_proto.string_val == [b"finished"]


def test_a_resumed_job_goes_on_in_its_folder(job, tmp_path):
    job.run({"tensorboard": tmp_path / "tb"}, steps=(1, 2), end="stopped")
    job.run({"tensorboard": tmp_path / "tb"}, steps=(3, 4))
    assert [step for step, _ in curve(read(tmp_path / "tb"), "students/loss/1-2")] == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_written_is_told_once_and_the_job_goes_on(job, tmp_path):
    (tmp_path / "file").write_text("no folder")
    job.run({"tensorboard": tmp_path / "file" / "tb"})
    sentence = f"tracking: TensorBoard's files in {tmp_path}/file/tb does not work"
    assert job.said.count(sentence) == 1 and job.said.count("tracking: ") == 1
    assert "Traceback" not in job.said and "the job goes on" in job.said


def test_a_missing_package_is_told_before_the_job(job, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    sentence = (
        "tracking.tensorboard needs the package tensorboardX, which is not installed; pip install 'ppcl.tracking.'"
    )
    with pytest.raises(UserError, match=sentence):
        job.run({"tensorboard": tmp_path / "tb"})
    assert not (tmp_path / "tb").exists() and not job.artifacts.path("tracking.json").exists()
