"""Checkpoints of fine-tuning: each rank writes its own part, and any number of ranks resumes.

    step-00000100/shards/shard-00001-model-00001-of-00001.safetensors   one rank's part of the tensors
    step-00000100/state.safetensors                                     the rest, and the sha256 of every shard

Shards are torch's distributed checkpoint in its safetensors format, so no rank ever holds a whole tensor of another.
`state.safetensors` is written last: a step without it was not finished. Two steps are kept, since in a bucket a step's
files arrive one after the other.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ppcl.storage.node_cache import file_sha256
from ppcl.storage.tensor_files import DamagedError, is_whole, load_tensors, save_tensors
from ppcl.training.parallel_dims import ParallelDims

Tensors = Mapping[str, torch.Tensor]

_STATE, _SHARDS = "state.safetensors", "shards"
_FILES = "files"  # in the metadata
_KEPT = 2


def save_checkpoint(
    folder: Path, step: int, sharded: Tensors, rest: Tensors, metadata: Mapping[str, str], dims: ParallelDims
) -> None:
    """Write the checkpoint of a step. All ranks take part.

    `sharded`: tensors of which each rank has a part, or which are the same on all; `rest` and `metadata`: the same on
    all ranks, written by the first one.
    """
    made = _step_folder(folder, step)
    shutil.rmtree(made, ignore_errors=True)
    dims.barrier()
    (made / _SHARDS).mkdir(parents=True, exist_ok=True)
    with _quiet():
        dcp.save(dict(sharded), storage_writer=HuggingFaceStorageWriter(str(made / _SHARDS), save_distributed=True))
    own = {path.name: file_sha256(path) for path in _shards(made) if _is_of(path, dims.rank)}
    files = {name: sha256 for part in _gathered(own, dims) for name, sha256 in part.items()}
    if dims.rank == 0:
        save_tensors(made / _STATE, rest, {**metadata, _FILES: json.dumps(files)})
    dims.barrier()
    for old in sorted(_steps(folder))[:-_KEPT]:
        shutil.rmtree(_step_folder(folder, old), ignore_errors=True)


def newest_checkpoint(
    folder: Path, dims: ParallelDims, report_damaged: Callable[[Path], None] = lambda path: None
) -> Path | None:
    """The newest checkpoint that is whole for all ranks, which may see different files; None where there is none.

    Each rank compares the hashes of its share of the files, so each file is read once. Newer steps that are not whole
    are removed; `report_damaged` is given those of them that were finished once.
    """
    mine = set(_steps(folder))
    while (step := dims.minimum(max(mine, default=-1))) >= 0:
        checkpoint = _step_folder(folder, step)
        (whole,) = dims.agreed([step in mine and is_intact(checkpoint, dims.rank, dims.pp * dims.dp)])
        if whole:
            return checkpoint
        if (checkpoint / _STATE).exists():
            report_damaged(checkpoint)
        dims.barrier()
        if dims.rank == 0:
            shutil.rmtree(checkpoint, ignore_errors=True)
        mine = {one for one in mine if one < step}
    return None


def load_rest(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What the first rank wrote beside the shards: tensors and metadata. Raises `DamagedError`."""
    tensors, metadata = load_tensors(checkpoint / _STATE)
    return tensors, {name: value for name, value in metadata.items() if name != _FILES}


def load_sharded(checkpoint: Path, into: Tensors) -> None:
    """Fill tensors, however they are sharded now, with what the shards have of these names. All ranks take part."""
    with _quiet():
        dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(checkpoint / _SHARDS)))


def is_intact(checkpoint: Path, first: int = 0, every: int = 1) -> bool:
    """Whether a step was written to its end and is as it was written; of the shards every so many are compared."""
    try:
        _, metadata = load_tensors(checkpoint / _STATE)
        files: dict[str, str] = json.loads(metadata[_FILES])
    except (DamagedError, OSError, KeyError):
        return False
    paths = {name: checkpoint / _SHARDS / name for name in files}
    compared = sorted(files)[first::every]
    return all(path.exists() for path in paths.values()) and all(file_sha256(paths[n]) == files[n] for n in compared)


def is_whole_file(path: Path) -> bool:
    """False for a damaged file of a checkpoint; what is wrong with shards alone is found by `newest_checkpoint`."""
    return path.parent.name == _SHARDS or is_whole(path)


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir()]


def _shards(made: Path) -> list[Path]:
    return sorted((made / _SHARDS).glob("*.safetensors"))


def _is_of(path: Path, rank: int) -> bool:
    """Whether a shard is a rank's own; in a shared folder all ranks see all."""
    return path.name.startswith(f"shard-{rank + 1:05d}-")


def _gathered(own: dict[str, str], dims: ParallelDims) -> list[dict[str, str]]:
    if dims.pp * dims.dp == 1:
        return [own]
    gathered: list[dict[str, str]] = [{} for _ in range(dims.pp * dims.dp)]
    dist.all_gather_object(gathered, own)
    return gathered


def _quiet() -> warnings.catch_warnings:
    """Torch warns of a single process, and of what it calls itself."""
    return warnings.catch_warnings(action="ignore")
