"""Checkpoints that each rank writes its part of: any number of ranks finds them, or goes back to the one before."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ppcl.training.finetuning import checkpoints
from ppcl.training.finetuning.checkpoints import (
    load_rest,
    load_sharded,
    newest_checkpoint,
    save_checkpoint,
)
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.sharding import local, mesh_of, shard, whole
from tests import ranks

ROWS, COLUMNS = 48, 16


def _weights(step):
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + 1000 * step


def _linear(dims, value):
    linear = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        linear.weight.copy_(value)
        linear.bias.zero_()
    if dims.dp > 1:
        shard(linear, mesh_of(dims, "cpu"))
    return linear


def _save(folder, steps):
    dims = ParallelDims.join(1, torch.distributed.get_world_size()) if torch.distributed.is_initialized() else None
    dims = dims or ParallelDims()
    for step in steps:
        linear = _linear(dims, _weights(step))
        sharded = {"weight": linear.weight.detach(), "bias": linear.bias.detach()}
        save_checkpoint(folder, step, sharded, {"count": torch.tensor(step)}, {"step": str(step)}, dims)


def _load(folder, out):
    count = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    dims = ParallelDims.join(1, count)
    checkpoint = newest_checkpoint(folder, dims)
    linear = _linear(dims, torch.zeros(ROWS, COLUMNS))
    load_sharded(checkpoint, {"weight": linear.weight.detach()})
    rest, metadata = load_rest(checkpoint)
    own, full = local(linear.weight).shape[0], whole(linear.weight.detach())
    found = {"step": metadata["step"], "count": int(rest["count"]), "rows": own, "weight": full.tolist()}
    (out / f"{dims.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps of two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    ranks.run(2, _save, folder, [4, 8, 12])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_each_rank_writes_its_own_part_and_two_steps_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000008", "step-00000012"]
    shards = sorted((saved / "step-00000012" / "shards").iterdir())
    assert len(shards) == 2
    for number, path in enumerate(shards):
        with safe_open(path, "pt") as file:
            rows = file.get_tensor("weight")
        half = ROWS // 2
        assert torch.equal(rows, _weights(12)[number * half : (number + 1) * half])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_ranks_finds_the_newest(folder, tmp_path, count):
    if count == 1:
        _load(folder, tmp_path)
    else:
        ranks.run(count, _load, folder, tmp_path)
    for rank in range(count):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["step"], found["count"], found["rows"]) == ("12", 12, ROWS // count)
        assert torch.equal(torch.tensor(found["weight"]), _weights(12))


@pytest.mark.parametrize("fault", ["changed", "cut", "gone", "unfinished"])
def test_a_step_that_is_not_whole_is_not_resumed_from(folder, fault):
    step = folder / "step-00000012"
    path = step / "shards" / "shard-00002-model-00001-of-00001.safetensors"
    content = path.read_bytes()
    if fault == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "cut":
        path.write_bytes(content[:-8])
    elif fault == "gone":
        path.unlink()
    else:
        (step / "state.safetensors").unlink()
    told = []
    assert newest_checkpoint(folder, ParallelDims(), told.append).name == "step-00000008"
    # Of an unfinished one nobody needs to hear.
    assert told == ([] if fault == "unfinished" else [step])
    assert not step.exists() and (folder / "step-00000008").exists()


def _find(folder, out):
    dims, told, read = ParallelDims.join(1, torch.distributed.get_world_size()), [], []
    with pytest.MonkeyPatch.context() as patch:
        sha256 = checkpoints.file_sha256
        patch.setattr(checkpoints, "file_sha256", lambda path: read.append(str(path)) or sha256(path))
        found = newest_checkpoint(folder, dims, lambda path: told.append(path.name))
    (out / f"{dims.rank}.json").write_text(json.dumps({"found": found.name, "told": told, "read": read}))


@pytest.mark.parametrize("damaged", [0, 1])
def test_ranks_go_back_together_and_read_every_file_once(folder, tmp_path, damaged):
    path = sorted((folder / "step-00000012" / "shards").iterdir())[damaged]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    ranks.run(2, _find, folder, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(one["found"], one["told"]) for one in found] == [("step-00000008", ["step-00000012"])] * 2
    read = [name for one in found for name in one["read"]]
    assert len(read) == len(set(read)) == 4 and not (folder / "step-00000012").exists()


def test_a_step_is_written_again_over_what_an_unfinished_one_left(folder):
    leftover = folder / "step-00000016" / "shards" / "shard-00002-model-00001-of-00001.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    _save(folder, [16])
    checkpoint = newest_checkpoint(folder, ParallelDims())
    assert checkpoint.name == "step-00000016" and not leftover.exists()
    into = torch.zeros(ROWS, COLUMNS)
    load_sharded(checkpoint, {"weight": into})
    assert torch.equal(into, _weights(16))


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing", ParallelDims()) is None
