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

from ppcl.architecture import Architecture, architecture_of, embed
from ppcl.errors import UserError
from ppcl.teacher import Teacher

_TEXT_TOKENS = 512
_PIXELS_A_TOKEN = 16  # of the VAE 8, of the patches 2, in every family


@dataclass(frozen=True)
class Model:
    """`blocks`: parameters of each block in running order; `rest`: those of embedders and head, which every rank holds.

    For one sample in bfloat16: `stream_bytes` of the two streams between two blocks, `saved_bytes` that the backward pass
    of a student like each block keeps, by block. `spans`: the block lists.
    """

    name: str
    blocks: tuple[int, ...]
    rest: int
    spans: tuple[range, ...]
    stream_bytes: int
    saved_bytes: tuple[int, ...]

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
            sizes = tuple(_count(block) for block in blocks)
            streams, context = embed(model, _call(architecture, model.config, height, width, text_tokens))
            context = {name: _bfloat16(value) for name, value in context.items()}
            streams = type(streams)(*map(_bfloat16, streams))
            # Blocks of one list are alike, but for the last one of some and the first few of others.
            alike: dict[tuple, int] = {}
            saved = []
            for block in blocks:
                kind = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
                if kind not in alike:
                    alike[kind] = saved_for_backward(architecture, block, streams, context)
                saved.append(alike[kind])
            between = sum(x.numel() * 2 for x in streams if x is not None)
            return cls(name, sizes, _count(model) - sum(sizes), tuple(architecture.spans(model)), between, tuple(saved))


def saved_for_backward(architecture: Architecture, block: nn.Module, streams: Any, context: dict[str, Any]) -> int:
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


def _call(architecture: Architecture, config: Any, height: int, width: int, text: int) -> dict[str, Any]:
    """Arguments of the stock forward for one sample."""
    rows, columns = height // _PIXELS_A_TOKEN, width // _PIXELS_A_TOKEN
    call: dict[str, Any] = {"timestep": torch.empty(1), "encoder_hidden_states": torch.empty(1, text, config.joint_attention_dim)}
    if architecture.packed_latents:
        call["hidden_states"] = torch.empty(1, rows * columns, config.in_channels)
    else:
        call["hidden_states"] = torch.empty(1, config.in_channels, 2 * rows, 2 * columns)
    if "pooled_projections" in architecture.prompt_arguments:
        call["pooled_projections"] = torch.empty(1, config.pooled_projection_dim)
    if "img_shapes" in architecture.shared_arguments:
        call |= {"img_shapes": [[(1, rows, columns)]], "encoder_hidden_states_mask": None}
    if "img_ids" in architecture.shared_arguments:
        call |= {"img_ids": torch.empty(rows * columns, 3), "txt_ids": torch.empty(text, 3)}
    if config.get("guidance_embeds"):
        call["guidance"] = torch.empty(1)
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
