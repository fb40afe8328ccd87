"""A variant as a model of its own: the blocks that run, renumbered, each built alone from the teacher's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.lora import (
    AppliedLora,
    Coverage,
    block_with_lora,
    merged,
    outside_with_lora,
    shares_on,
    student_with_lora,
)
from ppcl.models import BlockParts, FusedParts, IdentityBlock, ModelAdapter, Parts
from ppcl.models.fused_output import FusedOutput
from ppcl.models.pruned_transformer import pruned_class
from ppcl.models.teacher import Teacher
from ppcl.replacements import LowRankModulation, Replacement, TunedBlock
from ppcl.replacements.assembly import block_map
from ppcl.replacements.io import empty_replacement, load_replacement
from ppcl.replacements.low_rank_modulation import ModulationBasis
from ppcl.replacements.modulation import SCALE1, SHIFT1
from ppcl.replacements.replacement import TeacherStructure
from ppcl.replacements.student_block import StudentBlock
from ppcl.replacements.text_projectors import RunBlock, RunStart

if TYPE_CHECKING:
    from diffusers import ModelMixin

Tensors = dict[str, torch.Tensor]

_DUAL_ATTENTION = "dual_attention_layers"


class RunningBlock(NamedTuple):
    """A running block: its number in the teacher, and its list and position in the exported model."""

    number: int
    block_list: str
    position: int

    @property
    def prefix(self) -> str:
        return f"{self.block_list}.{self.position}."


class VariantBlocks:
    """The model that a plan describes. `files`: the plan's replacements. `lora`: becomes part of the weights.

    Structure comes from headers alone. `tensors` reads one block at a time: memory is that of the largest block, of its
    replacements, and of the embedders and the head.
    """

    def __init__(self, teacher: Teacher, files: Mapping[Replacement, Path], lora: AppliedLora | None = None):
        self.teacher, self.adapter, self.files, self.lora = teacher, teacher.adapter, dict(files), lora
        if (why := self.adapter.notes.get("export")) and any(one.removed for one in self.files):
            raise UserError(f"a {self.adapter.name} with fewer blocks cannot be exported: {why}; generate with ppcl")
        # By layer of the LoRA, the share of it that is part of what was read so far.
        self._merged: dict[str, float] = {}
        # The replacements of the block that was read last.
        self._held: dict[tuple[Replacement, torch.dtype], nn.Module] = {}
        # Without gradients: modulations of a block in training stay whole in low rank.
        self.structure = TeacherStructure(self.adapter, teacher.empty_transformer().requires_grad_(False))
        self._empty = {one: empty_replacement(path, teacher) for one, path in self.files.items()}
        standing = block_map(
            self.adapter, self.structure.transformer, self.structure.blocks, self._empty, list(self.files)
        )
        self._blocks = {number: standing.get(number, block) for number, block in enumerate(self.structure.blocks)}
        self.places: list[RunningBlock] = []
        ranges = self.adapter.block_ranges(self.structure.transformer)
        for name, numbers in zip(self.adapter.block_lists, ranges, strict=True):
            running = [n for n in numbers if not isinstance(self._blocks[n], IdentityBlock)]
            self.places += [RunningBlock(number, name, index) for index, number in enumerate(running)]

    # --- What the configuration says ---

    @cached_property
    def entries(self) -> dict[RunningBlock, dict[str, Any]]:
        """By running block, its entry as `ppcl.models.pruned_transformer` describes it; `teacher` is always there."""
        entries = {}
        for place in self.places:
            entry: dict[str, Any] = {"teacher": str(place.number)}
            for one, module in self._empty.items():
                if place.number in one.blocks:
                    entry |= one.exported(module, place.number, self.structure)
            if self.text_is_dropped(place):
                entry["streams"] = ["img"]
            entries[place] = entry
        return entries

    @property
    def modulation_rank(self) -> int | None:
        basis = cast(ModulationBasis | None, self._empty.get(LowRankModulation()))
        return None if basis is None else basis.directions.shape[1]

    def obstacles(self) -> list[str]:
        """What keeps stock classes from loading the variant, each as a phrase; empty where they do."""
        found: dict[str, None] = {}
        for entry in self.entries.values():
            if "affine" in entry:
                found["students that end in an affine map"] = None
            if "hidden" in entry:
                found["FFNs with fewer hidden units"] = None
            if "heads" in entry:
                found["attention with fewer heads"] = None
            if "linear_ffn" in entry:
                found["linear FFNs"] = None
            if "text_run" in entry:
                found["text runs"] = None
        if self.modulation_rank is not None:
            found["modulations in low rank"] = None
        return list(found)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `transformer/config.json`."""
        config = dict(self.teacher.config())
        for name, key in zip(self.adapter.block_lists, self.adapter.layer_counts, strict=True):
            config[key] = sum(place.block_list == name for place in self.places)
        if _DUAL_ATTENTION in config:
            config[_DUAL_ATTENTION] = [p.position for p in self.places if self._has_dual_attention(p)]
        if self.obstacles():
            config["_class_name"] = self.class_name
            config["pruned"] = self._pruned()
        return config

    @property
    def class_name(self) -> str:
        return f"Pruned{self.adapter.transformer}" if self.obstacles() else self.adapter.transformer

    def _pruned(self) -> dict[str, Any]:
        """See `ppcl.models.pruned_transformer`."""
        adapter = self.adapter
        parts = {
            name: {stream: _described(adapter, where) for stream, where in streams.items()}
            for name, streams in adapter.parts.items()
        }
        lists = {
            name: [entry for place, entry in self.entries.items() if place.block_list == name]
            for name in adapter.block_lists
        }
        return {
            "lists": lists,
            "parts": parts,
            "attention": adapter.attention,
            "img": adapter.img,
            "txt": adapter.txt,
            "returns": list(adapter.returns),
            "width": self._width(),
            "modulation_rank": self.modulation_rank,
        }

    def _width(self) -> int:
        """That of the streams."""
        return self.adapter.width(self.structure.blocks[0])

    def _own(self, number: int) -> nn.Module:
        """The block with the stock forward at a number, on the meta device."""
        block = self._blocks[number]
        return block.block if isinstance(block, StudentBlock | RunStart | RunBlock) else block

    def _has_dual_attention(self, place: RunningBlock) -> bool:
        return bool(getattr(self._own(place.number), "use_dual_attention", False))

    def text_is_dropped(self, place: RunningBlock) -> bool:
        """Whether the place is one where the stock model has no text output, and the teacher's block there none."""
        last = [p for p in self.places if p.block_list == place.block_list][-1]
        ends = self.structure.blocks[-1]
        return place == last and place.block_list == self.adapter.block_lists[-1] and _drops_text(ends)

    # --- Tensors ---

    def empty_model(self) -> ModelMixin:
        """The exported model on the meta device, as its own class builds it."""
        import diffusers
        from accelerate import init_empty_weights

        stock = self.adapter.transformer
        model_class: Any = pruned_class(stock) if self.obstacles() else getattr(diffusers, stock)
        with init_empty_weights():
            return model_class.from_config(self.config).eval()

    def groups(self) -> list[RunningBlock | None]:
        """The parts that are read one after the other: None is what lies outside of the blocks."""
        return [None, *self.places]

    def shapes(self, group: RunningBlock | None) -> Tensors:
        """The tensors of one part on the meta device, by name."""
        if group is not None:
            return self._named(group, self._blocks[group.number], self._student(group, self._empty))
        prefixes = tuple(f"{name}." for name in self.adapter.block_lists)
        state = self.structure.transformer.state_dict()
        outside = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
        return outside | _basis(self._empty)

    def tensors(self, group: RunningBlock | None, dtype: torch.dtype) -> Tensors:
        """The tensors of one part, by name. Raises `UserError` where a file cannot be read."""
        if group is None:
            wanted: list[Replacement] = [one for one in self.files if isinstance(one, LowRankModulation)]
            outside = self.teacher.transformer(set(), dtype=dtype)
            if self.lora:
                changed = outside_with_lora(self.adapter, outside, self.lora, "cpu", dtype)
                self._merged |= shares_on(changed.values())
                for path, module in changed.items():
                    outside.set_submodule(path, module.merged())
            return outside.state_dict() | _basis(self._loaded(wanted, dtype))
        wanted = [one for one in self.files if group.number in one.blocks or not one.blocks]
        modules = self._loaded(wanted, dtype)
        blocks = list(self.structure.blocks)
        # A tuned block has all weights that the plan runs; a LoRA is found beside the teacher's own.
        whole = any(isinstance(one, TunedBlock) for one in wanted) and not self.lora
        if not whole and not any(one.removed for one in wanted):
            loaded = self.teacher.transformer({group.number}, dtype=dtype, blocks_only=True)
            blocks[group.number] = self.adapter.blocks(loaded)[group.number]
            if self.lora:
                prefix = self._teachers_prefix(group)
                blocks[group.number] = block_with_lora(blocks[group.number], prefix, self.lora, "cpu", dtype)
        standing = block_map(self.adapter, self.structure.transformer, blocks, modules, wanted)
        block = standing.get(group.number, blocks[group.number])
        self._merged |= shares_on([block])
        return self._named(group, merged(block), self._student(group, modules))

    def coverage(self) -> Coverage | None:
        """What of the LoRA became part of the weights; known when all have been read."""
        if self.lora is None:
            return None
        return Coverage.of(self.lora.lora, self._merged, self.lora.transferred(self.files.values()))

    def _teachers_prefix(self, place: RunningBlock) -> str:
        """Of the names of a block's modules in the teacher."""
        ranges = self.adapter.block_ranges(self.structure.transformer)
        return f"{place.block_list}.{place.number - ranges[self.adapter.block_lists.index(place.block_list)].start}."

    def _loaded(self, wanted: list[Replacement], dtype: torch.dtype) -> dict[Replacement, nn.Module]:
        held, self._held = self._held, {}
        for one in wanted:
            # A text run and the modulations are of several blocks.
            if (one, dtype) not in held:
                held[one, dtype] = self._load(self.files[one], dtype)
            self._held[one, dtype] = held[one, dtype]
        return {one: self._held[one, dtype] for one in wanted}

    def _load(self, file: Path, dtype: torch.dtype) -> nn.Module:
        module = load_replacement(file, self.teacher, "cpu", dtype)
        return merged(student_with_lora(module, file, self.lora)) if self.lora else module

    def _student(self, place: RunningBlock, modules: Mapping[Replacement, nn.Module]) -> StudentBlock | None:
        students = (m for one, m in modules.items() if isinstance(m, StudentBlock) and place.number in one.blocks)
        return next(students, None)

    def _named(self, place: RunningBlock, block: nn.Module, student: StudentBlock | None) -> Tensors:
        """A block's tensors by their names in the exported model."""
        state = dict(_own_tensors(block, self.adapter.attention))
        if self.text_is_dropped(place) and student is not None and not _drops_text(student.block):
            state = self._without_text(place, state, student.block)
        return {place.prefix + name: tensor for name, tensor in state.items()}

    def _without_text(self, place: RunningBlock, state: Tensors, student: nn.Module) -> Tensors:
        """The tensors of a block that makes no text, of a student that does where the teacher's last block does not.

        Of the text's modulation only scale and shift of the attention are left, in this order. They stay whole where
        modulations are in low rank.
        """
        text = self.structure.parts(place.number)["txt"]
        assert isinstance(text, BlockParts)
        gone = tuple(f"{path}." for path in (text.modulation, text.ffn, text.norm2, text.out))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(gone)}
        for kind, tensor in student.get_submodule(text.modulation).named_parameters():
            chunks = tensor.split(self._width(), 0)
            state[f"{text.modulation}.{kind}"] = torch.cat([chunks[SCALE1], chunks[SHIFT1]])
        return state


