"""What is learnt from the teacher: one lesson an entry of the plan, each on the teacher's own streams alone.

A lesson says which boundaries and inner tensors of the teacher it must see, where its closed-form start comes from, and
what its losses are. Nothing of one lesson enters another, so any of them share one pass over the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from ppcl.config.schema import Distillation
from ppcl.linalg import Statistics, affine_fit
from ppcl.models import Architecture, Streams, run_blocks
from ppcl.replacements import FfnMaps, NarrowFfn, TextProjectors, eliminate, text_run
from ppcl.replacements.block_view import at
from ppcl.replacements.plan import Entry, Ffn, Interval, TextRun
from ppcl.replacements.pruned_ffn import narrow_parts
from ppcl.replacements.student_block import Student, affine_map
from ppcl.training.captured import Seen, Wanted
from ppcl.training.losses import relative

# A loss as a sum over tokens, and what it is divided by, see `ppcl.training.losses`.
Part = tuple[torch.Tensor, float]
Loss = Callable[..., Part]






# What sums are called, the tokens `(n, p)`, and those that shall come of them `(n, q)`.
Fit = tuple[str, torch.Tensor, torch.Tensor]


class Lesson(Protocol):
    """`wanted`: what it trains on; `wanted_to_start`: what its closed-form start is computed from."""

    entry: Entry
    module: nn.Module
    wanted: Wanted
    wanted_to_start: Wanted

    def sums(self) -> dict[str, tuple[int, int]]:
        """The sums its start is computed from: by name, `p` and `q`. Lessons may name the same ones."""
        ...

    def fits(self, seen: Seen) -> Iterator[Fit]:
        """What one batch adds to them."""
        ...

    def start(self, sums: Mapping[str, Statistics], ridge: float) -> None:
        """Set the module to its closed-form start."""
        ...


class Trained(Lesson, Protocol):
    """A lesson that goes on from its start by gradient."""

    def losses(self, seen: Seen, loss_of: Loss) -> Mapping[str, Part]:
        """The losses by name, which add up; `loss_of` compares a block's output with the teacher's."""
        ...


class _Linear:
    """The start of a lesson whose closed form is one least-squares fit a linear map."""

    entry: Entry

    def linears(self) -> dict[str, nn.Linear]:
        """The maps that start in closed form, by name."""
        raise NotImplementedError

    def _pairs(self, seen: Seen) -> Iterator[Fit]:
        """By the maps' names."""
        raise NotImplementedError

    def sums(self) -> dict[str, tuple[int, int]]:
        return {f"{self.entry.name}.{n}": (linear.in_features, linear.out_features) for n, linear in self.linears().items()}

    def fits(self, seen: Seen) -> Iterator[Fit]:
        for name, x, y in self._pairs(seen):
            yield f"{self.entry.name}.{name}", x, y

    @torch.no_grad()
    def start(self, sums: Mapping[str, Statistics], ridge: float) -> None:
        for name, linear in self.linears().items():
            solved = affine_fit(sums[f"{self.entry.name}.{name}"], ridge)
            linear.weight.copy_(solved.weight)
            linear.bias.copy_(solved.bias)


