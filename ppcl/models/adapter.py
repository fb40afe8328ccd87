"""The description of a model family: one short declarative record, the only place with facts about a family.

A record names the block lists in the order in which the stock forward runs them, the stream of each argument and return
value of a block, and the arguments of the transformer for the prompt, the latents and the timestep.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.models.block_layout import (
    BlockLayout,
    Context,
    block_class,
    class_of_transformer,
    registered_layout,
    resolved,
)


class Streams(NamedTuple):
    """The two streams between blocks: image `(B, S, d)` and text `(B, T, d)`.

    The text is None where a model drops it, and where all its blocks take image and text tokens as one stream `img`.
    """

    img: torch.Tensor
    txt: torch.Tensor | None

    def require_txt(self) -> torch.Tensor:
        """The text stream, of a block that is known to have one."""
        if self.txt is None:
            raise ValueError("the model dropped the text stream before this block")
        return self.txt

    def joined(self) -> torch.Tensor:
        """Text and image tokens as one stream `(B, T + S, d)`, as stock forwards hand them to single-stream blocks."""
        return self.img if self.txt is None else torch.cat([self.txt, self.img], 1)


@dataclass(frozen=True)
class BlockParts:
    """The sub-modules of a block that belong to one stream, as dotted paths such as `attn.to_out.0`.

    `modulation`: the linear map whose output is cut into chunks of the width, in the order shift, scale and gate of the
    attention, then shift, scale and gate of the FFN, then whatever a family adds. `norm1` and `norm2`: the plain norms
    before the attention and before the FFN. `ffn`: the FFN. `out`: the output projection of the attention. `qkv`: the
    maps that give the attention's queries, keys and values, head after head.
    """

    modulation: str
    norm1: str
    norm2: str
    ffn: str
    out: str
    qkv: tuple[str, str, str]


@dataclass(frozen=True)
class FusedParts:
    """The sub-modules of a single-stream block whose last map reads the attention and the FFN side by side.

        block(x) = x + gate * fused([attended, hidden])        x: text tokens, then image tokens, (B, T + S, d)

    There is one of it, under the stream `img`: it holds the FFN of all tokens. `modulation`: the linear map whose
    output is shift, scale and gate. `ffn_up`: the map that gives the hidden units. `fused`: the output projection,
    whose first inputs are the attention's. `qkv`: as in `BlockParts`.
    """

    modulation: str
    ffn_up: str
    fused: str
    qkv: tuple[str, str, str]

    @property
    def out(self) -> str:
        """The attention's part of the output projection, in a block of which `unfused` made a view."""
        return f"{self.fused}.attention"

    @property
    def ffn_down(self) -> str:
        """The FFN's part of it."""
        return f"{self.fused}.ffn"


Parts = BlockParts | FusedParts

# As diffusers' attention modules call them.
IMG_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


# A reason for `uncalibrated`.
NEEDS_MASK = "ppcl does not give its call the mask of the prompts, which it requires"

# `example(config, samples, grid, text_tokens)`: arguments of the stock forward for images of `grid` tokens, rows and
# columns. Floating-point tensors are not set; all others have values that a pipeline could give.
Example = Callable[[Any, int, tuple[int, int], int], dict[str, Any]]


