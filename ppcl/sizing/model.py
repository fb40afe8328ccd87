"""Counts of a transformer by block: parameters, operations, bytes of streams and of what the backward pass keeps.

The stock model is built and run on fake tensors, which have shapes and no memory, so the numbers are those of its own
code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ppcl.errors import UserError
from ppcl.models import ModelAdapter, Streams, adapter_of, embed
from ppcl.models.teacher import Teacher

_TEXT_TOKENS = 512
_PIXELS_A_TOKEN = 16  # of the VAE 8, of the patches 2, in every family


@dataclass(frozen=True)
class Model:
    """`blocks`: parameters of each block in running order; `rest`: those of embedders and head, which every rank holds;
    `affine`: those of the affine maps behind a student. `block_ranges`: the block lists.

    In bfloat16: `stream_bytes` of the two streams between two blocks, a sample; what the backward pass of a student
    like each block keeps, `saved_bytes` a sample and `cast_bytes` besides, its weights in bfloat16.

    Floating-point operations of a sample, a multiplication and an addition being two: `rest_flops` of embedders and
    head; by block `flops` of its forward, `trained_flops` of the forward and backward pass of a student like it without
    affine maps, and `sums_flops` of what its probes and its FFN's maps are fitted from.
    """

    name: str
    blocks: tuple[int, ...]
    rest: int
    affine: int
    block_ranges: tuple[range, ...]
    stream_bytes: int
    saved_bytes: tuple[int, ...]
    cast_bytes: tuple[int, ...]
    width: int
    rest_flops: int
    flops: tuple[int, ...]
    trained_flops: tuple[int, ...]
    sums_flops: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of both streams, a sample."""
        return self.stream_bytes // (2 * self.width)

    @property
    def parameters(self) -> int:
        return sum(self.blocks) + self.rest

    @classmethod
    def of(
        cls, name: str, transformer: str, config: dict[str, Any], text_tokens: int, height: int, width: int
    ) -> Model:
        """`height`, `width`: of the images, pixels."""
        import diffusers

        if height % _PIXELS_A_TOKEN or width % _PIXELS_A_TOKEN:
            raise UserError(f"images of {width} × {height} pixels: both must be multiples of {_PIXELS_A_TOKEN}")
        adapter = adapter_of(transformer)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = getattr(diffusers, transformer).from_config(config).eval()
            blocks = adapter.blocks(model)
            with _counter() as rest:
                one = _at_blocks(model, adapter, 1, height, width, text_tokens)
            two = _at_blocks(model, adapter, 2, height, width, text_tokens)
            # Blocks of one list are alike, but for the last one of some and the first few of others.
            alike: dict[tuple, tuple[int, ...]] = {}
            kinds = [tuple((n, tuple(p.shape)) for n, p in block.named_parameters()) for block in blocks]
            for number, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
                if kind not in alike:
                    saved = [saved_for_backward(adapter, block, *at) for at in (one, two)]
                    alike[kind] = (*saved, *_flops(adapter, block, *one), _sums_flops(adapter, model, number, one[0]))
            sizes, width = tuple(map(_count, blocks)), one[0].img.shape[-1]
            return cls(
                name=name,
                blocks=sizes,
                rest=_count(model) - sum(sizes),
                affine=2 * width * (width + 1),
                block_ranges=tuple(adapter.block_ranges(model)),
                stream_bytes=sum(stream.nbytes for stream in one[0] if stream is not None),
                saved_bytes=tuple(alike[kind][1] - alike[kind][0] for kind in kinds),
                cast_bytes=tuple(2 * alike[kind][0] - alike[kind][1] for kind in kinds),
                width=width,
                rest_flops=rest.get_total_flops(),
                flops=tuple(alike[kind][2] for kind in kinds),
                trained_flops=tuple(alike[kind][3] for kind in kinds),
                sums_flops=tuple(alike[kind][4] for kind in kinds),
            )


