"""Counts of a transformer by block: parameters, operations, bytes of streams and of what the backward pass keeps.

The stock model is built and run on fake tensors, which have shapes and no memory, so the numbers are those of its own
code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ppcl.errors import UserError
from ppcl.models import Context, FusedParts, ModelAdapter, Streams, adapter_of, embed
from ppcl.models.block_view import linear_at
from ppcl.models.teacher import Teacher
from ppcl.replacements.parameter_counts import ffn_parameters
from ppcl.replacements.pruned_heads import HeadPaths, kept_heads, parameters_of_heads
from ppcl.sizing.peak_memory import PeakMemory

_TEXT_TOKENS = 512
# Of the VAE 8, of the patches 2, where a published model does not say otherwise.
PIXELS_A_TOKEN = 16


@dataclass(frozen=True)
class SampleBytes:
    """Bytes that grow with the samples of a batch: `each` for one of them, and `fixed`."""

    each: int
    fixed: int

    @classmethod
    def through(cls, one: int, two: int) -> SampleBytes:
        """From the bytes of one sample and of two."""
        return cls(two - one, 2 * one - two)

    def of(self, samples: int) -> int:
        return samples * self.each + self.fixed


@dataclass(frozen=True)
class BlockMemory:
    """What running a block takes beside its parameters and its inputs.

    `forward`: the most alive at once without gradients. `saved`: what autograd keeps of a student like it, in bfloat16
    its weights among it. `frozen`: what autograd keeps of the teacher's own block where the streams alone have a
    gradient.
    """

    forward: SampleBytes
    saved: SampleBytes
    frozen: SampleBytes


@dataclass(frozen=True)
class FfnSize:
    """The FFN of one stream of a block: its `parameters`, its hidden `units`, and whether it shares its output map.

    One that does is of all tokens, and cannot become a linear map.
    """

    parameters: int
    units: int
    fused: bool = False

    def kept(self, percent: int) -> int:
        """Parameters with `percent` of the units."""
        return self.parameters * max(1, round(self.units * percent / 100)) // self.units


@dataclass(frozen=True)
class AttentionSize:
    """The joint attention of a block: `heads`, of `head_width` numbers each, and the `streams` that it has outputs for.

    `fixed`: parameters that do not grow with the heads, which are biases; `each`: those of one head.
    """

    heads: int
    head_width: int
    streams: int
    fixed: int
    each: int

    @property
    def width(self) -> int:
        """Inputs of an output projection."""
        return self.heads * self.head_width

    def kept(self, percent: int) -> int:
        """Parameters of the maps before and after the heads, with `percent` of them."""
        return self.fixed + self.each * kept_heads(self.heads, percent)


@dataclass(frozen=True)
class Model:
    """`blocks`: parameters of each block in running order; `rest`: those of embedders and head, which every rank holds;
    `affine`: those of the affine maps behind a student. `block_ranges`: the block lists. `ffns`: by block and stream,
    its FFN. `attentions`: by block, its joint attention; None where its heads cannot be replaced. `memory`: by block.

    In `dtype`, that of the teacher: `stream_bytes` of the two streams between two blocks, a sample; `latent_bytes` and
    `text_bytes` of what the transformer is given of a sample.

    Floating-point operations of a sample, a multiplication and an addition being two: `rest_flops` of embedders and
    head; by block `flops` of its forward, `trained_flops` of the forward and backward pass of a student like it without
    affine maps, and `sums_flops` of what its probes and its FFN's maps are fitted from.
    """

    name: str
    blocks: tuple[int, ...]
    rest: int
    affine: int
    block_ranges: tuple[range, ...]
    ffns: tuple[Mapping[str, FfnSize], ...]
    attentions: tuple[AttentionSize | None, ...]
    memory: tuple[BlockMemory, ...]
    stream_bytes: int
    latent_bytes: int
    text_bytes: int
    text_tokens: int
    dtype: torch.dtype
    width: int
    rest_flops: int
    flops: tuple[int, ...]
    trained_flops: tuple[int, ...]
    sums_flops: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of both streams, a sample."""
        return self.stream_bytes // (self.dtype.itemsize * self.width)

    @property
    def longest_tokens(self) -> int:
        """Of the longer stream, a sample."""
        return max(self.text_tokens, self.tokens - self.text_tokens)

    @property
    def parameters(self) -> int:
        return sum(self.blocks) + self.rest

    @classmethod
    def of(
        cls,
        name: str,
        transformer: str,
        config: dict[str, Any],
        text_tokens: int,
        height: int,
        width: int,
        dtype: torch.dtype = torch.bfloat16,
        pixels_a_token: int = PIXELS_A_TOKEN,
    ) -> Model:
        """`height`, `width`: of the images, pixels. `dtype`: the teacher's, bfloat16 or float32."""
        import diffusers

        if height % pixels_a_token or width % pixels_a_token:
            raise UserError(f"images of {width} × {height} pixels: both must be multiples of {pixels_a_token}")
        grid = height // pixels_a_token, width // pixels_a_token
        adapter = adapter_of(transformer)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = getattr(diffusers, transformer).from_config(config).eval()
            blocks = adapter.blocks(model)
            calls = [adapter.example(model.config, samples, grid, text_tokens) for samples in (1, 2)]
            try:
                with _counter() as rest:
                    one = _at_blocks(model, adapter, calls[0], dtype)
                two = _at_blocks(model, adapter, calls[1], dtype)
            except DataDependentOutputException:
                raise UserError(
                    f"the size of a {adapter.name} cannot be computed without weights: its forward reads the values of "
                    "its prompts' mask"
                ) from None
            # Blocks of one list are alike, but for the last one of some and the first few of others.
            alike: dict[tuple, tuple[BlockMemory, int, int, int]] = {}
            kinds = [tuple((n, tuple(p.shape)) for n, p in block.named_parameters()) for block in blocks]
            for number, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
                if kind not in alike:
                    sums = _sums_flops(adapter, model, number, one[0])
                    memory = block_memory(adapter, block, number, one, two)
                    alike[kind] = (memory, *_flops(adapter, block, number, *one), sums)
            sizes, width = tuple(map(_count, blocks)), one[0].img.shape[-1]
            return cls(
                name=name,
                blocks=sizes,
                rest=_count(model) - sum(sizes),
                affine=2 * width * (width + 1),
                block_ranges=tuple(adapter.block_ranges(model)),
                ffns=tuple(_ffns(adapter, model, number, block) for number, block in enumerate(blocks)),
                attentions=tuple(_attention(adapter, model, number, block) for number, block in enumerate(blocks)),
                memory=tuple(alike[kind][0] for kind in kinds),
                stream_bytes=sum(stream.nbytes for stream in one[0] if stream is not None),
                latent_bytes=_bytes(calls[0], [adapter.latents], dtype),
                text_bytes=_bytes(calls[0], adapter.prompt_arguments, dtype),
                text_tokens=text_tokens,
                dtype=dtype,
                width=width,
                rest_flops=rest.get_total_flops(),
                flops=tuple(alike[kind][1] for kind in kinds),
                trained_flops=tuple(alike[kind][2] for kind in kinds),
                sums_flops=tuple(alike[kind][3] for kind in kinds),
            )