class Depth(_Linear):
    """A student block for an interval (Eq. 6), all of a block or with fewer hidden units in its FFNs."""

    def __init__(
        self, architecture: Architecture, transformer: nn.Module, blocks: Mapping[int, nn.Module], entry: Interval,
        settings: Distillation,
    ):  # fmt: skip
        self.entry = entry
        source = sum(entry) // 2 if settings.start == "middle" else entry.first
        block = copy.deepcopy(blocks[source]).float()
        self.narrow = None
        if settings.student_hidden < 100 and architecture.parts_of(transformer, source, block):
            self.narrow = NarrowLesson(architecture, transformer, blocks[source], Ffn(source, settings.student_hidden))
            for path, module in narrow_parts(architecture, self.narrow.parts, self.narrow.module).items():
                block.set_submodule(path, module)
        affine = {}
        if settings.start == "affine":
            last = blocks[entry.last]
            streams = [n for n in Streams._fields if n == "img" or not getattr(last, "context_pre_only", False)]
            affine = {name: affine_map(_width(block)) for name in streams}
        self.module = Student(architecture, entry, source, block, affine)
        self.wanted = Wanted(frozenset({entry.first, entry.last + 1}))
        # What the teacher's own block `u` makes is the affine map's input for the fit alone; then the student's block makes it.
        self.wanted_to_start = Wanted(frozenset({entry.first + 1, entry.last + 1})) if affine else Wanted()
        if self.narrow:
            self.wanted_to_start |= self.narrow.wanted_to_start

    def linears(self) -> dict[str, nn.Linear]:
        return dict(self.module.affine)

    def sums(self) -> dict[str, tuple[int, int]]:
        return super().sums() | (self.narrow.sums() if self.narrow else {})

    def fits(self, seen: Seen) -> Iterator[Fit]:
        yield from super().fits(seen)
        if self.narrow:
            yield from self.narrow.fits(seen)

    def start(self, sums: Mapping[str, Statistics], ridge: float) -> None:
        super().start(sums, ridge)
        if self.narrow:
            # Its maps are those that stand in the student.
            self.narrow.start(sums, ridge)

    def _pairs(self, seen: Seen) -> Iterator[Fit]:
        """Block `u` on `X_{u-1}` gives the teacher's own `X_u`: the map is a fit between two boundaries."""
        if not self.module.affine:
            return
        before, after = seen.boundaries[self.entry.first + 1], seen.boundaries[self.entry.last + 1]
        for name in self.module.affine:
            x = seen.tokens(getattr(before, name), name)
            yield name, x, seen.tokens(getattr(after, name), name) - x

    def losses(self, seen: Seen, loss_of: Loss) -> dict[str, Part]:
        made = self.module.streams(seen.boundaries[self.entry.first], seen.context)
        target = seen.boundaries[self.entry.last + 1]
        return {
            name: loss_of(getattr(made, name), x, seen.mask(name)) for name, x in target._asdict().items() if x is not None
        }


