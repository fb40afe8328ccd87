"""Where a pipeline's weights are while it runs: all on the device, one component at a time, or one block at a time.

The VAE and what a transformer has beside its blocks are small and stay on the device. Text encoders and blocks go
through a `WeightCache` where not all fit; they give the same bits as on the device, since only their place changes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import ModelHook
from torch import nn

from ppcl.config.schema import Memory
from ppcl.errors import UserError
from ppcl.models.adapter import adapter_of
from ppcl.models.weight_cache import WeightCache, tensor_bytes

# Copies of a block's stream that are alive at once while it runs: the streams, queries, keys and values, the hidden
# units before and after their activation.
_STREAM_COPIES = 24
_TEXT_TOKENS = 512
# The same of a VAE's widest layer at full size, and that width where the VAE does not say it.
_PIXEL_COPIES = 8
_VAE_WIDTH = 128

_WORDS = {"none": "all weights on the device", "model": "one component at a time", "group": "one block at a time"}

_caches: WeakKeyDictionary[nn.Module, WeightCache] = WeakKeyDictionary()


@dataclass(frozen=True)
class Images:
    """A call of the pipeline: what its activations depend on."""

    count: int = 1
    height: int = 1024
    width: int = 1024


@dataclass(frozen=True)
class Needs:
    """Bytes that a pipeline needs on its device.

    `resident`: weights that are there in any mode. `encoders`: the weights of each text encoder. `layers`: of each the
    most that it needs at a time. `blocks`, `block`: the weights of all blocks and of the largest. `beside`: weights
    that come in addition, such as replacements. `denoising`, `decoding`: activations, estimated.
    """

    resident: int
    encoders: tuple[int, ...]
    layers: tuple[int, ...]
    blocks: int
    block: int
    beside: int
    denoising: int
    decoding: int

    def cached(self, mode: str) -> int:
        """The limit of the weight cache: text encoders and blocks on the device at once."""
        if mode == "none":
            return sum(self.encoders) + self.blocks + self.beside
        if mode == "model":
            return max((self.blocks, *self.encoders))
        # One that is used, and the next one on its way.
        return max((2 * self.block, *self.layers))

    def weights(self, mode: str) -> int:
        return self.resident + self.cached(mode)

    def total(self, mode: str) -> int:
        """With activations. Where weights come and go, none are there while the VAE decodes."""
        if mode == "none":
            return self.weights(mode) + max(self.denoising, self.decoding)
        return self.resident + max(self.cached(mode) + self.denoising, self.decoding)


@dataclass(frozen=True)
class Placement:
    """What became of `offload`. `mode`: none, model or group. `free`: bytes of the device; None: not limited."""

    mode: str
    needs: Needs
    free: int | None
    cache: WeightCache | None = None

    def __str__(self) -> str:
        others = ", ".join(f"{mode} {_gb(self.needs.total(mode))}" for mode in _WORDS)
        room = "is not limited" if self.free is None else f"has {_gb(self.free)} GB free"
        return (
            f"offload: {self.mode} ({_WORDS[self.mode]}), where the memory of the device {room} and the modes need, in "
            f"GB: {others}"
        )


def place(pipeline: Any, device: str, memory: Memory, images: Images | None = None, beside: int = 0) -> Placement:
    """Put a pipeline that was loaded on the host where it runs.

    `images`: the largest call. `beside`: bytes of weights that come in addition, such as replacements. Raises
    `UserError` where the device is too small.
    """
    needs = needs_of(pipeline, images or Images(), beside)
    free = free_bytes(device, memory.device_gb)
    mode = choose_mode(memory.offload, needs, free)
    cache = None
    if mode == "none":
        pipeline.to(device)
    else:
        limit = needs.cached(mode)
        if memory.offload == "auto" and mode == "model" and free is not None:
            limit = max(limit, free - needs.resident - needs.denoising)
        cache = _attach(pipeline, device, limit)
    placement = Placement(mode, needs, free, cache)
    logging.getLogger(__name__).info("%s", placement)
    return placement


def cache_of(transformer: nn.Module) -> WeightCache | None:
    """The cache that a transformer's blocks go through; None where all of it is on its device."""
    return _caches.get(transformer)


def free_bytes(device: str, most_gb: float | None) -> int | None:
    """What may be used of a device; None for the host's own memory, unless it is limited."""
    limit = None if most_gb is None else round(most_gb * 1e9)
    if torch.device(device).type != "cuda":
        return limit
    free, _ = torch.cuda.mem_get_info(device)
    return free if limit is None else min(free, limit)


