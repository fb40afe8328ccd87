"""Folders of one file a batch, on a disk and in a bucket."""

import pytest

from ppcl.calibration.batch_files import publish, remove_others, whole_files
from ppcl.storage.mirror import upload
from ppcl.storage.node_cache import mirror

NAMES = ["0.parquet", "1.parquet", "2.parquet"]


def fill(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"content of {name}")
        upload(folder / name)


def test_files_that_are_there_are_whole_and_others_are_left_alone(tmp_path):
    assert whole_files(tmp_path / "cache", NAMES) == set()
    fill(tmp_path, NAMES[:2])
    (tmp_path / "texts.parquet").write_text("prompts")
    assert whole_files(tmp_path, NAMES) == {"0.parquet", "1.parquet"}
    assert (tmp_path / "texts.parquet").exists()


def test_a_change_in_a_result_is_found_where_its_disk_blocks_are_shared(tmp_path):
    cache, result = tmp_path / "cache", tmp_path / "result" / "states"
    fill(cache)
    publish(cache, NAMES, result)
    assert (result / "1.parquet").samefile(cache / "1.parquet")
    with open(result / "1.parquet", "r+b") as file:
        file.write(b"C")
    (cache / "2.parquet").unlink()
    assert whole_files(cache, NAMES) == {"0.parquet"}
    assert not (cache / "1.parquet").exists()


def test_a_bucket_gives_whole_files_to_a_node_without_them(store, monkeypatch, tmp_path):
    fill(mirror(f"{store.url}/cache"))
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "another node"))
    cache = mirror(f"{store.url}/cache")
    assert whole_files(cache, NAMES) == set(NAMES)
    publish(cache, NAMES, tmp_path / "result")
    assert (tmp_path / "result" / "1.parquet").read_text() == "content of 1.parquet"


def test_a_damaged_object_is_removed_from_its_bucket(store, monkeypatch, tmp_path):
    fill(mirror(f"{store.url}/cache"))
    sha256 = store.sha256("cache/1.parquet")
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "another node"))
    store._call("put_object", Key=store._key("cache/1.parquet"), Body=b"other", Metadata={"sha256": sha256})
    assert whole_files(mirror(f"{store.url}/cache"), NAMES) == {"0.parquet", "2.parquet"}
    assert set(store.objects("cache")) == {"cache/0.parquet", "cache/2.parquet"}
    with pytest.raises(FileNotFoundError):
        publish(mirror(f"{store.url}/cache"), NAMES, tmp_path / "result")


def test_folders_of_other_settings_are_removed(store, tmp_path):
    for root in (tmp_path, mirror(store.url)):
        for name in ("states-1", "states-2", "embeddings-1"):
            fill(root / name, NAMES[:1])
        remove_others(root / "states-2", "states-")
        assert {path.name for path in root.glob("*-?")} == {"states-2", "embeddings-1"}
    assert set(store.objects()) == {"states-2/0.parquet", "embeddings-1/0.parquet"}
