"""Distillation objectives: one for each replacement of the plan, each on the teacher's own streams alone.

An objective says which boundaries and inner tensors of the teacher it needs, what its closed-form initialisation is
computed from, and what its losses are. Nothing of one objective enters another, so all share one pass over the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import ClassVar, Protocol

import torch
from torch import nn

from ppcl.config.schema import Distillation
from ppcl.linalg import Moments, fit_affine
from ppcl.models import ModelAdapter, Streams, run_blocks
from ppcl.replacements import LinearFfn, PrunedFfn, TextProjectors, eliminate_units, text_run
from ppcl.replacements.block_view import submodule
from ppcl.replacements.plan import Ffn, Interval, Replacement, TextRun
from ppcl.replacements.pruned_ffn import pruned_parts
from ppcl.replacements.student_block import StudentBlock, affine_map
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.losses import Loss, LossTerm, relative

# The moments' name, the tokens `(n, p)` that are read, and those `(n, q)` that are predicted from them.
MomentUpdate = tuple[str, torch.Tensor, torch.Tensor]


class Gradient(Enum):
    """Whether an objective is trained by gradient."""

    NEEDED = "needed"  # the initialisation is a start
    OPTIONAL = "optional"  # the initialisation is the least-squares optimum of the map alone
    NONE = "none"  # there are no losses


class DistillationObjective(Protocol):
    """What every replacement has: a module, and a closed-form initialisation of it.

    `capture`: what its losses are computed from; `init_capture`: what its closed-form initialisation is computed from.
    `gradient`: whether it needs training by gradient, is at its optimum without it, or has no losses at all.
    """

    replacement: Replacement
    module: nn.Module
    capture: CaptureSpec
    init_capture: CaptureSpec
    gradient: ClassVar[Gradient]

    def moments(self) -> dict[str, tuple[int, int]]:
        """The moments that the initialisation is computed from: by name, `p` and `q`. Objectives may share some."""
        ...

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        """What one batch adds to the moments."""
        ...

    def initialize(self, moments: Mapping[str, Moments], ridge: float) -> None:
        """Set the module to its closed-form initialisation."""
        ...


class GradientObjective(DistillationObjective, Protocol):
    """An objective that can go on from its initialisation by gradient."""

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> Mapping[str, LossTerm]:
        """The losses by name, which add up; `loss_of` compares a block's output with the teacher's."""
        ...


class _LeastSquaresInit:
    """The initialisation of an objective whose closed form is one least-squares fit for each linear map."""

    replacement: Replacement

    def linears(self) -> dict[str, nn.Linear]:
        """The maps that start in closed form, by name."""
        raise NotImplementedError

    def _pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        """By the maps' names."""
        raise NotImplementedError

    def moments(self) -> dict[str, tuple[int, int]]:
        return {
            f"{self.replacement.name}.{n}": (linear.in_features, linear.out_features)
            for n, linear in self.linears().items()
        }

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for name, x, y in self._pairs(captured):
            yield f"{self.replacement.name}.{name}", x, y

    @torch.no_grad()
    def initialize(self, moments: Mapping[str, Moments], ridge: float) -> None:
        for name, linear in self.linears().items():
            solved = fit_affine(moments[f"{self.replacement.name}.{name}"], ridge)
            linear.weight.copy_(solved.weight)
            linear.bias.copy_(solved.bias)


