"""Plugging replacements in and out of a stock transformer: references move, tensors do not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ppcl.models import swap
from ppcl.models.teacher import Teacher
from ppcl.replacements.assembly import block_map
from ppcl.replacements.finetuned_selection import FinetunedSelection
from ppcl.replacements.io import load_replacement
from ppcl.replacements.registry import sort_key
from ppcl.replacements.replacement import Replacement

if TYPE_CHECKING:
    from diffusers import ModelMixin

# Plans of a transformer whose views are kept, so that going back to one is no work.
_REMEMBERED = 64


class VariantSwitcher:
    """The replacements of one teacher, and the switch between variants of any transformer loaded from it.

    A replacement is read when it is first wanted, once a device and dtype, and shared by all pipelines. A transformer
    is moved to its device and dtype before the first switch: what is unplugged would not move with it.
    """

    def __init__(self, teacher: Teacher, files: Mapping[Replacement, Path], tuned: FinetunedSelection | None = None):
        """`files`: the replacements as distilled; `tuned`: the fine-tuned ones, and which plans take them."""
        self.teacher = teacher
        self.files = dict(files)
        self.tuned = tuned
        self._loaded: dict[tuple[Replacement, bool, str, torch.dtype], nn.Module] = {}
        self._standing: WeakKeyDictionary[nn.Module, OrderedDict[tuple[Replacement, ...], dict[int, nn.Module]]] = (
            WeakKeyDictionary()
        )
        self._teachers_blocks: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()

    def module(self, replacement: Replacement, device: str, dtype: torch.dtype, tuned: bool = False) -> nn.Module:
        key = (replacement, tuned, str(device), dtype)
        if key not in self._loaded:
            files = self.tuned.files if tuned and self.tuned else self.files
            self._loaded[key] = load_replacement(files[replacement], self.teacher, device, dtype)
        return self._loaded[key]

    def finetuned(self, plan: Iterable[Replacement]) -> frozenset[Replacement]:
        """The replacements of a plan whose fine-tuned replacements it takes."""
        plan = frozenset(plan)
        if self.tuned is None or not self.tuned.uses_finetuned(plan):
            return frozenset()
        return plan & self.tuned.files.keys()

    def in_memory(self, transformer: ModelMixin, plan: Iterable[Replacement]) -> bool:
        """Whether a plan can be switched to without reading a file."""
        plan, place = list(plan), (str(transformer.device), transformer.dtype)
        tuned = self.finetuned(plan)
        return all((replacement, replacement in tuned, *place) in self._loaded for replacement in plan)

    def blocks(self, transformer: ModelMixin) -> tuple[nn.Module, ...]:
        """The teacher's own blocks of a transformer, whatever is plugged into it."""
        if transformer not in self._teachers_blocks:
            self._teachers_blocks[transformer] = tuple(self.teacher.adapter.blocks(transformer))
        return self._teachers_blocks[transformer]

    def replacements(self, transformer: ModelMixin, plan: Iterable[Replacement]) -> dict[int, nn.Module]:
        """The block at each block number with a plan on."""
        key = tuple(sorted(plan, key=sort_key))
        known = self._standing.setdefault(transformer, OrderedDict())
        if key not in known:
            tuned = self.finetuned(key)
            modules = {
                replacement: self.module(replacement, transformer.device, transformer.dtype, replacement in tuned)
                for replacement in key
            }
            known[key] = block_map(self.teacher.adapter, transformer, self.blocks(transformer), modules, key)
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    def __call__(self, transformer: ModelMixin, plan: Iterable[Replacement]) -> None:
        """Leave the transformer with exactly this plan on; an empty one is the teacher itself."""
        everywhere = dict(enumerate(self.blocks(transformer)))
        swap(transformer, everywhere | self.replacements(transformer, plan))
