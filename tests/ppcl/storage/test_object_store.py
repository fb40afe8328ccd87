"""What lies in a bucket, on a real S3 server: read by range, written whole, tried again, told in one sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppcl.errors import UserError
from ppcl.storage import object_store as storage
from ppcl.storage.manifest import Artifacts, fetch_stage
from ppcl.storage.object_store import Store
from tests.bucket import error, slow


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


def test_a_large_object_is_read_in_parts_of_one_content(store, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 3)
    content = bytes(range(100))
    store.write("f", content)
    assert store.download("f", tmp_path / "f") and (tmp_path / "f").read_bytes() == content
    assert len([r for r in s3.requests if r.method == "GET"]) == 34
    store.write("empty", b"")
    assert store.download("empty", tmp_path / "empty") and (tmp_path / "empty").read_bytes() == b""


def _replaced_at_the_second_part(store, s3, name):
    """A fault: before the second part is sent, another object of the same size takes the place."""
    seen = []

    def fault(request):
        seen.append(request)
        if len(seen) == 2:
            _write_without_a_hash(store, name, b"2" * 30)

    return s3.failing(fault, lambda r: r.method == "GET" and r.range is not None)


def _write_without_a_hash(store, name, content):
    """As other tools upload."""
    store._call("put_object", Key=store._key(name), Body=content)


def test_an_object_that_is_replaced_while_it_is_downloaded_is_not_mixed(store, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 10)
    monkeypatch.setattr(storage, "_PARTS_AT_ONCE", 1)
    _write_without_a_hash(store, "f", b"1" * 30)
    with _replaced_at_the_second_part(store, s3, "f"):
        assert not store.download("f", tmp_path / "f")
    assert not list(tmp_path.glob("f*"))
    _write_without_a_hash(store, "f", b"1" * 30)
    listed = store.objects()
    with (
        _replaced_at_the_second_part(store, s3, "f"),
        pytest.raises(UserError, match="f was replaced while it was read"),
    ):
        store.snapshot(["f"], listed)
    with pytest.raises(UserError, match="f was replaced while it was read"):
        store.snapshot(["f"], listed)


@pytest.mark.parametrize("hashed", [True, False], ids=["with a writer's hash", "without"])
def test_a_file_of_a_snapshot_is_compared_before_it_is_used_again(store, s3, hashed):
    store.write("f", b"right") if hashed else _write_without_a_hash(store, "f", b"right")
    listed = store.objects()
    folder = store.snapshot(["f"], listed)
    s3.requests.clear()
    assert store.snapshot(["f"], listed) == folder and not s3.requests
    (folder / "f").write_bytes(b"wrong")
    assert (store.snapshot(["f"], listed) / "f").read_bytes() == b"right"


def test_a_download_that_the_scratch_folder_has_no_room_for_is_told(store, s3, monkeypatch, tmp_path):
    monkeypatch.setenv("PPCL_SCRATCH_GB", "1e-6")
    store.write("f", b"1" * 2000)
    with pytest.raises(UserError, match=f"the scratch folder .* is full: .* and {store.url}/f needs 2e-06 more"):
        store.snapshot(["f"], store.objects())
    # Whole names: the mark of a folder in use is named after a hash, which may begin with any letter.
    left = [path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith("f.") or name == "f"]


def test_a_teacher_that_nobody_uses_any_more_makes_room_for_another(store, s3, monkeypatch):
    monkeypatch.setenv("PPCL_SCRATCH_GB", "3e-6")
    code = """
import sys
from ppcl.storage.object_store import Store
store = Store(sys.argv[1])
print(store.snapshot(store.objects(), store.objects()))
"""
    folders = []
    for number in "12":
        store.write(f"{number}/f", number.encode() * 2000)
        made = subprocess.run(
            [sys.executable, "-c", code, f"{store.url}/{number}"], capture_output=True, text=True, check=True
        )
        folders.append(Path(made.stdout.strip()))
    assert not folders[0].exists() and (folders[1] / "f").read_bytes() == b"2" * 2000


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("share", [0.8, 100], ids=["by the bound", "by the disk"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_read(store, s3, monkeypatch, small_disk, share):
    monkeypatch.setenv("PPCL_SCRATCH", str(small_disk / "scratch"))
    monkeypatch.setattr("ppcl.storage.scratch._SHARE", share)
    store.write("f", b"1" * 100_000)
    s3.requests.clear()
    sentence = (
        "is full: it may hold 5.24e-05 GB" if share < 1 else "the disk of the scratch folder .* GB free, and .*/f"
    )
    with pytest.raises(UserError, match=sentence):
        store.snapshot(["f"], store.objects())
    assert not [r for r in s3.requests if r.range is not None]


def test_a_disk_that_others_fill_meanwhile_is_told_in_one_sentence(store, s3, monkeypatch, small_disk):
    monkeypatch.setenv("PPCL_SCRATCH", str(small_disk / "scratch"))
    store.write("f", b"1" * 30_000)

    def fill(request):
        (small_disk / "other").write_bytes(b"1" * 40_000)

    with (
        s3.failing(fill, lambda r: r.range is not None, times=1),
        pytest.raises(UserError, match="No space left on device; free space, or set PPCL_SCRATCH"),
    ):
        store.snapshot(["f"], store.objects())
    assert not list((small_disk / "scratch").rglob("f.*"))
