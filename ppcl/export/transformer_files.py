"""The transformer's weights in files: planned from shapes alone, then read and written block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ppcl.export.destination import Destination
from ppcl.export.tensor_writer import SHARD_BYTES, TensorFile, shards_of, tensor_size
from ppcl.export.variant_blocks import RunningBlock, Tensors, VariantBlocks

# Called with the bytes written and the bytes there will be.
Progress = Callable[[int, int], None]
Convert = Callable[[RunningBlock | None, Tensors], Tensors]


def as_diffusers(group: RunningBlock | None, tensors: Tensors) -> Tensors:
    """Names as they are."""
    return tensors


@dataclass(frozen=True)
class WeightPlan:
    """`files`: by file name, the tensors in it, on the meta device, in the order in which they are read."""

    files: dict[str, Tensors]

    @classmethod
    def of(
        cls,
        blocks: VariantBlocks,
        dtype: torch.dtype,
        name: str,
        convert: Convert = as_diffusers,
        most: int = SHARD_BYTES,
    ) -> WeightPlan:
        """`name`: of the file, such as `model.safetensors`; with several they are numbered, as diffusers does it."""
        tensors: Tensors = {}
        for group in blocks.groups():
            tensors |= convert(group, blocks.shapes(group))
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        shards = shards_of(tensors, most)
        stem, suffix = Path(name).with_suffix(""), Path(name).suffix
        names = (
            [name]
            if len(shards) == 1
            else [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
        )
        return cls(dict(zip(names, shards, strict=True)))

    @property
    def bytes(self) -> int:
        return sum(map(tensor_size, self.tensors().values()))

    def tensors(self) -> Tensors:
        return {name: tensor for file in self.files.values() for name, tensor in file.items()}

    def weight_map(self) -> dict[str, str]:
        """By tensor, its file's own name, as an index of shards has it."""
        return {name: Path(file).name for file, tensors in self.files.items() for name in tensors}

    def check(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` where names or shapes are not those that the model's class expects."""
        ours = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if wrong := sorted(ours.items() ^ theirs.items()):
            raise ValueError(f"the exported model would not load: {wrong[:4]} differ")


def write_weights(
    blocks: VariantBlocks,
    plan: WeightPlan,
    dtype: torch.dtype,
    to: Destination,
    progress: Progress,
    convert: Convert = as_diffusers,
) -> None:
    """Read the variant part by part and write its files; memory is that of one part."""
    tensors = _tensors(blocks, dtype, convert)
    done, total = 0, plan.bytes
    for name, announced in plan.files.items():
        with TensorFile(to.path(name), announced, {"format": "pt"}) as file:
            while not file.complete:
                tensor_name, tensor = next(tensors)
                file.write(tensor_name, tensor)
                done += tensor_size(tensor)
                progress(done, total)
        to.finished(name)


def _tensors(blocks: VariantBlocks, dtype: torch.dtype, convert: Convert) -> Iterator[tuple[str, torch.Tensor]]:
    for group in blocks.groups():
        # In the order of the plan, which is that of the structure: files may hold them in another one.
        order = list(convert(group, blocks.shapes(group)))
        made = convert(group, blocks.tensors(group, dtype))
        for name in order:
            yield name, made[name]
