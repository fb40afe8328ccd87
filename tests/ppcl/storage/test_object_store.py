"""What lies in a bucket, on a real S3 server: read by range, written whole, tried again, told in one sentence."""

import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.storage import object_store as storage
from ppcl.storage.checkpoint_sync import synced_checkpoints
from ppcl.storage.lease import LOCK, hold_lease
from ppcl.storage.manifest import Artifacts, fetch_stage
from ppcl.storage.mirror import download, local_file, store_of, to_local, upload, upload_on_exit
from ppcl.storage.node_cache import mirror
from ppcl.storage.object_store import Store
from ppcl.storage.tensor_files import is_whole, save_tensors
from tests.bucket import error, slow


@pytest.fixture
def store(s3):
    storage._files.cache_clear()
    return Store(s3.bucket)


def upload_all(folder, store):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, str(path.relative_to(folder)))


def test_a_mirrors_path_says_where_it_comes_from_on_whatever_node(monkeypatch, tmp_path):
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "one"))
    path = mirror("s3://b/runs/qwen") / "students" / "0.safetensors"
    assert store_of(path).url == "s3://b/runs/qwen/students/0.safetensors" and store_of(tmp_path) is None
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "two"))
    assert to_local(path) == mirror("s3://b/runs/qwen") / "students" / "0.safetensors" != path


def test_objects_are_listed_read_by_range_and_removed(store, tmp_path):
    store.write("a/b", b"0123456789")
    store.write("ab", b"x")
    store.upload(_file(tmp_path / "f", b"y" * 3000), "a/c")
    assert {name: o.size for name, o in store.objects().items()} == {"a/b": 10, "a/c": 3000, "ab": 1}
    assert set(Store(f"{store.url}/a").objects()) == {"b", "c"}
    assert store.read("a/b") == b"0123456789" and store.read("a/b", 2, 5) == b"234"
    store.remove("a")
    assert set(store.objects()) == {"ab"}
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def _file(path, content):
    path.write_bytes(content)
    return path


def test_the_same_content_is_uploaded_once(store, s3, tmp_path):
    path = _file(tmp_path / "f", b"1")
    for content, puts in ((b"1", 1), (b"1", 1), (b"2", 2)):
        path.write_bytes(content)
        store.upload(path, "f")
        assert sum(r.method == "PUT" for r in s3.requests) == puts


def test_a_damaged_object_is_not_taken(store, s3, tmp_path):
    store.write("f", b"right")
    # Another content under the same metadata: what a store that loses bits gives.
    with s3.failing(lambda request: (200, b"wrong"), lambda r: r.method == "GET"):
        assert not store.download("f", tmp_path / "f")
    assert not (tmp_path / "f").exists() and not list(tmp_path.glob("*.partial"))
    assert store.download("f", tmp_path / "f") and (tmp_path / "f").read_bytes() == b"right"


@pytest.mark.parametrize("fault", [error(500, "InternalError"), error(503, "SlowDown")], ids=["500", "503"])
def test_a_store_that_fails_for_a_moment_is_tried_again(store, s3, fault, tmp_path):
    with s3.failing(fault, times=2):
        store.write("f", b"1")
    with s3.failing(fault, times=2):
        assert store.read("f") == b"1"
    with s3.failing(fault, lambda r: r.method == "PUT", times=2):
        store.upload(_file(tmp_path / "f", b"2"), "f")
    with s3.failing(fault, lambda r: r.method == "GET", times=2):
        assert store.download("f", tmp_path / "g")


def test_a_store_that_goes_on_failing_is_told_in_one_sentence(store, s3):
    with (
        s3.failing(error(503, "SlowDown")),
        pytest.raises(UserError, match=r"it answers 503.*; tried 3 times\); what is complete is kept"),
    ):
        store.read("f")
    assert len(s3.requests) == 3


def test_a_slow_store_is_given_up_after_a_while_and_a_lame_one_is_waited_for(store, s3, monkeypatch):
    store.write("f", b"1")
    with s3.failing(slow(0.5)):
        assert store.read("f") == b"1"
    monkeypatch.setattr(storage, "_READ_SECONDS", 0.2)
    storage._files.cache_clear()
    try:
        with s3.failing(slow(1.5)), pytest.raises(UserError, match="does not work .*imeout.*tried 3 times"):
            store.read("f")
    finally:
        storage._files.cache_clear()


def test_a_bucket_that_is_not_there_wrong_credentials_and_read_only_storage(store, s3, tmp_path):
    with pytest.raises(UserError, match="the bucket no-such-bucket of s3://no-such-bucket/x does not exist"):
        Artifacts("s3://no-such-bucket/x").check()
    with (
        s3.failing(error(403, "InvalidAccessKeyId")),
        pytest.raises(UserError, match="it does not know the access key"),
    ):
        Artifacts(store.url).check()
    with (
        s3.failing(error(403, "AccessDenied"), lambda r: r.method == "PUT"),
        pytest.raises(UserError, match="may not do that"),
    ):
        store.upload(_file(tmp_path / "f", b"1"), "f")