@dataclass(frozen=True)
class ModelAdapter:
    """The layout of one family of MMDiTs.

    - `name`: the family, in messages. `transformer`: class name of the diffusers transformer; records are found by it.
      `pipelines`: class names of the diffusers pipelines that ppcl accepts with this transformer.
    - `block_lists`: attributes of the transformer that hold its blocks, in running order. An interval never crosses
      from one list to the next, because their blocks differ in kind.
    - `block_classes`: by block list, the class of its blocks, in the file of the transformer's class.
    - `layouts`: by block list, how its blocks take and return the streams. Diffusers' own registry of blocks says it of
      the lists that are not named here.
    - `layer_counts`: by block list, the key of the transformer's configuration that says how many blocks it has.
    - `parts`: by block list and stream (`img`, `txt`), the parts of a block that width pruning replaces; of a
      single-stream block `FusedParts` under `img`. A list that is not named has none.
    - `prompt_arguments`: arguments of the transformer's forward that depend on the prompt; the text comes first.
      `shared_arguments`: those that depend on the image's size or on constants only, the same for all samples.
    - `encoded`: the values that the pipeline's `encode_prompt` returns, in order, each as the name of the transformer's
      argument, or None if the transformer does not take it.
    - `text_mask`: the prompt argument that marks the valid text tokens; None if the family has no such argument.
    - `timestep_scale`: the value of the forward's timestep argument for pure noise, 1.0 or 1000.0.
    - `guidance_argument`: the argument of the pipeline's call that sets the scale of classifier-free guidance.
      `guidance_keeps_norm`: True if the guided velocity is given the norm of the conditional one.
    - `optional_components`: components that `model_index.json` may leave out (null) beside those that the pipeline's
      class calls optional.
    - `latents`, `timestep`: names of these arguments of the transformer's forward. `packed_latents`: True if latents
      are patched into tokens `(B, S, d)` by the pipeline's `_pack_latents`, False if they are `(B, C, H, W)`.
    - `attention`: path of the joint attention in a block, which takes the streams by the arguments `img` and `txt`.
    - `temb`: the argument of a block from which a SiLU and a linear map compute its modulations.
    - `ffn_up`, `ffn_down`: paths in an FFN of its two linear maps, with the hidden units between them.
    - `example`: makes arguments of the transformer's forward from its configuration, see `Example`.
    - `uncalibrated`: by pipeline that ppcl cannot record samples and prompts of, why not: such a teacher has no job.
    - `notes`: by what of the family is not supported or not tested (`width`, `export`, a pipeline's class), why not.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    block_lists: tuple[str, ...]
    block_classes: tuple[str, ...]
    layer_counts: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Parts]]
    prompt_arguments: tuple[str, ...]
    shared_arguments: tuple[str, ...]
    encoded: tuple[str | None, ...]
    timestep_scale: float
    example: Example
    layouts: Mapping[str, BlockLayout] = field(default_factory=dict)
    uncalibrated: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    text_mask: str | None = None
    attention: str = "attn"
    temb: str = "temb"
    ffn_up: str = "net.0.proj"
    ffn_down: str = "net.2"
    latents: str = "hidden_states"
    timestep: str = "timestep"
    packed_latents: bool = True
    guidance_argument: str = "true_cfg_scale"
    guidance_keeps_norm: bool = False
    optional_components: tuple[str, ...] = ()

    def lists(self, transformer: nn.Module) -> list[nn.ModuleList]:
        return [getattr(transformer, name) for name in self.block_lists]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """All blocks in running order; their positions are the block numbers used everywhere, from 0."""
        return [block for blocks in self.lists(transformer) for block in blocks]

    def block_ranges(self, transformer: nn.Module) -> list[range]:
        """The block numbers of each block list, in order: `[range(0, 19), range(19, 57)]` for FLUX.1."""
        block_ranges, first = [], 0
        for blocks in self.lists(transformer):
            block_ranges.append(range(first, first + len(blocks)))
            first += len(blocks)
        return block_ranges

    def entry(self, transformer: nn.Module, block: int) -> tuple[nn.ModuleList, int]:
        """The list that holds a block, and the block's index in it."""
        for blocks, span in zip(self.lists(transformer), self.block_ranges(transformer), strict=True):
            if block in span:
                return blocks, block - span.start
        count = self.block_ranges(transformer)[-1].stop
        raise UserError(f"block {block} does not exist: this {self.name} has blocks 0 to {count - 1}")

    def parts_of(self, transformer: nn.Module, number: int, block: nn.Module) -> dict[str, Parts]:
        """By stream, where the replaceable parts of the teacher's block `number` are.

        Empty for a kind of block that has none; a stream that the block drops is left out.
        """
        parts = self.parts_read(transformer, number)
        dropped = "txt" if getattr(block, "context_pre_only", False) else None
        return {stream: where for stream, where in parts.items() if stream != dropped}

    def parts_read(self, transformer: nn.Module, number: int) -> Mapping[str, Parts]:
        """The same of every stream that the block's attention reads, also of one that the block then drops.

        Such a stream has `qkv`, and none of what comes after the attention.
        """
        (name,) = (
            n for n, span in zip(self.block_lists, self.block_ranges(transformer), strict=True) if number in span
        )
        return self.parts.get(name, {})

    def ffn_maps(self, where: Parts) -> tuple[str, str]:
        """The paths of the FFN's two linear maps in a block; the second of a fused one is that of its view."""
        if isinstance(where, FusedParts):
            return where.ffn_up, where.ffn_down
        return f"{where.ffn}.{self.ffn_up}", f"{where.ffn}.{self.ffn_down}"

    @cached_property
    def _layouts(self) -> dict[str, BlockLayout]:
        layouts = {}
        for name, class_name in zip(self.block_lists, self.block_classes, strict=True):
            stated = self.layouts.get(name) or registered_layout(self.transformer, class_name)
            layouts[name] = resolved(stated or BlockLayout(), self.transformer, class_name)
        return layouts

    def layout(self, block_list: str) -> BlockLayout:
        """How the blocks of a list take and return the streams."""
        return self._layouts[block_list]

    def layout_at(self, transformer: nn.Module, number: int) -> BlockLayout:
        """How a block takes and returns the streams."""
        ranges = zip(self.block_lists, self.block_ranges(transformer), strict=True)
        return next(self.layout(name) for name, span in ranges if number in span)

    @property
    def img(self) -> str:
        """The argument of a block that takes the image stream, or both as one."""
        return self.layout(self.block_lists[0]).img

    @property
    def txt(self) -> str:
        """The argument of a block that takes the text stream, where it has one."""
        return self.layout(self.block_lists[0]).txt or "encoder_hidden_states"

    @property
    def returns(self) -> tuple[str, ...]:
        """The streams that a block of the first list returns, in order."""
        return self.layout(self.block_lists[0]).returns

    def split(self, arguments: Mapping[str, Any]) -> tuple[Streams, dict[str, Any]]:
        """A block's arguments as (streams, context), of the first list's kind."""
        return self.parted(self.layout(self.block_lists[0]), arguments)

    def parted(self, layout: BlockLayout, arguments: Mapping[str, Any]) -> tuple[Streams, dict[str, Any]]:
        """The arguments of a block with that layout as (streams, context)."""
        context = {name: value for name, value in arguments.items() if name not in (layout.img, layout.txt)}
        return Streams(arguments[layout.img], arguments[layout.txt] if layout.txt else None), context

    def join(self, streams: Streams, context: Mapping[str, Any], number: int | None = None) -> dict[str, Any]:
        """The arguments of block `number`, which must be given where blocks are called with different arguments."""
        if not isinstance(context, Context):
            return {self.img: streams.img, self.txt: streams.txt, **context}
        layout, own = context.of(number)
        if layout.txt is None:
            return {layout.img: streams.joined(), **own}
        return {layout.img: streams.img, layout.txt: streams.txt, **own}

    def from_returned(self, returned: Any, before: Streams | None = None) -> Streams:
        """What a block returned as streams. `before`: those it was given, by which one stream is parted into two."""
        if not isinstance(returned, torch.Tensor):
            return Streams(**dict(zip(self.returns, returned, strict=True)))
        if before is None or before.txt is None:
            return Streams(returned, None)
        text = before.txt.shape[1]
        return Streams(returned[:, text:], returned[:, :text])

    def to_returned(self, streams: Streams, like: Any = None) -> Any:
        """Streams as a block returns them. `like`: what a block of the same kind returned; a tuple where not given."""
        if isinstance(like, torch.Tensor):
            return streams.joined()
        return tuple(getattr(streams, name) for name in self.returns)

    def width(self, block: nn.Module) -> int:
        """`d`, the width of the streams: what the first map of a block's attention reads."""
        return next(p.shape[-1] for p in block.get_submodule(self.attention).parameters() if p.ndim == 2)