class StudentObjective(_LeastSquaresInit):
    """A student block for an interval (Eq. 6), all of a block or with fewer hidden units in its FFNs."""

    gradient = Gradient.NEEDED

    def __init__(
        self,
        adapter: ModelAdapter,
        transformer: nn.Module,
        blocks: Mapping[int, nn.Module],
        replacement: Interval,
        settings: Distillation,
    ):
        self.replacement = replacement
        source = (replacement.first + replacement.last) // 2 if settings.init == "middle" else replacement.first
        block = copy.deepcopy(blocks[source]).float()
        self.narrow = None
        if settings.student_keep_percent < 100 and adapter.parts_of(transformer, source, block):
            self.narrow = PrunedFfnObjective(
                adapter, transformer, blocks[source], Ffn(source, settings.student_keep_percent)
            )
            for path, module in pruned_parts(adapter, self.narrow.parts, self.narrow.module).items():
                block.set_submodule(path, module)
        affine = {}
        if settings.init == "affine":
            last = blocks[replacement.last]
            streams = [n for n in Streams._fields if n == "img" or not getattr(last, "context_pre_only", False)]
            affine = {name: affine_map(_width(block)) for name in streams}
        self.module = StudentBlock(adapter, replacement, source, block, affine)
        self.capture = CaptureSpec(frozenset({replacement.first, replacement.last + 1}))
        # What the teacher's own block `u` makes is the affine map's input for the fit alone; then the student's block makes it.
        self.init_capture = (
            CaptureSpec(frozenset({replacement.first + 1, replacement.last + 1})) if affine else CaptureSpec()
        )
        if self.narrow:
            self.init_capture |= self.narrow.init_capture

    def linears(self) -> dict[str, nn.Linear]:
        return dict(self.module.affine)

    def moments(self) -> dict[str, tuple[int, int]]:
        return super().moments() | (self.narrow.moments() if self.narrow else {})

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        yield from super().updates(captured)
        if self.narrow:
            yield from self.narrow.updates(captured)

    def initialize(self, moments: Mapping[str, Moments], ridge: float) -> None:
        super().initialize(moments, ridge)
        if self.narrow:
            # Its maps are those that stand in the student.
            self.narrow.initialize(moments, ridge)

    def _pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        """Block `u` on `X_{u-1}` gives the teacher's own `X_u`: the map is a fit between two boundaries."""
        if not self.module.affine:
            return
        before, after = captured.boundaries[self.replacement.first + 1], captured.boundaries[self.replacement.last + 1]
        for name in self.module.affine:
            x = captured.tokens(getattr(before, name), name)
            yield name, x, captured.tokens(getattr(after, name), name) - x

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> dict[str, LossTerm]:
        made = self.module.streams(captured.boundaries[self.replacement.first], captured.context)
        target = captured.boundaries[self.replacement.last + 1]
        return {
            name: loss_of(getattr(made, name), x, captured.mask(name))
            for name, x in target._asdict().items()
            if x is not None
        }