def test_an_endpoint_where_nothing_is(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._files.cache_clear()
    try:
        with pytest.raises(
            UserError, match=r"nothing answers at http://127.0.0.1:9, which AWS_ENDPOINT_URL sets; tried 3 times"
        ):
            store.read("f")
    finally:
        storage._files.cache_clear()


def test_a_clock_that_a_store_does_not_accept_is_told_as_such(store, s3):
    with (
        s3.failing(error(403, "RequestTimeTooSkewed")),
        pytest.raises(UserError, match="the clock of .* is wrong by too much; set it"),
    ):
        store.read("f")


def test_no_credentials_at_all_are_told(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    storage._files.cache_clear()
    try:
        with pytest.raises(UserError, match="there are no credentials for s3://"):
            store.read("f")
    finally:
        storage._files.cache_clear()


def test_a_stage_is_uploaded_before_its_entry_and_verified_when_read(store, s3):
    artifacts = Artifacts(store.url)
    artifacts.start({"teacher": "t"})
    artifacts.path("probes").mkdir(parents=True)
    artifacts.path("probes", "a").write_bytes(b"1")
    s3.requests.clear()
    artifacts.commit("probes", "key")
    puts = [r.path.rpartition("/")[2] for r in s3.requests if r.method == "PUT"]
    assert puts == ["a", "manifest.json"]

    said = []
    shutil.rmtree(artifacts.root)  # another node
    assert (
        Artifacts(store.url).is_complete("probes", "key", 1, said.append)
        and artifacts.path("probes", "a").read_bytes() == b"1"
    )
    artifacts.path("probes", "stale").write_bytes(b"")
    assert [p.name for p in fetch_stage(artifacts.path("probes")).iterdir()] == ["a"]
    store.write("probes/a", b"2")
    shutil.rmtree(artifacts.root)
    assert not Artifacts(store.url).is_complete("probes", "key", 1, said.append)
    assert said == ["probes: probes/a is damaged or missing (its sha256 differs from the manifest's); making it again"]
    with pytest.raises(UserError, match="probes/a is damaged or missing"):
        fetch_stage(artifacts.path("probes"))
    artifacts.invalidate("probes")
    assert set(store.objects()) == {"manifest.json"}


def test_a_place_with_something_else_in_it_is_refused(store):
    store.write("thesis.tex", b"mine")
    with pytest.raises(UserError, match="is not empty and is not a ppcl job"):
        Artifacts(store.url).start({})
    assert set(store.objects()) == {"thesis.tex"}


def test_what_a_process_makes_is_uploaded_when_it_ends_well(store):
    folder = mirror(f"{store.url}/students")
    with pytest.raises(RuntimeError), upload_on_exit(folder) as made:
        (made / "a").write_text("1")
        raise RuntimeError
    assert not store.objects()
    with upload_on_exit(folder) as made:
        (made / "deep").mkdir()
        (made / "deep" / "a").write_text("1")
    assert set(store.objects()) == {"students/deep/a"}
    download(folder)
    assert (folder / "deep" / "a").read_text() == "1"


def test_checkpoints_go_up_while_the_work_goes_on_and_another_node_begins_with_them(store, monkeypatch, tmp_path):
    folder = mirror(f"{store.url}/students/checkpoints")
    everything, nobody = lambda path: True, pytest.fail
    with pytest.raises(RuntimeError), synced_checkpoints(folder, "one", everything, nobody) as checkpoints:
        (checkpoints / "a").write_text("1")
        (checkpoints / "b.partial").write_text("half")
        raise RuntimeError("killed")
    assert set(store.objects()) == {"students/checkpoints/a"}
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "another node"))
    with (
        synced_checkpoints(folder, "two", everything, nobody) as first,
        synced_checkpoints(folder, "two", everything, nobody) as second,
    ):
        assert [p.read_text() for p in (first / "a", second / "a")] == ["1", "1"]
        (first / "new").write_text("2")
        os.replace(first / "new", first / "a")
        assert (second / "a").read_text() == "1"
    assert store.read("students/checkpoints/a") == b"2"


def test_checkpoints_that_are_damaged_are_left_out_on_every_node_and_told(store, monkeypatch, tmp_path):
    folder = mirror(f"{store.url}/students/checkpoints")
    for name in ("whole", "not its sha256", "not whole"):
        save_tensors(tmp_path / "made", {"x": torch.arange(9)}, {"name": name})
        content = bytearray((tmp_path / "made").read_bytes())
        if name == "not whole":
            content[-1] ^= 1
        store.write(f"students/checkpoints/{name}.safetensors", bytes(content))
    key = store._key("students/checkpoints/not its sha256.safetensors")
    store._call("put_object", Key=key, Body=b"another", Metadata={"sha256": "0" * 64})
    for node in ("one", "another"):
        monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / node))
        told = []
        with (
            synced_checkpoints(folder, "one", is_whole, told.append) as first,
            synced_checkpoints(folder, "one", is_whole, told.append),
        ):
            assert [path.name for path in first.iterdir()] == ["whole.safetensors"]
        assert sorted(path.stem for path in told) == ["not its sha256", "not whole"]


