"""A LoRA on a variant: beside the linear maps that stay, cut for those that are smaller, and what is left out told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ppcl.lora.lora_file import Lora, LoraLayer
from ppcl.models import IdentityBlock, ModelAdapter
from ppcl.models.block_view import view
from ppcl.models.lora_linear import LoraLinear


@dataclass(frozen=True)
class StudentUpdate:
    """What one student takes of a LoRA at its trained strength.

    `layers`: by path in the student. `origins`: the LoRA's layers that they stand for.
    """

    layers: dict[str, LoraLayer] = field(repr=False)
    origins: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoraTransfer:
    """What students take of a LoRA; see `ppcl.training.lora_transfer`. `students`: by the file of a student."""

    students: dict[Path, StudentUpdate] = field(default_factory=dict)

    def origins(self, files: Iterable[Path]) -> list[str]:
        """The LoRA's layers that the students of these files take."""
        return [name for file in files if file in self.students for name in self.students[file].origins]


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA, and how strongly it is on: `scale` times what it was trained to. `transfer`: None leaves students out."""

    lora: Lora
    scale: float = 1.0
    transfer: LoraTransfer | None = None

    def transferred(self, files: Iterable[Path]) -> list[str] | None:
        """The LoRA's layers that the replacements of these files take; None where no transfer is wanted."""
        return None if self.transfer is None else self.transfer.origins(files)


@dataclass(frozen=True)
class Coverage:
    """What of a LoRA a variant takes.

    `share`: of the update's squared Frobenius norm. `lost`: the layers that are left out whole, `cut`: in part.
    `transferred`: those that students take; they count as none of these. None: no transfer was wanted.
    """

    share: float
    lost: list[str]
    cut: list[str]
    transferred: list[str] | None = None

    @classmethod
    def of(cls, lora: Lora, kept: Mapping[str, float], transferred: list[str] | None = None) -> Coverage:
        """`kept`: by layer, the share of its update that is on; see `shares_on`."""
        squares = {name: layer.norm**2 for name, layer in lora.layers.items()}
        total = sum(squares.values())
        share = sum(kept.get(name, 0.0) * square for name, square in squares.items()) / total if total else 1.0
        lost = [name for name in lora.layers if name not in kept and name not in set(transferred or ())]
        return cls(share, lost, [name for name, part in kept.items() if part < 1 - 1e-6], transferred)

    def __str__(self) -> str:
        whole = not (self.lost or self.cut or self.transferred)
        of_it = f"{100 * self.share:.1f} % of the LoRA is on, by the squared norm of its update"
        words = ["all of the LoRA is on" if whole else of_it]
        if self.transferred:
            words.append(f"transferred to students: {_few(self.transferred)}")
        elif self.transferred is not None:
            why = ": it changes no block that a student stands for" if whole else " to students"
            words.append(f"nothing to transfer{why}")
        if self.lost:
            words.append(f"left out: {_few(self.lost)}, which the variant replaces")
        if self.cut:
            words.append(f"in part: {_few(self.cut)}")
        return "; ".join(words)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def shares_on(modules: Iterable[nn.Module]) -> dict[str, float]:
    """By layer of the LoRA, the share of its update that is on in some modules."""
    kept: dict[str, float] = {}
    for module in modules:
        for one in module.modules():
            if isinstance(one, LoraLinear) and one.origin is not None:
                # A modulation may stand in parts.
                kept[one.origin] = min(1.0, kept.get(one.origin, 0.0) + one.share)
    return kept


def with_lora(
    adapter: ModelAdapter,
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    applied: AppliedLora,
    device: str | torch.device,
    dtype: torch.dtype,
    own: Mapping[str, nn.Module] | None = None,
) -> tuple[list[nn.Module], dict[str, LoraLinear]]:
    """The teacher's `blocks` with a LoRA beside their maps, as views, and by path the maps outside of blocks.

    Numbers are moved to the device and type, once for each call; the blocks' own are shared. `own`: by path, the maps
    outside of blocks where others stand in their places.
    """
    made = [
        block_with_lora(block, prefix, applied, device, dtype)
        for prefix, block in zip(block_prefixes(adapter, transformer), blocks, strict=True)
    ]
    return made, outside_with_lora(adapter, transformer, applied, device, dtype, own)


def outside_with_lora(
    adapter: ModelAdapter,
    transformer: nn.Module,
    applied: AppliedLora,
    device: str | torch.device,
    dtype: torch.dtype,
    own: Mapping[str, nn.Module] | None = None,
) -> dict[str, LoraLinear]:
    """By path, the maps outside of blocks with a LoRA beside them; see `with_lora`."""
    lists = tuple(f"{name}." for name in adapter.block_lists)
    left = [name for name in applied.lora.layers if not name.startswith(lists)]
    return {
        name: _beside((own or {}).get(name) or transformer.get_submodule(name), name, applied, device, dtype)
        for name in left
    }


def block_with_lora(
    block: nn.Module, prefix: str, applied: AppliedLora, device: str | torch.device, dtype: torch.dtype
) -> nn.Module:
    """A view of one block with a LoRA on. `prefix`: of its modules' names in the transformer.

    The place of a block that is not loaded stays as it is.
    """
    if isinstance(block, IdentityBlock):
        return block
    names = [name for name in applied.lora.layers if name.startswith(prefix)]
    paths = [name.removeprefix(prefix) for name in names]
    parts = {
        path: _beside(block.get_submodule(path), name, applied, device, dtype)
        for path, name in zip(paths, names, strict=True)
    }
    return view(block, parts) if parts else block


def student_with_lora(student: nn.Module, file: Path, applied: AppliedLora) -> nn.Module:
    """A view of the student of a file with what it takes of a LoRA; the student itself where that is nothing."""
    update = applied.transfer.students.get(file) if applied.transfer else None
    if update is None:
        return student
    tensor = next(student.parameters())
    parts = {
        path: _linear(student.get_submodule(path), layer, applied.scale, None, tensor.device, tensor.dtype)
        for path, layer in update.layers.items()
    }
    return view(student, parts)


def merged(module: nn.Module) -> nn.Module:
    """A view of a module whose LoRAs are part of its weights."""
    parts = {
        path: one.merged() for path, one in module.named_modules(remove_duplicate=False) if isinstance(one, LoraLinear)
    }
    return view(module, parts) if parts else module


def _beside(
    base: nn.Module, name: str, applied: AppliedLora, device: str | torch.device, dtype: torch.dtype
) -> LoraLinear:
    return _linear(base, applied.lora.layers[name], applied.scale, name, device, dtype)


def _linear(
    base: nn.Module,
    layer: LoraLayer,
    scale: float,
    origin: str | None,
    device: str | torch.device,
    dtype: torch.dtype,
) -> LoraLinear:
    down, up = (tensor.to(device, dtype) for tensor in (layer.down, layer.up))
    bias = None if layer.bias is None else layer.bias.to(device, dtype)
    return LoraLinear(base, down, up, layer.scale * scale, origin, bias)


def block_prefixes(adapter: ModelAdapter, transformer: nn.Module) -> list[str]:
    """By block number, the prefix of its modules' names."""
    return [
        f"{name}.{number - numbers.start}."
        for name, numbers in zip(adapter.block_lists, adapter.block_ranges(transformer), strict=True)
        for number in numbers
    ]
