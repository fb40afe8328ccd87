import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from ppcl.storage.tensor_files import DamagedError, drop_damaged, is_whole, load_tensors, save_tensors, to_bytes

TENSORS = {
    "x": torch.arange(1000.0),
    "half": torch.randn(3, 5).bfloat16(),
    "step": torch.tensor(7.0),
    "ids": torch.arange(4),
}
WORDS = {"step": "7", "curve": "[]"}


def test_what_was_written_is_read(tmp_path):
    save_tensors(tmp_path / "new" / "a.safetensors", TENSORS, WORDS)
    tensors, words = load_tensors(tmp_path / "new" / "a.safetensors")
    assert words == WORDS and tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    # safetensors alone gives each of these files another order of its metadata.
    metadata = {name: f'{name} "\\ \n\x01ä' for name in "zyxwvuts"} | WORDS
    orders = [metadata, dict(sorted(metadata.items()))]
    for number, words in enumerate(orders):
        save_tensors(tmp_path / f"{number}.safetensors", dict(sorted(TENSORS.items())) if number else TENSORS, words)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert load_tensors(tmp_path / "0.safetensors")[1] == metadata
    assert to_bytes(TENSORS, orders[0]) == to_bytes(TENSORS, orders[1])
    assert torch.equal(load(to_bytes(TENSORS, metadata))["half"], TENSORS["half"])


def test_any_changed_bit_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS, WORDS)
    whole = path.read_bytes()
    found = 0
    for at in [*range(8, 900, 7), *range(900, len(whole), 97), len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 4
        path.write_bytes(changed)
        try:
            tensors, words = load_tensors(path)
        except DamagedError:
            found += 1
        else:
            # What only stands between the words.
            assert words == WORDS and all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert found > 150


def test_damaged_ones_are_dropped_and_the_others_kept(tmp_path):
    for name in ("00-01", "02-03", "04-05", "06-07"):
        save_tensors(tmp_path / f"{name}.safetensors", TENSORS, WORDS)
    (tmp_path / "02-03.safetensors").write_bytes((tmp_path / "02-03.safetensors").read_bytes()[:-1])
    (tmp_path / "04-05.safetensors").write_bytes(b"")
    # The words belong to another content.
    with safe_open(tmp_path / "06-07.safetensors", "pt") as file:
        save_file(TENSORS | {"ids": torch.arange(1, 5)}, tmp_path / "06-07.safetensors", file.metadata())
    (tmp_path / "00-01.json").write_text("{")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "08-09.safetensors").write_bytes(b"{")
    assert [path.stem for path in drop_damaged(tmp_path)] == ["02-03", "04-05", "06-07", "08-09"]
    assert (
        sorted(path.name for path in tmp_path.rglob("*.*")) == ["00-01.json", "00-01.safetensors"]
        and drop_damaged(tmp_path) == []
    )


def test_a_file_of_another_writer_is_damaged(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert not is_whole(tmp_path / "a.safetensors")
    with pytest.raises(DamagedError, match="does not hold what was written"):
        load_tensors(tmp_path / "a.safetensors")