class LinearFfnObjective(_LeastSquaresInit):
    """Residual linear maps for a block's FFNs (Eq. 9): the block's output, and the maps' own (plain squared error)."""

    gradient = Gradient.OPTIONAL

    def __init__(self, adapter: ModelAdapter, transformer: nn.Module, block: nn.Module, replacement: Ffn):
        self.replacement = replacement
        self.module = LinearFfn.new(adapter.parts_of(transformer, replacement.block, block), _width(block))
        self.capture = self.init_capture = CaptureSpec(
            frozenset({replacement.block + 1}), residuals=frozenset({replacement.block})
        )

    def linears(self) -> dict[str, nn.Linear]:
        return dict(self.module)

    def _pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for name in self.module:
            g, h = self._ends(captured, name)
            x = captured.tokens(g, name)
            yield name, x, captured.tokens(h, name) - x

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> dict[str, LossTerm]:
        parts = {}
        for name, linear in self.module.items():
            g, h = self._ends(captured, name)
            added = linear(g)
            parts[name] = loss_of(g + added, h, captured.mask(name))
            parts[f"{name}_ffn"] = relative(added, h - g, captured.mask(name))
        return parts

    def _ends(self, captured: CapturedActivations, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return captured.residuals[self.replacement.block, name], getattr(
            captured.boundaries[self.replacement.block + 1], name
        )


class PrunedFfnObjective:
    """Fewer hidden units for a block's FFNs, in closed form alone: the least-squares choice of them, see `ppcl.replacements.pruned_ffn`.

    What is gained by training them is gained end to end, in fine-tuning.
    """

    gradient = Gradient.NONE

    def __init__(self, adapter: ModelAdapter, transformer: nn.Module, block: nn.Module, replacement: Ffn):
        self.replacement, self.block = replacement, block
        self.adapter = adapter
        self.parts = adapter.parts_of(transformer, replacement.block, block)
        self.module = PrunedFfn.new(adapter, block, self.parts, replacement.keep_percent)
        self.capture = CaptureSpec()
        self.init_capture = CaptureSpec(hidden=frozenset({replacement.block}))

    def moments(self) -> dict[str, tuple[int, int]]:
        # One Gram matrix for all widths of the block.
        return {
            f"hidden-{self.replacement.block}-{stream}": (self._maps(stream)[1].in_features, 0) for stream in self.parts
        }

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for stream in self.parts:
            x = captured.tokens(captured.hidden[self.replacement.block, stream], stream)
            yield f"hidden-{self.replacement.block}-{stream}", x, x[:, :0]

    def initialize(self, moments: Mapping[str, Moments], ridge: float) -> None:
        for stream in self.parts:
            up, down = self._maps(stream)
            width = self.module.up[stream].out_features
            made = eliminate_units(
                moments[f"hidden-{self.replacement.block}-{stream}"], down.weight, down.bias, [width], ridge
            )
            self.module.set(stream, up, made[width])

    def _maps(self, stream: str) -> tuple[nn.Linear, nn.Linear]:
        ffn = submodule(self.block, self.parts[stream].ffn)
        return submodule(ffn, self.adapter.ffn_up), submodule(ffn, self.adapter.ffn_down)


class TextProjectorsObjective(_LeastSquaresInit):
    """Projectors for a run of text streams (Eq. 7, 8): every block's image output, and the projectors' own outputs."""

    gradient = Gradient.OPTIONAL

    def __init__(
        self,
        adapter: ModelAdapter,
        transformer: nn.Module,
        blocks: Mapping[int, nn.Module],
        replacement: TextRun,
        count: int,
    ):
        """`count`: the teacher's blocks; behind the last one nothing reads the text stream."""
        self.replacement = replacement
        first = blocks[replacement.first]
        self.module = TextProjectors(replacement, _width(first), text_goes_on=replacement.last < count - 1)
        own = {number: blocks[number] for number in replacement.blocks}
        self.adapter = adapter
        self.placed = text_run(adapter, own, adapter.parts_of(transformer, replacement.first, first), self.module)
        numbers = frozenset(replacement.blocks)
        self.capture = self.init_capture = CaptureSpec(frozenset(b + 1 for b in numbers), text_inputs=numbers)

    def linears(self) -> dict[str, nn.Linear]:
        maps = {f"z.{number}": linear for number, linear in self.module.z.items()}
        return maps if self.module.h is None else maps | {"h": self.module.h}

    def _pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        z = captured.tokens(captured.text_inputs[self.replacement.first], "txt")
        for number in self.module.z:
            yield f"z.{number}", z, captured.tokens(captured.text_inputs[int(number)], "txt")
        if self.module.h is not None:
            h, after = (
                captured.tokens(captured.boundaries[b + 1].txt, "txt")
                for b in (self.replacement.first, self.replacement.last)
            )
            yield "h", h, after - h

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> dict[str, LossTerm]:
        replacement, mask = self.replacement, captured.text_mask
        z, h = captured.text_inputs[replacement.first], captured.boundaries[replacement.first + 1].txt
        parts: dict[str, LossTerm] = {}
        for number in replacement.blocks[1:]:
            # The teacher's own image stream goes into every block of the run.
            streams = Streams(captured.boundaries[number].img, torch.cat([h, z], -1))
            made = run_blocks(self.adapter, [self.placed[number]], streams, captured.context)
            parts[f"img_{number:02d}"] = loss_of(made.img, captured.boundaries[number + 1].img, None)
            parts[f"z_{number:02d}"] = relative(self.module.z[str(number)](z), captured.text_inputs[number], mask)
        if self.module.h is not None:
            after = captured.boundaries[replacement.last + 1].txt
            parts["txt"] = loss_of(self.module.after(h), after, mask)
            parts["h"] = relative(self.module.h(h), after - h, mask)
        return parts


def _width(block: nn.Module) -> int:
    return next(p.shape[-1] for p in block.parameters() if p.ndim == 2)


def new_objective(
    adapter: ModelAdapter,
    transformer: nn.Module,
    blocks: Mapping[int, nn.Module],
    replacement: Replacement,
    settings: Distillation,
    count: int,
) -> DistillationObjective:
    """`blocks`: the teacher's own, of the replacement at least, by number; `count`: how many the teacher has."""
    if isinstance(replacement, Interval):
        return StudentObjective(adapter, transformer, blocks, replacement, settings)
    if isinstance(replacement, Ffn) and replacement.keep_percent:
        return PrunedFfnObjective(adapter, transformer, blocks[replacement.block], replacement)
    if isinstance(replacement, Ffn):
        return LinearFfnObjective(adapter, transformer, blocks[replacement.block], replacement)
    return TextProjectorsObjective(adapter, transformer, blocks, replacement, count)
