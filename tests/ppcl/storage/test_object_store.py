"""What lies in a bucket, on a real S3 server: read by range, written whole, tried again, told in one sentence."""

import shutil

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
