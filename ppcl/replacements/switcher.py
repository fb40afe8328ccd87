"""Plugging replacements in and out of a stock transformer: references move, tensors do not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.lora import AppliedLora, Coverage, shares_on, student_with_lora, with_lora
from ppcl.models import swap
from ppcl.models.placement import cache_of
from ppcl.models.teacher import Teacher
from ppcl.models.weight_cache import tensor_bytes
from ppcl.replacements.assembly import block_map
from ppcl.replacements.finetuned_selection import FinetunedSelection
from ppcl.replacements.io import load_replacement, stored_sizes
from ppcl.replacements.registry import sort_key
from ppcl.replacements.replacement import Replacement

if TYPE_CHECKING:
    from diffusers import ModelMixin

# Plans of a transformer whose views are kept, so that going back to one is no work.
_REMEMBERED = 64
# LoRAs, with their strengths, whose numbers stay on the device.
_REMEMBERED_LORAS = 16


class _Key(NamedTuple):
    """What a replacement in memory is of, and where. `tuned`: the fine-tuned one."""

    replacement: Replacement
    tuned: bool
    device: str
    dtype: torch.dtype


class _Standing(NamedTuple):
    """What is plugged in."""

    plan: tuple[Replacement, ...]
    lora: AppliedLora | None


@dataclass
class _Teacher:
    """The teacher's own modules in one transformer: its `blocks`, and by path those `outside` that a LoRA changed.

    `with_lora`: views of them with a LoRA on.
    """

    blocks: tuple[nn.Module, ...]
    outside: dict[str, nn.Module] = field(default_factory=dict)
    with_lora: OrderedDict[AppliedLora, _Teacher] = field(default_factory=OrderedDict)


class VariantSwitcher:
    """The replacements of one teacher, and the switch between variants of any transformer loaded from it.

    A replacement is read when it is first wanted, once a device and dtype, and shared by all pipelines. A transformer
    is moved to its device and dtype, or placed (see `ppcl.models.placement`), before the first switch: what is
    unplugged would not move with it. Where blocks come and go, replacements do, too, and stay on the host.
    """

    def __init__(
        self,
        teacher: Teacher,
        files: Mapping[Replacement, Path],
        tuned: FinetunedSelection | None = None,
        limit: int | None = None,
    ):
        """`files`: the replacements as distilled; `tuned`: the fine-tuned ones, and which plans take them.

        `limit`: bytes of replacements in memory, the least recently used ones go beyond it; None: all stay.
        """
        self.teacher = teacher
        self.files = dict(files)
        self.tuned = tuned
        self.limit = limit
        self._loaded: OrderedDict[_Key, nn.Module] = OrderedDict()
        self._standing: WeakKeyDictionary[nn.Module, OrderedDict[_Standing, dict[int, nn.Module]]] = WeakKeyDictionary()
        self._teachers: WeakKeyDictionary[nn.Module, _Teacher] = WeakKeyDictionary()

    def add(self, replacement: Replacement, module: nn.Module, device: str, dtype: torch.dtype) -> None:
        """Have a module that is in no file; for transformers on this device and in this type."""
        self._loaded[_Key(replacement, False, str(device), dtype)] = module

    def module(self, replacement: Replacement, device: str, dtype: torch.dtype, tuned: bool = False) -> nn.Module:
        return self._module(_Key(replacement, tuned, str(device), dtype))

    def modules(self, transformer: ModelMixin, plan: Iterable[Replacement]) -> dict[Path, nn.Module]:
        """The modules of a plan in memory, by file, where and as a transformer takes them.

        Raises `UserError` where they are larger than the limit.
        """
        keys = self._keys(transformer, sorted(plan, key=sort_key))
        self._make_room(keys)
        return {self._file(key): self._module(key) for key in keys}

    def _module(self, key: _Key) -> nn.Module:
        if key not in self._loaded:
            self._loaded[key] = load_replacement(self._file(key), self.teacher, key.device, key.dtype)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _file(self, key: _Key) -> Path:
        files = self.tuned.files if key.tuned and self.tuned else self.files
        return files[key.replacement]

    @property
    def bytes_in_memory(self) -> int:
        return sum(map(tensor_bytes, self._loaded.values()))

    def finetuned(self, plan: Iterable[Replacement]) -> frozenset[Replacement]:
        """The fine-tuned replacements that a plan takes: of its own, and blocks that were trained with it."""
        return self.tuned.taken(plan) if self.tuned else frozenset()

    def plan_files(self, plan: Iterable[Replacement]) -> dict[Replacement, Path]:
        """The files of a plan's replacements, the fine-tuned ones where it takes them."""
        plan = set(plan)
        tuned = self.finetuned(plan)
        files = {one: self.tuned.files[one] if self.tuned and one in tuned else self.files[one] for one in plan | tuned}
        return {one: files[one] for one in sorted(files, key=sort_key)}

    def _keys(self, transformer: ModelMixin, plan: Sequence[Replacement]) -> list[_Key]:
        tuned = self.finetuned(plan)
        home = transformer.device if cache_of(transformer) is None else "cpu"
        on = [*plan, *sorted(tuned.difference(plan), key=sort_key)]
        return [_Key(replacement, replacement in tuned, str(home), transformer.dtype) for replacement in on]

    def in_memory(self, transformer: ModelMixin, plan: Iterable[Replacement]) -> bool:
        """Whether a plan can be switched to without reading a file."""
        return all(key in self._loaded for key in self._keys(transformer, list(plan)))

    def _own(self, transformer: ModelMixin) -> _Teacher:
        if transformer not in self._teachers:
            self._teachers[transformer] = _Teacher(tuple(self.teacher.adapter.blocks(transformer)))
        return self._teachers[transformer]

    def blocks(self, transformer: ModelMixin, lora: AppliedLora | None = None) -> tuple[nn.Module, ...]:
        """The teacher's own blocks of a transformer, whatever is plugged into it; with a LoRA, views of them."""
        own = self._own(transformer)
        return own.blocks if lora is None else self._with_lora(transformer, lora).blocks

    def _with_lora(self, transformer: ModelMixin, lora: AppliedLora) -> _Teacher:
        own, lora = self._own(transformer), replace(lora, transfer=None)
        if lora not in own.with_lora:
            home = transformer.device if cache_of(transformer) is None else "cpu"
            blocks, outside = with_lora(
                self.teacher.adapter, transformer, own.blocks, lora, home, transformer.dtype, own.outside
            )
            own.with_lora[lora] = _Teacher(tuple(blocks), dict(outside))
            if len(own.with_lora) > _REMEMBERED_LORAS:
                own.with_lora.popitem(last=False)
        own.with_lora.move_to_end(lora)
        return own.with_lora[lora]

    def replacements(
        self, transformer: ModelMixin, plan: Iterable[Replacement], lora: AppliedLora | None = None
    ) -> dict[int, nn.Module]:
        """The block at each block number with a plan on. Raises `UserError` for one larger than the limit."""
        wanted = _Standing(tuple(sorted(plan, key=sort_key)), lora)
        known = self._standing.setdefault(transformer, OrderedDict())
        keys = self._keys(transformer, wanted.plan)
        if wanted not in known:
            self._make_room(keys)
            modules = {key.replacement: self._module(key) for key in keys}
            if lora:
                modules = {
                    key.replacement: student_with_lora(modules[key.replacement], self._file(key), lora) for key in keys
                }
            blocks = self.blocks(transformer, lora)
            known[wanted] = block_map(self.teacher.adapter, transformer, blocks, modules, modules)
            if cache := cache_of(transformer):
                for module in known[wanted].values():
                    cache.attach(module)
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(wanted)
        for key in keys:
            self._loaded.move_to_end(key)
        return known[wanted]

    def __call__(self, transformer: ModelMixin, plan: Iterable[Replacement], lora: AppliedLora | None = None) -> None:
        """Leave the transformer with exactly this plan on, and this LoRA; an empty plan is the teacher itself."""
        plan = list(plan)
        everywhere = dict(enumerate(self.blocks(transformer, lora)))
        if self.limit is not None and not self.in_memory(transformer, plan):
            self._check_limit(self._keys(transformer, plan))
            # What is plugged in would stay in memory beside what is read now.
            swap(transformer, everywhere)
        swap(transformer, everywhere | self.replacements(transformer, plan, lora))
        self._set_outside(transformer, lora)

    def _set_outside(self, transformer: ModelMixin, lora: AppliedLora | None) -> None:
        """Put a LoRA's maps outside of the blocks in their places, and the teacher's own into all others."""
        own = self._own(transformer)
        changed = self._with_lora(transformer, lora).outside if lora else {}
        for path in changed:
            own.outside.setdefault(path, transformer.get_submodule(path))
        for path, module in (own.outside | changed).items():
            transformer.set_submodule(path, module)

    @contextmanager
    def outside_with(self, transformer: ModelMixin, lora: AppliedLora) -> Iterator[None]:
        """A LoRA on outside of the blocks alone, for the length of a `with` block, whatever is plugged in."""
        paths = {*self._own(transformer).outside, *self._with_lora(transformer, lora).outside}
        before = {path: transformer.get_submodule(path) for path in paths}
        self._set_outside(transformer, lora)
        try:
            yield
        finally:
            for path, module in before.items():
                transformer.set_submodule(path, module)

    def coverage(self, transformer: ModelMixin, plan: Iterable[Replacement], lora: AppliedLora) -> Coverage:
        """What of a LoRA is on with a plan."""
        blocks = dict(enumerate(self.blocks(transformer, lora))) | self.replacements(transformer, plan, lora)
        outside = self._with_lora(transformer, lora).outside
        on = shares_on([*blocks.values(), *outside.values()])
        return Coverage.of(lora.lora, on, lora.transferred(self.plan_files(plan).values()))

    def most_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that replacements take in memory at most: of all of them, or the limit."""
        files = [*self.files.values(), *(self.tuned.files.values() if self.tuned else ())]
        total = sum(sum(stored_sizes(path).values()) for path in files) * dtype.itemsize
        return total if self.limit is None else min(total, self.limit)

    def _size(self, key: _Key) -> int:
        """Bytes of a replacement in memory, from its file's header."""
        return sum(stored_sizes(self._file(key)).values()) * key.dtype.itemsize

    def _check_limit(self, keys: Sequence[_Key]) -> None:
        if self.limit is None or (size := sum(map(self._size, keys))) <= self.limit:
            return
        raise UserError(
            f"the plan {','.join(str(key.replacement) for key in keys if key.replacement.in_plans)} needs "
            f"{size / 1e9:.3g} GB of replacements, more than memory.replacements_gb, {self.limit / 1e9:.3g}; raise it"
        )

    def _make_room(self, keys: Sequence[_Key]) -> None:
        """Forget the least recently used replacements until those of a plan fit beside the others."""
        if self.limit is None:
            return
        self._check_limit(keys)
        left = self.limit - sum(map(self._size, keys))
        others = {key: tensor_bytes(module) for key, module in self._loaded.items() if key not in keys}
        for key in list(others):
            if sum(others.values()) <= left:
                return
            self._forget(key)
            del others[key]

    def _forget(self, key: _Key) -> None:
        """Let go of a replacement, and of the blocks that it is in."""
        module = self._loaded.pop(key)
        for transformer, known in self._standing.items():
            for standing in [one for one in known if key in self._keys(transformer, one.plan)]:
                del known[standing]
            if cache := cache_of(transformer):
                cache.forget(module)
