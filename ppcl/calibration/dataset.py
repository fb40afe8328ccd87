"""The calibration set as files: embeddings and states in Parquet, tensors as bytes with their shape and type.

    prompts/*.parquet   prompt_id, prompt, one column a prompt argument; the negative prompt has the id -1
    states/*.parquet    sample_id, prompt_id, embedding_id, timestep, latents
    call.json           the transformer's class and the arguments that all samples share
    splits.json         the ids of the prompts of the splits validation and test; all others are of train

Row groups are small, so that reading one sample reads about a megabyte around it.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ppcl.calibration.encoding import Embedding, collate
from ppcl.calibration.splits import LEAST_PROMPTS, Split, hashes, split_prompts
from ppcl.calibration.trajectory_recorder import Call, State
from ppcl.errors import UserError
from ppcl.models import adapter_of
from ppcl.storage.atomic import replacing
from ppcl.storage.manifest import StageFiles, write_atomically

PROMPTS, STATES, CALL, SPLITS = "prompts", "states", "call.json", "splits.json"
# In place of `SPLITS` in results of 0.1.0, which reported on the prompts that they chose on.
_HELD_OUT = "held_out.json"
_SEEN: tuple[Split, ...] = ("train", "validation")

_TENSOR = pa.struct([("data", pa.binary()), ("shape", pa.list_(pa.int32())), ("dtype", pa.string())])
_STATE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("prompt_id", pa.int64()),
        ("embedding_id", pa.int64()),
        ("timestep", pa.float32()),
        ("latents", _TENSOR),
    ]
)
_ROW_GROUP_BYTES = 1 << 20
_CACHE_BYTES = 256 << 20


def pack(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as Parquet takes it. Arrow has no bfloat16: its bits are kept as those of uint16."""
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
    return {
        "data": bits.numpy().tobytes(),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


def unpack(packed: dict[str, Any]) -> torch.Tensor:
    # The bytes of a Python object must not be written to; a bytearray is the tensor's own.
    return torch.frombuffer(bytearray(packed["data"]), dtype=getattr(torch, packed["dtype"])).reshape(packed["shape"])


def write_embeddings(path: Path, ids: Sequence[int], texts: Sequence[str], embeddings: Sequence[Embedding]) -> None:
    names = list(embeddings[0])
    schema = pa.schema([("prompt_id", pa.int64()), ("prompt", pa.string()), *((name, _TENSOR) for name in names)])
    rows = [
        {"prompt_id": i, "prompt": text, **{name: pack(e[name]) for name in names}}
        for i, text, e in zip(ids, texts, embeddings, strict=True)
    ]
    _write(path, pa.Table.from_pylist(rows, schema))


def read_embeddings(path: Path) -> tuple[list[int], list[str], list[Embedding]]:
    table = pq.read_table(path, partitioning=None)
    names = table.column_names[2:]
    rows = table.to_pylist()
    embeddings = [{name: unpack(row[name]) for name in names} for row in rows]
    return [row["prompt_id"] for row in rows], [row["prompt"] for row in rows], embeddings


def write_states(path: Path, states: Sequence[State], call: Call | None, dropped: int) -> None:
    """States as one file, in the order of their ids. `dropped` states of these prompts were not finite."""
    rows = [
        {
            "sample_id": s.sample_id,
            "prompt_id": s.prompt_id,
            "embedding_id": s.embedding_id,
            "timestep": s.timestep,
            "latents": pack(s.latents),
        }
        for s in sorted(states, key=lambda s: s.sample_id)
    ]
    notes = {"dropped": str(dropped), "call": json.dumps(vars(call) if call else None)}
    _write(path, pa.Table.from_pylist(rows, _STATE_SCHEMA.with_metadata(notes)))


def read_notes(path: Path) -> tuple[int, Call | None]:
    """How many states were dropped while a file of states was made, and the call they share."""
    notes = pq.read_schema(path).metadata
    call = json.loads(notes[b"call"])
    return int(notes[b"dropped"]), Call(**call) if call else None


def write_call(folder: Path, transformer: str, call: Call) -> None:
    write_atomically(folder / CALL, json.dumps({"transformer": transformer, **vars(call)}, indent=1))


def write_splits(folder: Path, validation: Sequence[int], test: Sequence[int]) -> None:
    """Write the ids of the prompts of these two splits."""
    splits = {"validation": [int(i) for i in validation], "test": [int(i) for i in test]}
    write_atomically(folder / SPLITS, json.dumps(splits))


def _read_splits(folder: Path) -> dict[Split, np.ndarray]:
    """The ids of the prompts of validation and test; the same ones for both in results of 0.1.0."""
    if (folder / SPLITS).exists():
        splits = json.loads((folder / SPLITS).read_text())
    else:
        splits = dict.fromkeys(("validation", "test"), json.loads((folder / _HELD_OUT).read_text()))
    return {split: np.array(ids, dtype=np.int64) for split, ids in splits.items()}


def finish(folder: Path, transformer: str, seed: int, validation: float, test: float) -> dict[str, int]:
    """Split the prompts of a folder of embeddings and states, write what all samples share, and count.

    `validation`, `test`: shares of the prompts that have finite states. Reads no latents and no embeddings; memory: 8
    bytes a sample, 16 a prompt. Raises `UserError` where no state is finite, or those of too few prompts.
    """
    notes = [read_notes(path) for path in sorted((folder / STATES).glob("*.parquet"))]
    call = next((call for _, call in notes if call is not None), None)
    samples = [batch["prompt_id"].to_numpy() for batch in _columns(folder / STATES, ["prompt_id"])]
    count = sum(map(len, samples))
    if not count or call is None:
        raise UserError("all states of the teacher are NaN or infinite; check its weights and its precision")
    ids, hashed = _hashed_prompts(folder / PROMPTS, np.unique(np.concatenate(samples)), seed)
    if (different := len(np.unique(hashed))) < LEAST_PROMPTS:
        raise UserError(
            f"only {different} different prompt{'s have' if different > 1 else ' has'} finite states and at least "
            f"{LEAST_PROMPTS} are needed, one to train, one to validate and one to test; give more prompts or check "
            "the teacher"
        )
    splits = {split: ids[rows] for split, rows in split_prompts(hashed, validation, test).items()}
    write_call(folder, transformer, call)
    write_splits(folder, splits["validation"], splits["test"])
    counts = {f"{split}_prompts": len(prompts) for split, prompts in splits.items()}
    return counts | {"samples": count, "dropped": sum(dropped for dropped, _ in notes)}


def _hashed_prompts(folder: Path, wanted: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids that are there of these, both ascending, and the hashes of their prompts."""
    found, hashed = [], []
    for batch in _columns(folder, ["prompt_id", "prompt"]):
        ids = batch["prompt_id"].to_numpy()
        kept = wanted[np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)] == ids
        found.append(ids[kept])
        hashed.append(hashes(batch["prompt"].filter(pa.array(kept)).to_pylist(), seed))
    order = np.argsort(np.concatenate(found))
    return np.concatenate(found)[order], np.concatenate(hashed)[order]


def _columns(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """File by file: a dataset of Arrow keeps the metadata of all files."""
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=columns)


def _write(path: Path, table: pa.Table) -> None:
    """The whole file or none, in row groups of about a megabyte."""
    rows = max(1, math.ceil(table.num_rows * _ROW_GROUP_BYTES / max(table.nbytes, 1)))
    try:
        with replacing(path) as partial:
            pq.write_table(table, partial, row_group_size=rows, compression="zstd")
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}); free space or choose another output folder") from None


class _Rows:
    """Random access by id into Parquet files of a folder; the row groups last used are kept, up to a size."""

    def __init__(self, folder: Path, files: Sequence[Path], id_column: str, also: Sequence[str] = ()):
        columns = [id_column, *also]
        self.files = sorted(files)
        ids: list[np.ndarray] = []
        places: list[np.ndarray] = []
        others: dict[str, list[np.ndarray]] = {name: [] for name in also}
        for number, path in enumerate(self.files):
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=columns)
                    ids.append(table[id_column].to_numpy())
                    rows = np.arange(table.num_rows)
                    places.append(np.stack([np.full_like(rows, number), np.full_like(rows, group), rows], axis=1))
                    for name in also:
                        others[name].append(table[name].to_numpy())
        if not ids:
            raise UserError(f"{folder} holds no calibration samples; run the calibration again")
        self.ids = np.concatenate(ids)
        order = np.argsort(self.ids, kind="stable")
        self.ids, self.places = self.ids[order], np.concatenate(places)[order]
        self.others = {name: np.concatenate(values)[order] for name, values in others.items()}
        self.cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self.cached = 0

    def find(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Positions of ids in `self.ids`. Raises `KeyError` for one that is not there."""
        wanted = np.asarray(ids, dtype=np.int64)
        positions = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        missing = self.ids[positions] != wanted
        if missing.any():
            raise KeyError(f"no sample {wanted[missing][0]} in the calibration set")
        return positions

    def row(self, position: int) -> dict[str, Any]:
        number, group, row = (int(i) for i in self.places[position])
        return self._group(number, group).slice(row, 1).to_pylist()[0]

    def _group(self, number: int, group: int) -> pa.Table:
        key = (number, group)
        if key not in self.cache:
            with pq.ParquetFile(self.files[number]) as file:
                self.cache[key] = file.read_row_group(group)
            self.cached += self.cache[key].nbytes
            while self.cached > _CACHE_BYTES and len(self.cache) > 1:
                self.cached -= self.cache.popitem(last=False)[1].nbytes
        self.cache.move_to_end(key)
        return self.cache[key]


class CalibrationSet:
    """A finished calibration folder: the ids of its samples, and batches of them as calls of the transformer.

    `files`: those of the folder that are its samples and prompts; all by default.
    Memory: 40 bytes a sample, and two caches of row groups of bounded size.
    """

    @classmethod
    def of(cls, stage: StageFiles) -> CalibrationSet:
        """Of the files that the manifest names, on this node. Raises `UserError` where one is damaged or missing."""
        stage = stage.fetch()
        return cls(stage.folder, stage.paths("*.parquet"))

    def __init__(self, folder: str | Path, files: Sequence[Path] | None = None):
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*/*.parquet")) if files is None else files
        has_splits = any((self.folder / name).exists() for name in (SPLITS, _HELD_OUT))
        if not (self.folder / CALL).exists() or not has_splits:
            raise UserError(f"{self.folder} holds no complete calibration set; run ppcl compress again")
        call = json.loads((self.folder / CALL).read_text())
        self.adapter = adapter_of(call["transformer"])
        # A set of an earlier version has no schedule.
        self.call = Call(call["each"], call["whole"], call.get("timesteps", []), call.get("sigmas", []))
        states = [path for path in files if path.parent.name == STATES]
        prompts = [path for path in files if path.parent.name == PROMPTS]
        self._states = _Rows(self.folder / STATES, states, "sample_id", also=["prompt_id"])
        self._prompts = _Rows(self.folder / PROMPTS, prompts, "prompt_id")
        self._splits = _read_splits(self.folder)

    def ids(self, split: Split) -> np.ndarray:
        """Sample ids of one split, ascending. Samples of one prompt are all of the same split."""
        return self._states.ids[self._is_of(split, self._states.others["prompt_id"])]

    def prompt_ids(self, split: Split) -> np.ndarray:
        """The ids of the prompts of one split that have samples, ascending."""
        sampled = np.unique(self._states.others["prompt_id"])
        return sampled[self._is_of(split, sampled)]

    def prompts(self, split: Split) -> list[tuple[int, str]]:
        """(prompt id, prompt) of one split, ascending; only prompts that have samples."""
        wanted = set(self.prompt_ids(split).tolist())
        found = []
        for path in self._prompts.files:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["prompt_id", "prompt"]):
                    found += [(i, t) for i, t in zip(*batch.to_pydict().values(), strict=True) if i in wanted]
        return sorted(found)

    def seen_prompts(self) -> set[str]:
        """The prompts that something was fitted or chosen on: those of train and validation."""
        return {text for split in _SEEN for _, text in self.prompts(split)}

    def _is_of(self, split: Split, prompt_ids: np.ndarray) -> np.ndarray:
        if split == "train":
            return ~np.isin(prompt_ids, np.concatenate(list(self._splits.values())))
        return np.isin(prompt_ids, self._splits[split])

    def batch(
        self, ids: Sequence[int] | np.ndarray, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Arguments of one call of the stock transformer, one row an id, in the order given.

        Latents and embeddings come in `dtype`. Timesteps, guidance and position ids stay float32, as the models cast
        them themselves. Text is padded to the longest of the batch, with a mask where any is padded.
        """
        rows = [self._states.row(position) for position in self._states.find(ids)]
        texts = [self._prompts.row(position) for position in self._prompts.find([r["embedding_id"] for r in rows])]
        names = [name for name in texts[0] if name not in ("prompt_id", "prompt")]
        prompt = collate([{name: unpack(text[name]) for name in names} for text in texts], self.adapter)
        batch: dict[str, Any] = {
            self.adapter.latents: torch.stack([unpack(row["latents"]) for row in rows]).to(device, dtype),
            self.adapter.timestep: torch.tensor([row["timestep"] for row in rows], device=device),
        }
        for name, value in prompt.items():
            if value is not None:
                value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            batch[name] = value
        for name, value in self.call.each.items():
            scalar = isinstance(value, int | float)
            batch[name] = (
                torch.full((len(rows),), float(value), device=device) if scalar else [_shapes(value)] * len(rows)
            )
        for name, value in self.call.whole.items():
            batch[name] = torch.tensor(value, device=device)
        return batch


def _shapes(value: Any) -> Any:
    """JSON's lists of numbers back as the tuples that the models take: `[[1, 4, 4]]` → `[(1, 4, 4)]`."""
    if isinstance(value, list):
        return tuple(value) if all(isinstance(v, int) for v in value) else [_shapes(v) for v in value]
    return value