def choose_mode(offload: str, needs: Needs, free: int | None) -> str:
    """`offload`, or for auto the first of none, model and group that fits. Raises `UserError` where none does.

    Activations are estimated, so they alone refuse nothing.
    """
    if offload != "auto":
        if free is not None and needs.weights(offload) > free:
            raise _too_small(offload, needs, free)
        return offload
    if free is None or needs.total("none") <= free:
        return "none"
    if needs.total("model") <= free:
        return "model"
    if needs.weights("group") > free:
        raise _too_small("group", needs, free)
    return "group"


def _too_small(mode: str, needs: Needs, free: int) -> UserError:
    fits = [other for other in _WORDS if needs.total(other) <= free]
    advice = (
        f"set memory.offload to {fits[0]} or auto"
        if fits
        else f"the smallest that would do has {_gb(needs.total('group'))} GB free, with memory.offload: group"
    )
    return UserError(
        f"the device has {_gb(free)} GB for the pipeline, and memory.offload: {mode} needs {_gb(needs.weights(mode))} "
        f"GB for weights alone; {advice}"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g}"


def needs_of(pipeline: Any, images: Images, beside: int = 0) -> Needs:
    transformer, vae = pipeline.transformer, getattr(pipeline, "vae", None)
    encoders = list(_encoders(pipeline))
    blocks = [] if transformer is None else adapter_of(transformer).blocks(transformer)
    in_blocks = sum(map(tensor_bytes, blocks))
    rest = 0 if transformer is None else tensor_bytes(transformer) - in_blocks
    return Needs(
        resident=rest + (tensor_bytes(vae) if vae is not None else 0),
        encoders=tuple(map(tensor_bytes, encoders)),
        layers=tuple(_most_at_once(encoder) for encoder in encoders),
        blocks=in_blocks,
        block=max(map(tensor_bytes, blocks), default=0),
        beside=beside,
        denoising=0 if transformer is None else _denoising_bytes(transformer, images),
        decoding=0 if vae is None else _decoding_bytes(vae, images),
    )


def _most_at_once(encoder: nn.Module) -> int:
    """Two layers of a text encoder, and what it has beside them."""
    layers = [tensor_bytes(layer) for layer in _layers(encoder)]
    return tensor_bytes(encoder) - sum(layers) + 2 * max(layers, default=0)


def _denoising_bytes(transformer: Any, images: Images) -> int:
    tokens = images.height * images.width // 16**2 + _TEXT_TOKENS
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return images.count * tokens * width * transformer.dtype.itemsize * _STREAM_COPIES


def _decoding_bytes(vae: Any, images: Images) -> int:
    width = (getattr(vae.config, "block_out_channels", None) or (_VAE_WIDTH,))[0]
    count = 1 if getattr(vae, "use_slicing", False) else images.count
    return count * images.height * images.width * width * vae.dtype.itemsize * _PIXEL_COPIES


def _encoders(pipeline: Any) -> Iterator[nn.Module]:
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder") and isinstance(component, nn.Module):
            yield component


def _layers(encoder: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    layers: list[nn.Module] = []
    for below in encoder.children():
        layers += list(below) if isinstance(below, nn.ModuleList) else _layers(below)
    return layers


def _attach(pipeline: Any, device: str, limit: int) -> WeightCache:
    transformer, vae = pipeline.transformer, getattr(pipeline, "vae", None)
    encoders = list(_encoders(pipeline))
    layers = [_layers(encoder) for encoder in encoders]

    def blocks() -> list[nn.Module]:
        return [] if transformer is None else adapter_of(transformer).blocks(transformer)

    def following(module: nn.Module) -> nn.Module | None:
        running = blocks()
        # The first block comes after the last one, in the next step.
        return _next_of(module, (running + running[:1], *layers))

    cache = WeightCache(device, limit, following)
    for module in (*encoders, *(layer for some in layers for layer in some), *blocks()):
        cache.attach(module)
    if vae is not None:
        vae.to(device)
        vae._hf_hook = _ClearBefore(cache)
    if transformer is not None:
        _move_all_but(transformer, {id(block) for block in blocks()}, device)
        _caches[transformer] = cache
    return cache


def _next_of(module: nn.Module, sequences: tuple[list[nn.Module], ...]) -> nn.Module | None:
    """The module after one in its list; None where it is in none of them, or the last."""
    for sequence in sequences:
        for one, other in itertools.pairwise(sequence):
            if one is module:
                return other
    return None


def _move_all_but(module: nn.Module, apart: set[int], device: str) -> None:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            tensor.data = tensor.data.to(device)
    for below in module._modules.values():
        if below is not None and id(below) not in apart:
            _move_all_but(below, apart, device)


class _ClearBefore(ModelHook):
    """Called by a VAE before it encodes or decodes: its activations need the memory that weights took."""

    def __init__(self, cache: WeightCache):
        self.cache = cache

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.cache.clear()
        return args, kwargs
