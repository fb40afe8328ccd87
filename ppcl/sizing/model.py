"""A transformer as numbers: parameters by block, bytes of its streams, and what a block's backward pass keeps.

The stock model is built and run on fake tensors, which have shapes and no memory, so the numbers are those of its own code.
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

from ppcl.architecture import Architecture, Streams, architecture_of, embed
from ppcl.errors import UserError
from ppcl.teacher import Teacher

_TEXT_TOKENS = 512
_PIXELS_A_TOKEN = 16  # of the VAE 8, of the patches 2, in every family


@dataclass(frozen=True)
class Model:
    """`blocks`: parameters of each block in running order; `rest`: those of embedders and head, which every rank holds;
    `affine`: those of the affine maps behind a student. `spans`: the block lists.

    In bfloat16: `stream_bytes` of the two streams between two blocks, a sample; what the backward pass of a student like each
    block keeps, `saved_bytes` a sample and `cast_bytes` besides, its weights in bfloat16.
    """

    name: str
    blocks: tuple[int, ...]
    rest: int
    affine: int
    spans: tuple[range, ...]
    stream_bytes: int
    saved_bytes: tuple[int, ...]
    cast_bytes: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return sum(self.blocks) + self.rest

    @classmethod
    def of(cls, name: str, transformer: str, config: dict[str, Any], text_tokens: int, height: int, width: int) -> Model:
        """`height`, `width`: of the pictures, pixels."""
        import diffusers

        if height % _PIXELS_A_TOKEN or width % _PIXELS_A_TOKEN:
            raise UserError(f"pictures of {width} × {height} pixels: both must be multiples of {_PIXELS_A_TOKEN}")
        architecture = architecture_of(transformer)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = getattr(diffusers, transformer).from_config(config).eval()
            blocks = architecture.blocks(model)
            one, two = (_at_blocks(model, architecture, n, height, width, text_tokens) for n in (1, 2))
            # Blocks of one list are alike, but for the last one of some and the first few of others.
            alike: dict[tuple, tuple[int, int]] = {}
            kinds = [tuple((n, tuple(p.shape)) for n, p in block.named_parameters()) for block in blocks]
            for kind, block in zip(kinds, blocks, strict=True):
                if kind not in alike:
                    alike[kind] = tuple(saved_for_backward(architecture, block, *at) for at in (one, two))
            sizes, width = tuple(map(_count, blocks)), one[0].img.shape[-1]
            return cls(
                name=name,
                blocks=sizes,
                rest=_count(model) - sum(sizes),
                affine=2 * width * (width + 1),
                spans=tuple(architecture.spans(model)),
                stream_bytes=sum(x.nbytes for x in one[0]),
                saved_bytes=tuple(alike[kind][1] - alike[kind][0] for kind in kinds),
                cast_bytes=tuple(2 * alike[kind][0] - alike[kind][1] for kind in kinds),
            )


def _at_blocks(
    model: nn.Module, architecture: Architecture, samples: int, height: int, width: int, text: int
) -> tuple[Streams, dict[str, Any]]:
    """What the first block is given, in bfloat16."""
    streams, context = embed(model, _call(architecture, model.config, samples, height, width, text))
    return Streams(*map(_bfloat16, streams)), {name: _bfloat16(value) for name, value in context.items()}


def saved_for_backward(architecture: Architecture, block: nn.Module, streams: Streams, context: dict[str, Any]) -> int:
    """Bytes that autograd keeps of one forward of a block in training, with bfloat16 autocast, besides its parameters."""
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
    held = []  # or a storage's address could come to be another's
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or keep(x), lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        held.append(block(**architecture.join(streams, context)))
    return sum(kept.values())


def _call(architecture: Architecture, config: Any, samples: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Arguments of the stock forward."""
    rows, columns = height // _PIXELS_A_TOKEN, width // _PIXELS_A_TOKEN
    call: dict[str, Any] = {
        "timestep": torch.empty(samples), "encoder_hidden_states": torch.empty(samples, text, config.joint_attention_dim)
    }  # fmt: skip
    if architecture.packed_latents:
        call["hidden_states"] = torch.empty(samples, rows * columns, config.in_channels)
    else:
        call["hidden_states"] = torch.empty(samples, config.in_channels, 2 * rows, 2 * columns)
    if "pooled_projections" in architecture.prompt_arguments:
        call["pooled_projections"] = torch.empty(samples, config.pooled_projection_dim)
    if "img_shapes" in architecture.shared_arguments:
        call |= {"img_shapes": [[(1, rows, columns)]] * samples, "encoder_hidden_states_mask": None}
    if "img_ids" in architecture.shared_arguments:
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
    return {file.name.removesuffix(".json"): json.loads(file.read_text()) for file in sorted(files, key=lambda f: f.name)}


def model_of(name: str, height: int, width: int) -> Model:
    """A published model, or that of a pipeline's folder or URL. Raises `UserError`."""
    if record := published().get(name.lower()):
        return Model.of(**record, height=height, width=width)
    try:
        teacher = Teacher(name)
    except UserError as error:
        raise UserError(f"{error}; or name one of {', '.join(published())}") from None
    return Model.of(teacher.place, teacher.architecture.transformer, teacher.config(), _TEXT_TOKENS, height, width)
