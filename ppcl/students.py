"""A student: one block that stands for an interval of the teacher's, optionally followed by an affine map.

Saved as safetensors; the structure comes from the teacher's own block, so a file holds tensors and a few words only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ppcl.architecture import Architecture, Streams
from ppcl.errors import UserError
from ppcl.plan import Interval
from ppcl.teacher import Teacher


class Student(nn.Module):
    """Called exactly as a block is: keyword arguments in, the streams as the architecture returns them out.

    `block`: of the same kind as the teacher's block `source`. `affine`: by stream, a residual map `x + W x + b` behind
    the block, the closed-form start of a student; empty for the paper's start. PPCL, arXiv 2511.16156, Eq. 6.
    """

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(
        self,
        architecture: Architecture,
        interval: Interval,
        source: int,
        block: nn.Module,
        affine: dict[str, nn.Linear] | None = None,
    ):
        super().__init__()
        self.architecture = architecture
        self.interval = interval
        self.source = source
        self.block = block
        self.affine = nn.ModuleDict(affine or {})

    def forward(self, **arguments: Any) -> tuple:
        streams = self.architecture.from_returned(self.block(**arguments))
        mapped = {name: x + self.affine[name](x) for name, x in streams._asdict().items() if name in self.affine}
        return self.architecture.to_returned(streams._replace(**mapped))

    def streams(self, streams: Streams, context: dict[str, Any]) -> Streams:
        """The same on streams: `(X_{u-1}, context)` to the student's `X_v`."""
        return self.architecture.from_returned(self(**self.architecture.join(streams, context)))


def affine_map(width: int) -> nn.Linear:
    """A residual affine map that changes nothing yet."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def save_student(student: Student, path: Path) -> None:
    """Write a student's tensors; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "ppcl-student-1",
        "transformer": student.architecture.transformer,
        "first": str(student.interval.first),
        "last": str(student.interval.last),
        "source": str(student.source),
    }
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.detach().contiguous().cpu() for k, v in student.state_dict().items()}, partial, metadata)
    os.replace(partial, path)


def load_student(path: Path, teacher: Teacher, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Student:
    """Read a student. Raises `UserError` where the file is damaged or of another architecture."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the student {path} cannot be read as safetensors ({error}); run ppcl compress again") from None
    architecture = teacher.architecture
    if metadata.get("format") != "ppcl-student-1" or metadata.get("transformer") != architecture.transformer:
        raise UserError(
            f"{path} is no student of a {architecture.transformer}: it says format {metadata.get('format')!r}, "
            f"transformer {metadata.get('transformer')!r}"
        )
    try:
        interval, source = Interval(int(metadata["first"]), int(metadata["last"])), int(metadata["source"])
        block = architecture.blocks(teacher.empty_transformer())[source]
        affine = {}
        for name in Streams._fields:
            weight = tensors.get(f"affine.{name}.weight")
            if weight is not None:
                affine[name] = nn.Linear(*reversed(weight.shape), device="meta")
        student = Student(architecture, interval, source, block, affine)
        student.load_state_dict(tensors, strict=True, assign=True)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError):
        raise UserError(
            f"the student {path} does not fit the teacher in {teacher.folder}: its tensors are not those of one of the "
            "teacher's blocks; give the teacher it was made from, or run ppcl compress again"
        ) from None
    return student.to(device=device, dtype=dtype).requires_grad_(False).eval()
