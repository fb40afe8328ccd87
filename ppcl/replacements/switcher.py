"""Plugging replacements in and out of a stock transformer: references move, tensors do not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ppcl.models import swap
from ppcl.models.teacher import Teacher
from ppcl.replacements.finetuned_selection import Tuned
from ppcl.replacements.io import Replacement, load, placed
from ppcl.replacements.plan import Entry, order

# Plans of a transformer whose views are kept, so that going back to one is no work.
_REMEMBERED = 64


class Switch:
    """The replacements of one teacher, and the switch between variants of any transformer loaded from it.

    A replacement is read when it is first wanted, once a device and dtype, and shared by all pipelines. A transformer is
    moved to its device and dtype before the first switch: what is unplugged would not move with it.
    """

    def __init__(self, teacher: Teacher, files: Mapping[Entry, Path], tuned: Tuned | None = None):
        """`files`: the replacements as distilled; `tuned`: the fine-tuned ones, and which plans take them."""
        self.teacher = teacher
        self.files = dict(files)
        self.tuned = tuned
        self._loaded: dict[tuple[Entry, bool, str, torch.dtype], Replacement] = {}
        self._standing: WeakKeyDictionary[nn.Module, OrderedDict[tuple[Entry, ...], dict[int, nn.Module]]] = (
            WeakKeyDictionary()
        )
        self._teachers_blocks: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()

    def module(self, entry: Entry, device: str, dtype: torch.dtype, tuned: bool = False) -> Replacement:
        key = (entry, tuned, str(device), dtype)
        if key not in self._loaded:
            self._loaded[key] = load((self.tuned.files if tuned else self.files)[entry], self.teacher, device, dtype)
        return self._loaded[key]

    def fine_tuned(self, plan: Iterable[Entry]) -> frozenset[Entry]:
        """The entries of a plan whose fine-tuned replacements it takes."""
        plan = list(plan)
        return frozenset(plan) & self.tuned.files.keys() if self.tuned and self.tuned.takes(plan) else frozenset()

    def in_memory(self, transformer: nn.Module, plan: Iterable[Entry]) -> bool:
        """Whether a plan can be switched to without reading a file."""
        plan, place = list(plan), (str(transformer.device), transformer.dtype)
        tuned = self.fine_tuned(plan)
        return all((entry, entry in tuned, *place) in self._loaded for entry in plan)

    def blocks(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        """The teacher's own blocks of a transformer, whatever is plugged into it."""
        if transformer not in self._teachers_blocks:
            self._teachers_blocks[transformer] = tuple(self.teacher.architecture.blocks(transformer))
        return self._teachers_blocks[transformer]

    def entries(self, transformer: nn.Module, plan: Iterable[Entry]) -> dict[int, nn.Module]:
        """What stands at which block number with a plan on."""
        key = tuple(sorted(plan, key=order))
        known = self._standing.setdefault(transformer, OrderedDict())
        if key not in known:
            tuned = self.fine_tuned(key)
            modules = {entry: self.module(entry, transformer.device, transformer.dtype, entry in tuned) for entry in key}
            known[key] = placed(self.teacher.architecture, transformer, self.blocks(transformer), modules, key)
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    def __call__(self, transformer: nn.Module, plan: Iterable[Entry]) -> None:
        """Leave the transformer with exactly this plan on; an empty one is the teacher itself."""
        everywhere = dict(enumerate(self.blocks(transformer)))
        swap(transformer, everywhere | self.entries(transformer, plan))
