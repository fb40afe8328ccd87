"""A LoRA of the teacher on students, which stand for blocks that it changes.

A student began as block `u` of its interval, so that block's update goes onto the student's own maps, cut to the hidden
units that it kept. What the LoRA changes beyond that is fitted by least squares. With `x` the input that the teacher
with the LoRA on gives the interval, `T'` and `T` the interval with the LoRA and without, `S'` and `S` the student with
block `u`'s update and without, the fit is of `(T'(x) - S'(x)) - (T(x) - S(x))` on what the block of `S'` makes. It
becomes an update in low rank of the affine map behind the student. A student without one takes block `u`'s update alone
and stays a stock block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from ppcl.linalg import Moments
from ppcl.linalg.affine_fit import fit_affine
from ppcl.lora import AppliedLora, Lora, LoraLayer, LoraTransfer, StudentUpdate, block_prefixes, student_with_lora
from ppcl.models import FusedParts, Streams, embed, run_blocks
from ppcl.models.block_view import linear_at
from ppcl.models.fused_output import attended_inputs
from ppcl.models.placement import cache_of
from ppcl.replacements import Replacement
from ppcl.replacements.pruned_ffn import kept_units
from ppcl.replacements.replacement import TeacherStructure
from ppcl.replacements.student_block import StudentBlock
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.captured import CapturedActivations
from ppcl.training.data import Samples, spread_samples
from ppcl.training.teacher_segment import text_mask

if TYPE_CHECKING:
    from diffusers import ModelMixin

# Samples that the maps are fitted to, and of them in one pass.
SAMPLES = 256
_BATCH = 8
# Larger than that of distillation: the text has few tokens a sample.
_RIDGE = 1e-3
# The share of a fit's variance that low rank may leave out.
_LEFT_OUT = 0.01


class _Student(NamedTuple):
    """A student, the same with block `u`'s update `layers`, and by stream the moments of its fit."""

    plain: StudentBlock
    updated: StudentBlock
    layers: dict[str, LoraLayer]
    moments: dict[str, Moments]


@torch.no_grad()
def transfer_lora(
    switcher: VariantSwitcher,
    transformer: ModelMixin,
    plan: Sequence[Replacement],
    lora: Lora,
    transfer: LoraTransfer,
    samples: Callable[[], Samples],
) -> None:
    """Add to `transfer` what the students of a plan take of a LoRA, where it changes their intervals.

    `transformer`: the teacher's, whatever is plugged in; all its blocks are there if a student has affine maps.
    `samples()`: the calibration set, asked for such students only. The same samples give the same numbers.

    Cost with such students, on the device: 256 samples through the teacher up to the last interval, through the
    intervals once more, and through each student twice; `O(n d²)` for `n` tokens and `O(d³)` for each student and
    stream. Memory: the streams of 8 samples and a few matrices `(d, d)` on the device, `16 d²` bytes of moments for
    each student and stream on the host. Raises `UserError` where samples are missing.
    """
    structure = TeacherStructure(switcher.teacher.adapter, transformer, switcher.blocks(transformer))
    prefixes = block_prefixes(structure.adapter, transformer)
    fits: dict[Path, _Student] = {}
    for file, student in _changed_students(switcher, transformer, plan, lora, transfer).items():
        source = prefixes[student.source]
        layers = source_layers(structure, student, source, lora)
        if student.affine:
            fits[file] = _to_fit(student, file, layers, lora)
        else:
            transfer.students[file] = StudentUpdate(layers, _names(lora, [source]))
    if not fits:
        return
    calibration = samples()
    with switcher.outside_with(transformer, AppliedLora(lora)):
        blocks = switcher.blocks(transformer, AppliedLora(lora))
        ids = spread_samples(calibration.ids("train"), SAMPLES)
        _count_all(structure, blocks, list(fits.values()), calibration, ids)
    for file, fit in fits.items():
        maps = {
            f"affine.{stream}": low_rank_fit(_moved(moments, _device(transformer)))
            for stream, moments in fit.moments.items()
        }
        transfer.students[file] = StudentUpdate(fit.layers | maps, _of_interval(lora, prefixes, fit.plain))


def _changed_students(
    switcher: VariantSwitcher,
    transformer: ModelMixin,
    plan: Sequence[Replacement],
    lora: Lora,
    transfer: LoraTransfer,
) -> dict[Path, StudentBlock]:
    """By file, the students of a plan whose intervals a LoRA changes and which `transfer` does not know yet."""
    prefixes = block_prefixes(switcher.teacher.adapter, transformer)
    modules = switcher.modules(transformer, plan).items()
    students = {file: module for file, module in modules if isinstance(module, StudentBlock)}
    return {
        file: student
        for file, student in students.items()
        if file not in transfer.students and _of_interval(lora, prefixes, student)
    }


def _of_interval(lora: Lora, prefixes: Sequence[str], student: StudentBlock) -> tuple[str, ...]:
    """The LoRA's layers in a student's interval."""
    return _names(lora, [prefixes[number] for number in student.interval.blocks])


def _names(lora: Lora, prefixes: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in lora.layers if name.startswith(tuple(prefixes)))