class FfnLesson(_Linear):
    """Residual linear maps for a block's FFNs (Eq. 9): the block's output, and the maps' own (plain squared error)."""

    def __init__(self, architecture: Architecture, transformer: nn.Module, block: nn.Module, entry: Ffn):
        self.entry = entry
        self.module = FfnMaps.new(architecture.parts_of(transformer, entry.block, block), _width(block))
        self.wanted = self.wanted_to_start = Wanted(frozenset({entry.block + 1}), residuals=frozenset({entry.block}))

    def linears(self) -> dict[str, nn.Linear]:
        return dict(self.module)

    def _pairs(self, seen: Seen) -> Iterator[Fit]:
        for name in self.module:
            g, h = self._ends(seen, name)
            x = seen.tokens(g, name)
            yield name, x, seen.tokens(h, name) - x

    def losses(self, seen: Seen, loss_of: Loss) -> dict[str, Part]:
        parts = {}
        for name, linear in self.module.items():
            g, h = self._ends(seen, name)
            added = linear(g)
            parts[name] = loss_of(g + added, h, seen.mask(name))
            parts[f"{name}_ffn"] = relative(added, h - g, seen.mask(name))
        return parts

    def _ends(self, seen: Seen, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return seen.residuals[self.entry.block, name], getattr(seen.boundaries[self.entry.block + 1], name)


class NarrowLesson:
    """Fewer hidden units for a block's FFNs, in closed form alone: the least-squares choice of them, see `ppcl.replacements.pruned_ffn`.

    What is gained by training them is gained end to end, in fine-tuning.
    """

    def __init__(self, architecture: Architecture, transformer: nn.Module, block: nn.Module, entry: Ffn):
        self.entry, self.block = entry, block
        self.architecture = architecture
        self.parts = architecture.parts_of(transformer, entry.block, block)
        self.module = NarrowFfn.new(architecture, block, self.parts, entry.kept)
        self.wanted = Wanted()
        self.wanted_to_start = Wanted(hidden=frozenset({entry.block}))

    def sums(self) -> dict[str, tuple[int, int]]:
        # One Gram matrix for all widths of the block.
        return {f"hidden-{self.entry.block}-{stream}": (self._maps(stream)[1].in_features, 0) for stream in self.parts}

    def fits(self, seen: Seen) -> Iterator[Fit]:
        for stream in self.parts:
            x = seen.tokens(seen.hidden[self.entry.block, stream], stream)
            yield f"hidden-{self.entry.block}-{stream}", x, x[:, :0]

    def start(self, sums: Mapping[str, Statistics], ridge: float) -> None:
        for stream in self.parts:
            up, down = self._maps(stream)
            width = self.module.up[stream].out_features
            made = eliminate(sums[f"hidden-{self.entry.block}-{stream}"], down.weight, down.bias, [width], ridge)
            self.module.set(stream, up, made[width])

    def _maps(self, stream: str) -> tuple[nn.Linear, nn.Linear]:
        ffn = at(self.block, self.parts[stream].ffn)
        return at(ffn, self.architecture.ffn_up), at(ffn, self.architecture.ffn_down)


class TextLesson(_Linear):
    """Projectors for a run of text streams (Eq. 7, 8): every block's image output, and the projectors' own outputs."""

    def __init__(
        self, architecture: Architecture, transformer: nn.Module, blocks: Mapping[int, nn.Module], entry: TextRun, count: int
    ):
        """`count`: the teacher's blocks; behind the last one nothing reads the text stream."""
        self.entry = entry
        first = blocks[entry.first]
        self.module = TextProjectors(entry, _width(first), text_goes_on=entry.last < count - 1)
        own = {number: blocks[number] for number in entry.blocks}
        self.architecture = architecture
        self.placed = text_run(architecture, own, architecture.parts_of(transformer, entry.first, first), self.module)
        numbers = frozenset(entry.blocks)
        self.wanted = self.wanted_to_start = Wanted(frozenset(b + 1 for b in numbers), text_inputs=numbers)

    def linears(self) -> dict[str, nn.Linear]:
        maps = {f"z.{number}": linear for number, linear in self.module.z.items()}
        return maps if self.module.h is None else maps | {"h": self.module.h}

    def _pairs(self, seen: Seen) -> Iterator[Fit]:
        z = seen.tokens(seen.text_inputs[self.entry.first], "txt")
        for number in self.module.z:
            yield f"z.{number}", z, seen.tokens(seen.text_inputs[int(number)], "txt")
        if self.module.h is not None:
            h, after = (seen.tokens(seen.boundaries[b + 1].txt, "txt") for b in (self.entry.first, self.entry.last))
            yield "h", h, after - h

    def losses(self, seen: Seen, loss_of: Loss) -> dict[str, Part]:
        entry, mask = self.entry, seen.text_mask
        z, h = seen.text_inputs[entry.first], seen.boundaries[entry.first + 1].txt
        parts: dict[str, Part] = {}
        for number in entry.blocks[1:]:
            # The teacher's own image stream goes into every block of the run.
            streams = Streams(seen.boundaries[number].img, torch.cat([h, z], -1))
            made = run_blocks(self.architecture, [self.placed[number]], streams, seen.context)
            parts[f"img_{number:02d}"] = loss_of(made.img, seen.boundaries[number + 1].img, None)
            parts[f"z_{number:02d}"] = relative(self.module.z[str(number)](z), seen.text_inputs[number], mask)
        if self.module.h is not None:
            after = seen.boundaries[entry.last + 1].txt
            parts["txt"] = loss_of(self.module.after(h), after, mask)
            parts["h"] = relative(self.module.h(h), after - h, mask)
        return parts


def _width(block: nn.Module) -> int:
    return next(p.shape[-1] for p in block.parameters() if p.ndim == 2)


def new_lesson(
    architecture: Architecture, transformer: nn.Module, blocks: Mapping[int, nn.Module], entry: Entry, settings: Distillation,
    count: int,
) -> Lesson:  # fmt: skip
    """`blocks`: the teacher's own, of the entry at least, by number; `count`: how many the teacher has."""
    if isinstance(entry, Interval):
        return Depth(architecture, transformer, blocks, entry, settings)
    if isinstance(entry, Ffn) and entry.kept:
        return NarrowLesson(architecture, transformer, blocks[entry.block], entry)
    if isinstance(entry, Ffn):
        return FfnLesson(architecture, transformer, blocks[entry.block], entry)
    return TextLesson(architecture, transformer, blocks, entry, count)