_RECORDS: dict[str, ModelAdapter] = {}


def register(record: ModelAdapter) -> ModelAdapter:
    _RECORDS[record.transformer] = record
    return record


def supported() -> list[str]:
    return sorted(_RECORDS)


def records() -> list[ModelAdapter]:
    """All records, by the name of their family."""
    return sorted(_RECORDS.values(), key=lambda record: record.name.lower())


def adapter_of(transformer: nn.Module | str) -> ModelAdapter:
    """The record of a transformer, or of a transformer's class name. Raises `UserError` where there is none."""
    name = transformer if isinstance(transformer, str) else type(transformer).__name__
    if name not in _RECORDS:
        nearest = difflib.get_close_matches(name, supported(), 1, 0.0)[0]
        raise UserError(
            f"the transformer {name} is not supported; the nearest supported one is {nearest}, and ppcl architectures "
            "lists all"
        )
    return _RECORDS[name]


def check_calibration(record: ModelAdapter, pipeline: str) -> None:
    """Raise `UserError` where a job's calibration cannot record samples of a pipeline's class."""
    if reason := record.uncalibrated.get(pipeline):
        raise UserError(
            f"a job cannot calibrate a {pipeline}: {reason}; the library's replacements and switching work with it, "
            "see ppcl architectures"
        )