def _described(adapter: ModelAdapter, where: Parts) -> dict[str, Any]:
    """The paths of a stream's parts, as `ppcl.models.pruned_transformer` reads them."""
    common = {"modulation": where.modulation, "qkv": list(where.qkv)}
    if isinstance(where, FusedParts):
        return {**common, "up": where.ffn_up, "fused": where.fused}
    paths = {"norm1": where.norm1, "norm2": where.norm2, "ffn": where.ffn, "out": where.out}
    return {**common, **paths, "up": adapter.ffn_up, "down": adapter.ffn_down}


def _drops_text(block: nn.Module) -> bool:
    return bool(getattr(block, "context_pre_only", False))


def _own_tensors(block: nn.Module, attention: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A block's tensors as the exported block names them: nothing is wrapped around what is stock there."""
    wrapped = isinstance(block, StudentBlock | RunStart | RunBlock)
    for name, tensor in _state(block).items():
        if name.startswith("recorder.") or ".basis." in name:
            # The same attention once more; and what all blocks share.
            continue
        if wrapped:
            name = name.removeprefix("block.").replace(f"{attention}.attention.", f"{attention}.", 1)
        yield name.replace(".kept.", ".rows."), tensor


def _state(block: nn.Module) -> Tensors:
    """A block's tensors, with its output projection in one."""
    state: Tensors = block.state_dict()
    for path, output in block.named_modules():
        if isinstance(output, FusedOutput):
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{path}.")}
            state |= {f"{path}.{name}": tensor for name, tensor in output.joined().items()}
    return state


def _basis(modules: Mapping[Replacement, nn.Module]) -> Tensors:
    basis = modules.get(LowRankModulation())
    return {} if basis is None else {f"modulation_basis.{n}": t for n, t in basis.state_dict().items()}