# The streams before the first block, and the other arguments of all.
BlockInputs = tuple[Streams, Context]


def _at_blocks(model: nn.Module, adapter: ModelAdapter, call: dict[str, Any], dtype: torch.dtype) -> BlockInputs:
    """What the first block is given."""
    streams, context = embed(model, call)
    return Streams(*(_cast(x, dtype) for x in streams)), context.mapped(lambda value: _cast(value, dtype))


def block_memory(
    adapter: ModelAdapter, block: nn.Module, number: int, one: BlockInputs, two: BlockInputs
) -> BlockMemory:
    """Measure what running a block takes, from its inputs for one sample and for two."""

    def through(measure: Callable[[BlockInputs], int]) -> SampleBytes:
        return SampleBytes.through(measure(one), measure(two))

    return BlockMemory(
        forward=through(lambda inputs: _forward_peak(adapter, block, number, inputs)),
        saved=through(lambda inputs: saved_for_backward(adapter, block, number, inputs, trained=True)),
        frozen=through(lambda inputs: saved_for_backward(adapter, block, number, inputs, trained=False)),
    )


def saved_for_backward(adapter: ModelAdapter, block: nn.Module, number: int, inputs: BlockInputs, trained: bool) -> int:
    """Bytes that autograd keeps of a block's forward, without its parameters and what all blocks share.

    `trained`: a student's, whose float32 parameters have a gradient; else the streams alone have one.
    """
    streams, context = inputs
    parameters: dict[str, torch.Tensor] = (
        dict(block.named_parameters()) if trained else _frozen_parameters(block, streams.img.dtype)
    )
    shared = [*parameters.values(), *tree_leaves(context)]
    others = {x.untyped_storage()._cdata for x in shared if torch.is_tensor(x)}
    kept: dict[int, int] = {}
    held: list[Any] = []  # else the address of a freed storage could be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=streams.img.dtype is torch.bfloat16),
    ):
        given = adapter.join(streams if trained else _with_gradient(streams), context, number)
        held.append(functional_call(block, parameters, kwargs=given))
    return sum(kept.values())