def check_record(transformer: nn.Module) -> None:
    """Compare a transformer with its record, as far as ppcl relies on it; the weights are not read.

    Raises `UserError`, in one sentence, where the installed diffusers has other attributes or arguments.
    """
    record = adapter_of(transformer)
    for missing in _missing(record, transformer):
        import diffusers

        raise UserError(
            f"the {record.transformer} of diffusers {diffusers.__version__} has no {missing}, on which ppcl relies; "
            "install a version of diffusers that ppcl's requirements name"
        )


def _missing(record: ModelAdapter, transformer: nn.Module) -> Iterator[str]:
    """What a record names and a transformer does not have, one phrase each."""
    arguments = inspect.signature(class_of_transformer(record.transformer).forward).parameters
    for name in (record.latents, record.timestep, *record.prompt_arguments, *record.shared_arguments):
        if name not in arguments:
            yield f"argument {name} of its forward"
    for block_list, count in zip(record.block_lists, record.layer_counts, strict=True):
        if not isinstance(getattr(transformer, block_list, None), nn.ModuleList):
            yield f"list of blocks {block_list}"
            return
        if count not in getattr(transformer, "config", {count: 0}):
            yield f"key {count} in its configuration"
    for block_list, class_name in zip(record.block_lists, record.block_classes, strict=True):
        layout, blocks = record.layout(block_list), getattr(transformer, block_list)
        own = block_class(record.transformer, class_name)
        if own is None or not all(isinstance(block, own) for block in blocks):
            yield f"blocks of the class {class_name} in {block_list}"
            return
        for name in filter(None, (layout.img, layout.txt)):
            if name not in layout.arguments:
                yield f"argument {name} of the blocks in {block_list}"
        for where in record.parts.get(block_list, {}).values() if len(blocks) else ():
            for path in _paths(record, where):
                if not _has(blocks[0], path):
                    yield f"part {path} in the blocks of {block_list}"


def _paths(record: ModelAdapter, where: Parts) -> tuple[str, ...]:
    if isinstance(where, FusedParts):
        return where.modulation, where.ffn_up, where.fused, *where.qkv
    return where.modulation, where.norm1, where.norm2, *record.ffn_maps(where), where.out, *where.qkv


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
