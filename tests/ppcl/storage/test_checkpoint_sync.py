"""Checkpoints that are uploaded while the work goes on."""

import os

import pytest
import torch

from ppcl.storage.checkpoint_sync import synced_checkpoints
from ppcl.storage.node_cache import mirror
from ppcl.storage.tensor_files import is_whole, save_tensors


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


def test_a_checkpoint_that_is_removed_is_removed_from_the_store(store):
    folder = mirror(f"{store.url}/finetuning/checkpoints")
    for name in ("one", "two"):
        store.write(f"finetuning/checkpoints/{name}", b"old")
    with synced_checkpoints(folder, "run", lambda path: True, pytest.fail) as checkpoints:
        (checkpoints / "three").write_text("new")
        (checkpoints / "one").unlink()
    assert set(store.objects("finetuning")) == {"finetuning/checkpoints/two", "finetuning/checkpoints/three"}