def test_a_second_job_is_refused_and_a_dead_ones_place_is_taken(store, monkeypatch):
    with hold_lease(store) as check:
        check()
        with pytest.raises(UserError, match="another ppcl job is writing to s3://"), hold_lease(store):
            pass
    assert LOCK not in store.objects()
    with hold_lease(store) as check:
        # By the store's clock: this node's is an hour off.
        monkeypatch.setattr("time.time", lambda real=time.time: real() + 3600)
        with pytest.raises(UserError, match="another ppcl works"), hold_lease(store):
            pass
        monkeypatch.setattr("ppcl.storage.lease._DEAD_AFTER", -1.0)
        with hold_lease(store), pytest.raises(UserError, match="another ppcl job took over"):
            check()


def test_the_lock_of_a_process_that_died_on_this_machine_is_free_at_once(store, monkeypatch):
    with monkeypatch.context() as patch:
        # A number above those that the kernel gives.
        patch.setattr("ppcl.storage.lease.os", SimpleNamespace(getpid=lambda: 2**22 + 1, readlink=os.readlink))
        patch.setattr("ppcl.storage.lease._Lease.release", lambda self: None)
        with hold_lease(store):
            pass
    with hold_lease(store) as check:
        check()


def test_one_of_many_that_start_together_gets_the_place(store):
    got, ready = [], threading.Barrier(4)

    def start():
        ready.wait()
        try:
            with hold_lease(store):
                got.append(True)
                ready.wait(60)
        except UserError:
            got.append(False)
            ready.wait(60)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False, False, False, True]


def test_a_rank_reads_the_ranges_of_its_own_blocks_and_no_weight_else(store, s3, teacher_folder):
    upload_all(teacher_folder, store)
    whole, local = Teacher(store.url), Teacher(teacher_folder)
    assert whole.sha256() == local.sha256() and whole.part_hashes() == local.part_hashes()
    s3.requests.clear()
    mine, theirs = whole.transformer(keep=[1, 2]), local.transformer(keep=[1, 2])
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    read = [r for r in s3.requests if r.path.endswith("safetensors") and r.method == "GET"]
    assert read and all(r.range for r in read)
    kept = sum(p.nbytes for p in mine.parameters())
    header = 100_000
    assert (
        kept
        <= sum(r.sent for r in read)
        < kept + header
        < (teacher_folder / whole.transformer_files["proj_out.weight"]).stat().st_size
    )
    assert not list(whole.folder.rglob("*.safetensors"))


def test_a_pipeline_in_a_bucket_is_the_one_in_the_folder_and_another_version_is_another_snapshot(store, teacher_folder):
    upload_all(teacher_folder, store)
    teacher = Teacher(store.url)
    parts = teacher.pipeline_without_transformer()
    assert parts.transformer is None and parts.text_encoder is not None
    whole = teacher.pipeline()
    stock = Teacher(teacher_folder).pipeline()
    for (name, a), (_, b) in zip(whole.vae.named_parameters(), stock.vae.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    before = teacher.folder
    store.write("scheduler/scheduler_config.json", store.read("scheduler/scheduler_config.json") + b"\n")
    assert Teacher(store.url).folder != before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model_index.json", None, "is not a diffusers pipeline folder"),
        ("transformer/x.bin", b"", "x.bin is a pickle"),
        ("transformer/diffusion_pytorch_model.safetensors", b"\xff" * 64, "cannot be read as safetensors"),
        ("transformer/diffusion_pytorch_model.safetensors", None, "holds no diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_model_in_a_bucket_that_cannot_be_used_is_told(store, teacher_folder, name, content, sentence):
    upload_all(teacher_folder, store)
    store.remove(name) if content is None else store.write(name, content)
    with pytest.raises(UserError, match=sentence) as told:
        Teacher(store.url)
    assert store.url in str(told.value)


def test_one_file_is_downloaded_when_it_changed(store, s3, tmp_path):
    from ppcl.calibration.prompts import check_prompts, read_prompts

    store.write("p.txt", b"a red circle\na blue square\n")
    url = f"{store.url}/p.txt"
    assert [p.text for p in read_prompts(url, "prompt")] == ["a red circle", "a blue square"]
    before = check_prompts(url, "prompt")
    gets = [r for r in s3.requests if r.method == "GET"]
    assert check_prompts(url, "prompt") == before and [r for r in s3.requests if r.method == "GET"] == gets
    store.write("p.txt", b"a red circle\na green cross\n")
    assert [p.text for p in read_prompts(url, "prompt")] == ["a red circle", "a green cross"]
    assert check_prompts(url, "prompt") != before
    with pytest.raises(UserError, match="s3://.*none.txt does not exist"):
        local_file(f"{store.url}/none.txt")


def test_publishing_an_ordinary_file_does_nothing(tmp_path):
    upload(_file(tmp_path / "f", b"1"))
