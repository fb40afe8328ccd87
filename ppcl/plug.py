"""Plugging students in and out of a stock transformer: references move, tensors do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ppcl.architecture import swap
from ppcl.plan import Interval
from ppcl.students import Student, load_student
from ppcl.teacher import Teacher
from ppcl.variants import entries


class Switch:
    """The students of one teacher, and the switch between variants of any transformer loaded from it.

    A student is read when it is first wanted, once a device and dtype, and shared by all pipelines. A transformer is
    moved to its device and dtype before the first switch: what is unplugged would not move with it.
    """

    def __init__(self, teacher: Teacher, students: Mapping[Interval, Path]):
        self.teacher = teacher
        self.paths = dict(students)
        self._loaded: dict[tuple[Interval, str, torch.dtype], Student] = {}
        self._teachers_blocks: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()

    def student(self, interval: Interval, device: str, dtype: torch.dtype) -> Student:
        key = (interval, str(device), dtype)
        if key not in self._loaded:
            self._loaded[key] = load_student(self.paths[interval], self.teacher, device, dtype)
        return self._loaded[key]

    def __call__(self, transformer: nn.Module, intervals: Iterable[Interval]) -> None:
        """Leave the transformer with exactly these intervals on; none of them is the teacher itself."""
        architecture = self.teacher.architecture
        if transformer not in self._teachers_blocks:
            self._teachers_blocks[transformer] = tuple(architecture.blocks(transformer))
        intervals = list(intervals)
        students = {i: self.student(i, transformer.device, transformer.dtype) for i in intervals}
        everywhere = dict(enumerate(self._teachers_blocks[transformer]))
        swap(transformer, everywhere | entries(architecture, students, intervals))
