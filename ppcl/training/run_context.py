"""Where a training runs: this process's ranks and device, its folders, and who hears of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.progress import ProgressReport, no_report

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class RunContext:
    """One rank of a training; by default the only one, on the CPU.

    `folder`: where the finished files are written. `checkpoints`: where a stopped run left the files it resumes from.
    `seed`: decides the order of samples, the drawn plans and the noise. `device`: as `torch.device` takes it.
    `report_damaged`: hears of checkpoints that cannot be resumed from.
    """

    folder: Path
    checkpoints: Path
    seed: int = 0
    device: str = "cpu"
    dims: ParallelDims = field(default_factory=ParallelDims)
    report: ProgressReport = no_report
    report_damaged: Callable[[Path], None] = lambda path: None

    def dtype(self, precision: Precision) -> torch.dtype:
        """The teacher's dtype; `auto` is bfloat16 on GPUs and float32 on CPUs."""
        on_gpu = self.device.startswith("cuda")
        return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and on_gpu) else torch.float32
