"""What makes a stage complete, and what takes that back."""

import json

import pytest

from ppcl.errors import UserError
from ppcl.storage.manifest import Artifacts, key_of, write_atomically

JOB = {"teacher": "/t", "teacher_sha256": "1"}


@pytest.fixture
def artifacts(tmp_path):
    made = Artifacts(tmp_path / "job")
    made.start(JOB)
    write_atomically(made.path("probes", "a.json"), "12345")
    write_atomically(made.path("probes", "checkpoints", "b"), "not kept")
    made.commit("probes", "key", 1.25, {"blocks": 3})
    return made


def test_a_stage_is_skipped_while_key_and_files_are_the_same(artifacts):
    said = []
    assert artifacts.is_complete("probes", "key", 1, said.append) and not said
    assert not artifacts.is_complete("students", "key", 1, said.append) and not said
    assert not artifacts.is_complete("probes", "other", 1, said.append)
    assert said == ["probes: what it depends on has changed; making it again"]
    assert list(artifacts.record("probes").files) == ["probes/a.json"] and artifacts.record("probes").info == {
        "blocks": 3
    }


@pytest.mark.parametrize(
    "change", [lambda p: p.write_text("12346"), lambda p: p.write_text("1234"), lambda p: p.unlink()]
)
def test_a_file_that_changed_by_a_bit_a_byte_or_altogether_is_found(artifacts, change):
    change(artifacts.path("probes", "a.json"))
    said = []
    assert not artifacts.is_complete("probes", "key", 1, said.append)
    assert said == [
        "probes: probes/a.json is damaged or missing (its sha256 differs from the manifest's); making it again"
    ]


def test_forgetting_the_entry_keeps_the_files_and_forgetting_the_stage_does_not(artifacts):
    artifacts.drop_record("probes")
    assert artifacts.record("probes") is None and artifacts.path("probes", "a.json").exists()
    artifacts.invalidate("probes")
    assert not artifacts.path("probes").exists()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="x could not be written .No space left on device."):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_write_that_is_stopped_leaves_the_old_file_whole_and_can_be_repeated(tmp_path, monkeypatch, moment):
    path = tmp_path / "x"
    write_atomically(path, "old")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moment, stopped)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_another_kind_is_refused_and_left_alone(tmp_path, artifacts):
    artifacts.start(JOB)  # the same job goes on
    sentence = "holds another job, of another teacher than this one's .teacher_sha256 is '1' there and '2' here"
    with pytest.raises(UserError, match=sentence):
        artifacts.start(JOB | {"teacher_sha256": "2"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and is not a ppcl job"):
        Artifacts(tmp_path / "mine").start(JOB)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_teacher_that_was_moved_is_the_same_job_and_its_new_place_is_noted(artifacts):
    moved = JOB | {"teacher": "s3://models/t"}
    artifacts.start(moved)
    assert artifacts.job() == JOB  # whoever only looks changes nothing
    artifacts.update_job(moved)
    assert artifacts.job() == moved


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"format": 7}', "has format 7"), (None, "is not a ppcl result")],
)
def test_a_manifest_that_cannot_be_read(artifacts, content, sentence):
    path = artifacts.path("manifest.json")
    path.write_text(content) if content else path.unlink()
    with pytest.raises(UserError, match=sentence):
        artifacts.manifest()


def test_keys_depend_on_every_part_and_not_on_the_order_of_a_mapping():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", json.loads('{"y": 2, "x": 1}'))
    assert len({key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of("a", "1")}) == 4
