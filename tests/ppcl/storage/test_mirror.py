"""A bucket's files on a node's disk: where they come from, when they are downloaded and uploaded."""

import pytest

from ppcl.errors import UserError
from ppcl.storage.mirror import download, local_file, store_of, to_local, upload, upload_on_exit
from ppcl.storage.node_cache import mirror


def test_a_mirrors_path_says_where_it_comes_from_on_whatever_node(monkeypatch, tmp_path):
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "one"))
    path = mirror("s3://b/runs/qwen") / "students" / "0.safetensors"
    assert store_of(path).url == "s3://b/runs/qwen/students/0.safetensors" and store_of(tmp_path) is None
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "two"))
    assert to_local(path) == mirror("s3://b/runs/qwen") / "students" / "0.safetensors" != path


def _file(path, content):
    path.write_bytes(content)
    return path


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


def test_one_file_is_downloaded_when_it_changed(store, s3, tmp_path):
    from ppcl.calibration.prompts import check_prompts, read_prompts

    store.write("p.txt", b"a red circle\na blue square\na star\n")
    url = f"{store.url}/p.txt"
    assert [p.text for p in read_prompts(url, "prompt")] == ["a red circle", "a blue square", "a star"]
    before = check_prompts(url, "prompt")
    gets = [r for r in s3.requests if r.method == "GET"]
    assert check_prompts(url, "prompt") == before and [r for r in s3.requests if r.method == "GET"] == gets
    store.write("p.txt", b"a red circle\na green cross\na star\n")
    assert [p.text for p in read_prompts(url, "prompt")] == ["a red circle", "a green cross", "a star"]
    assert check_prompts(url, "prompt") != before
    with pytest.raises(UserError, match="s3://.*none.txt does not exist"):
        local_file(f"{store.url}/none.txt")


def test_publishing_an_ordinary_file_does_nothing(tmp_path):
    upload(_file(tmp_path / "f", b"1"))


def test_one_file_is_compared_before_it_is_used_again(store):
    store._call("put_object", Key=store._key("p.txt"), Body=b"right")
    url = f"{store.url}/p.txt"
    local_file(url).write_bytes(b"wrong")
    assert local_file(url).read_bytes() == b"right"