def _forward_peak(adapter: ModelAdapter, block: nn.Module, number: int, inputs: BlockInputs) -> int:
    """The most bytes alive at once in a block's forward without gradients, beside its parameters and inputs."""
    parameters = _frozen_parameters(block, inputs[0].img.dtype)
    with torch.no_grad(), PeakMemory() as memory:
        given = adapter.join(*inputs, number)
        memory.hold(parameters, given)
        before = memory.now
        kept = functional_call(block, parameters, kwargs=given)  # noqa: F841 - alive at the peak
        return memory.peak - before


def _frozen_parameters(block: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The teacher's own: in its precision, without gradients."""
    return {name: p.detach().to(dtype) for name, p in block.named_parameters()}


def _with_gradient(streams: Streams) -> Streams:
    txt = streams.txt
    return Streams(
        streams.img.detach().requires_grad_(True), None if txt is None else txt.detach().requires_grad_(True)
    )


def _ffns(adapter: ModelAdapter, model: nn.Module, number: int, block: nn.Module) -> dict[str, FfnSize]:
    """By stream, the FFN of a block."""
    return {
        stream: FfnSize(
            ffn_parameters(adapter, block, where),
            linear_at(block, adapter.ffn_maps(where)[0]).out_features,
            isinstance(where, FusedParts),
        )
        for stream, where in adapter.parts_of(model, number, block).items()
    }


def _attention(adapter: ModelAdapter, model: nn.Module, number: int, block: nn.Module) -> AttentionSize | None:
    """The joint attention of a block; None for a kind of block that has none."""
    paths = HeadPaths.of(adapter, model, number, block)
    if not paths.out:
        return None
    one, two = (parameters_of_heads(block, paths, heads) for heads in (1, 2))
    return AttentionSize(paths.heads(block), paths.head_width(block), len(paths.out), 2 * one - two, two - one)


def _counter() -> FlopCounterMode:
    """The counter of torch, which leaves out attention on the CPU."""
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def _flops(adapter: ModelAdapter, block: nn.Module, number: int, streams: Streams, context: Context) -> tuple[int, int]:
    """Of one forward of a block in training, and of forward and backward."""
    with _counter() as counter, torch.autocast("cpu", torch.bfloat16, enabled=streams.img.dtype is torch.bfloat16):
        output = adapter.from_returned(block(**adapter.join(streams, context, number)))
        forward = counter.get_total_flops()
        torch.stack([stream.float().sum() for stream in output if stream is not None]).sum().backward()
    for p in block.parameters():
        p.grad = None
    return forward, counter.get_total_flops()


def _sums_flops(adapter: ModelAdapter, model: nn.Module, number: int, streams: Streams) -> int:
    """Operations of `X^T X` and `X^T Y` of a block's streams and FFN inputs; see `ppcl.detection.fit_probes`."""
    tokens = {name: x.shape[1] for name, x in streams._asdict().items() if x is not None}
    parts = adapter.parts_of(model, number, adapter.blocks(model)[number])
    fitted = [*tokens, *(stream for stream, where in parts.items() if not isinstance(where, FusedParts))]
    return sum(4 * tokens[name] * streams.img.shape[-1] ** 2 for name in fitted)


def _bytes(call: dict[str, Any], names: Iterable[str], dtype: torch.dtype) -> int:
    """Of one sample's tensors among the arguments of the forward."""
    return sum(_cast(call[name], dtype).nbytes for name in names if torch.is_tensor(call.get(name)))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.dtype is torch.float32 else value


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@lru_cache(maxsize=1)
def published() -> dict[str, dict[str, Any]]:
    """The configurations that come with ppcl, by what `ppcl plan` calls them."""
    files = [file for file in resources.files(__package__).iterdir() if file.name.endswith(".json")]
    return {
        file.name.removesuffix(".json"): json.loads(file.read_text()) for file in sorted(files, key=lambda f: f.name)
    }


def whole_pipelines() -> list[str]:
    """The published models of which text encoders and VAE are known too, so that a whole job can be computed."""
    return [name for name, record in published().items() if "components" in record]


@dataclass(frozen=True)
class TeacherSize:
    """A teacher as far as sizes depend on it: `model`, and of the rest of its pipeline the class and the parameters.

    `components`: by name, the parameters of the text encoders and of the VAE. `vae`: its `config.json`.
    """

    model: Model
    adapter: ModelAdapter
    pipeline_class: str
    components: Mapping[str, int]
    vae: Mapping[str, Any]

    @classmethod
    def of(cls, teacher: Teacher, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> TeacherSize:
        """Of a pipeline's folder or URL; no weight is read. `height`, `width`: of the images, pixels, rounded down."""
        adapter, pixels = teacher.adapter, teacher.pixels_a_token()
        model = Model.of(
            name=teacher.place,
            transformer=adapter.transformer,
            config=teacher.config(),
            text_tokens=_TEXT_TOKENS,
            height=max(height // pixels, 1) * pixels,
            width=max(width // pixels, 1) * pixels,
            dtype=dtype,
            pixels_a_token=pixels,
        )
        return cls(model, adapter, teacher.pipeline_class, teacher.component_parameters(), teacher.vae_config())

    @classmethod
    def named(cls, name: str, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> TeacherSize:
        """Of a published model, or of a pipeline's folder or URL. Raises `UserError`."""
        if record := published().get(name.lower()):
            if "components" not in record:
                raise UserError(
                    f"of {name} only the transformer's size is known, not those of its text encoders and VAE; leave "
                    f"out --stages, give the pipeline's folder, or name one of {', '.join(whole_pipelines())}"
                )
            model = _published_model(record, height, width, dtype)
            adapter = adapter_of(record["transformer"])
            return cls(model, adapter, adapter.pipelines[0], record["components"], record["vae"])
        try:
            teacher = Teacher(name)
        except UserError as error:
            raise UserError(f"{error}; or name one of {', '.join(published())}") from None
        return cls.of(teacher, height, width, dtype)


def _published_model(record: Mapping[str, Any], height: int, width: int, dtype: torch.dtype) -> Model:
    known = {key: value for key, value in record.items() if key not in ("components", "vae")}
    return Model.of(**known, height=height, width=width, dtype=dtype)


def model_of(name: str, height: int, width: int) -> Model:
    """A published model, or that of a pipeline's folder or URL, in bfloat16. Raises `UserError`."""
    if record := published().get(name.lower()):
        return _published_model(record, height, width, torch.bfloat16)
    return TeacherSize.named(name, height, width).model