def _at_blocks(
    model: nn.Module, adapter: ModelAdapter, samples: int, height: int, width: int, text: int
) -> tuple[Streams, dict[str, Any]]:
    """What the first block is given, in bfloat16."""
    streams, context = embed(model, _call(adapter, model.config, samples, height, width, text))
    return Streams(*map(_bfloat16, streams)), {name: _bfloat16(value) for name, value in context.items()}


def saved_for_backward(adapter: ModelAdapter, block: nn.Module, streams: Streams, context: dict[str, Any]) -> int:
    """Bytes that autograd keeps of a block's forward in training with bfloat16 autocast, without its parameters."""
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    for p in block.parameters():
        p.requires_grad_(True)
    bfloat16 = streams.img.dtype is torch.bfloat16
    held: list[Any] = []  # else the address of a freed storage could be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return keep(tensor)

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        held.append(block(**adapter.join(streams, context)))
    return sum(kept.values())


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


def _flops(adapter: ModelAdapter, block: nn.Module, streams: Streams, context: dict[str, Any]) -> tuple[int, int]:
    """Of one forward of a block in training, and of forward and backward."""
    with _counter() as counter, torch.autocast("cpu", torch.bfloat16, enabled=streams.img.dtype is torch.bfloat16):
        output = adapter.from_returned(block(**adapter.join(streams, context)))
        forward = counter.get_total_flops()
        torch.stack([stream.float().sum() for stream in output if stream is not None]).sum().backward()
    for p in block.parameters():
        p.grad = None
    return forward, counter.get_total_flops()


def _sums_flops(adapter: ModelAdapter, model: nn.Module, number: int, streams: Streams) -> int:
    """Operations of `X^T X` and `X^T Y` of a block's streams and FFN inputs; see `ppcl.detection.fit_probes`."""
    tokens = {name: x.shape[1] for name, x in streams._asdict().items()}
    fitted = [*tokens, *adapter.parts_of(model, number, adapter.blocks(model)[number])]
    return sum(4 * tokens[name] * streams.img.shape[-1] ** 2 for name in fitted)


def _call(adapter: ModelAdapter, config: Any, samples: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Arguments of the stock forward."""
    rows, columns = height // _PIXELS_A_TOKEN, width // _PIXELS_A_TOKEN
    call: dict[str, Any] = {
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, config.joint_attention_dim),
    }
    if adapter.packed_latents:
        call["hidden_states"] = torch.empty(samples, rows * columns, config.in_channels)
    else:
        call["hidden_states"] = torch.empty(samples, config.in_channels, 2 * rows, 2 * columns)
    if "pooled_projections" in adapter.prompt_arguments:
        call["pooled_projections"] = torch.empty(samples, config.pooled_projection_dim)
    if "img_shapes" in adapter.shared_arguments:
        call |= {"img_shapes": [[(1, rows, columns)]] * samples, "encoder_hidden_states_mask": None}
    if "img_ids" in adapter.shared_arguments:
        call |= {"img_ids": torch.empty(rows * columns, 3), "txt_ids": torch.empty(text, 3)}
    if config.get("guidance_embeds"):
        call["guidance"] = torch.empty(samples)
    return call


def _bfloat16(value: Any) -> Any:
    return value.bfloat16() if torch.is_tensor(value) and value.dtype is torch.float32 else value


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@lru_cache(maxsize=1)
def published() -> dict[str, dict[str, Any]]:
    """The configurations that come with ppcl, by what `ppcl plan` calls them."""
    files = [file for file in resources.files(__package__).iterdir() if file.name.endswith(".json")]
    return {
        file.name.removesuffix(".json"): json.loads(file.read_text()) for file in sorted(files, key=lambda f: f.name)
    }


def model_of(name: str, height: int, width: int) -> Model:
    """A published model, or that of a pipeline's folder or URL. Raises `UserError`."""
    if record := published().get(name.lower()):
        return Model.of(**record, height=height, width=width)
    try:
        teacher = Teacher(name)
    except UserError as error:
        raise UserError(f"{error}; or name one of {', '.join(published())}") from None
    return Model.of(teacher.place, teacher.adapter.transformer, teacher.config(), _TEXT_TOKENS, height, width)