def source_layers(structure: TeacherStructure, student: StudentBlock, prefix: str, lora: Lora) -> dict[str, LoraLayer]:
    """By path in a student, the update of the block that it began as, cut to the hidden units that it kept."""
    adapter, source = structure.adapter, student.source
    block = structure.blocks[source]
    own = {name.removeprefix(prefix): layer for name, layer in lora.layers.items() if name.startswith(prefix)}
    for where in structure.parts(source).values():
        up, down = adapter.ffn_maps(where)
        kept, whole = linear_at(student.block, up).weight, linear_at(block, up).weight
        if len(kept) == len(whole):
            continue
        if isinstance(where, FusedParts) and (layer := own.pop(where.fused, None)):
            # A narrow student has the output projection in two.
            attended = attended_inputs(block, where)
            own[where.out] = _cut(replace(layer, bias=None), columns=slice(0, attended))
            own[down] = _cut(layer, columns=slice(attended, None))
        units = kept_units(kept, whole).cpu()
        own |= {up: _cut(own[up], rows=units)} if up in own else {}
        own |= {down: _cut(own[down], columns=units)} if down in own else {}
    return {f"block.{path}": layer for path, layer in own.items()}


def _cut(
    layer: LoraLayer, rows: torch.Tensor | slice = slice(None), columns: torch.Tensor | slice = slice(None)
) -> LoraLayer:
    bias = None if layer.bias is None else layer.bias[rows]
    return LoraLayer(layer.down[:, columns], layer.up[rows], layer.scale, bias)


def low_rank_fit(moments: Moments, ridge: float = _RIDGE, left_out: float = _LEFT_OUT) -> LoraLayer:
    """Ridge least squares of Y `(n, q)` on X `(n, p)`, `y = up down x + bias`, in the least rank that does.

    The projection of the full map `W` onto the leading directions of the covariance of `W x`: reduced-rank regression
    (Izenman 1975), which leaves out at most the share `left_out` of the fitted variance. Cost: `O(p² q + q³)`.
    """
    affine = fit_affine(moments, ridge)
    weight = affine.weight
    values, directions = torch.linalg.eigh(weight @ moments.xx @ weight.T)
    energy, directions = values.clamp_min(0).flip(0), directions.flip(1)
    left = 1 - energy.cumsum(0) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    rank = min(int((left > left_out).sum()) + 1, len(energy))
    up = directions[:, :rank]
    down = up.T @ weight
    bias = moments.y_mean - up @ (down @ moments.x_mean)
    return LoraLayer(down.float().cpu(), up.float().cpu(), 1.0, bias.float().cpu())


def _moved(moments: Moments, device: torch.device) -> Moments:
    return Moments.from_tensors({name: tensor.to(device) for name, tensor in moments.to_tensors().items()})


def _device(transformer: ModelMixin) -> torch.device:
    """Where the transformer runs."""
    cache = cache_of(transformer)
    return cache.device if cache else transformer.device


def _to_fit(student: StudentBlock, file: Path, layers: dict[str, LoraLayer], lora: Lora) -> _Student:
    applied = AppliedLora(lora, transfer=LoraTransfer({file: StudentUpdate(layers, ())}))
    updated = cast(StudentBlock, student_with_lora(student, file, applied))
    shapes = {stream: linear_at(student.affine, stream).weight.shape for stream in student.affine}
    return _Student(student, updated, layers, {stream: Moments(p, q) for stream, (q, p) in shapes.items()})


def _count_all(
    structure: TeacherStructure,
    blocks: Sequence[nn.Module],
    students: Sequence[_Student],
    samples: Samples,
    ids: np.ndarray,
) -> None:
    """Count all samples for all students. `blocks`: the teacher's with the LoRA on."""
    adapter, transformer = structure.adapter, cast(Any, structure.transformer)
    cache = cache_of(transformer)
    if cache:
        for student in students:
            cache.attach(student.plain)
            cache.attach(student.updated)
    device = str(_device(transformer))
    first = {student.plain.interval.first: student for student in students}
    stop = max(student.plain.interval.last for student in students) + 1
    for start in range(0, len(ids), _BATCH):
        inputs = samples.batch(ids[start : start + _BATCH], device, transformer.dtype)
        streams, context = embed(transformer, inputs)
        captured = CapturedActivations(context=context, text_mask=text_mask(adapter, context))
        number = 0
        while number < stop:
            before, here = streams, first.get(number)
            end = here.plain.interval.last + 1 if here else number + 1
            streams = run_blocks(adapter, blocks[number:end], before, context, number)
            if here:
                _count(structure, here, captured, before, streams)
            number = end


def _count(
    structure: TeacherStructure, student: _Student, captured: CapturedActivations, before: Streams, changed: Streams
) -> None:
    """Count one batch: `x = before`, `T'(x) = changed`."""
    adapter, interval, context = structure.adapter, student.plain.interval, captured.context
    of_block, updated = _run(student.updated, before, context)
    _, plain = _run(student.plain, before, context)
    own = structure.blocks[interval.first : interval.last + 1]
    teacher = run_blocks(adapter, own, before, context, interval.first)
    one_stream = adapter.layout_at(structure.transformer, interval.first).txt is None

    def tokens(streams: Streams, name: str) -> torch.Tensor:
        return captured.all_tokens(streams) if one_stream else captured.tokens(getattr(streams, name), name)

    for name, moments in student.moments.items():
        wanted = tokens(changed, name) - tokens(teacher, name)
        made = tokens(updated, name) - tokens(plain, name)
        moments.update(tokens(of_block, name), wanted - made)


def _run(student: StudentBlock, streams: Streams, context: Mapping[str, Any]) -> tuple[Streams, Streams]:
    """What the student's block makes of its input, and what the student makes of that."""
    returned: list[Any] = []

    def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
        returned.append(output)

    handle = student.block.register_forward_hook(keep)
    try:
        made = student.streams(streams, context)
    finally:
        handle.remove()
    return student.adapter.from_returned(returned[0], streams), made
