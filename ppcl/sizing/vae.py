"""What a VAE takes beside its weights: the stock model runs on fake tensors, so the bytes are those of its own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl.models.teacher import vae_shrinks_by
from ppcl.sizing.model import SampleBytes
from ppcl.sizing.peak_memory import PeakMemory

_CHANNELS = 3
_SINGLE = 4


@dataclass(frozen=True)
class VaeMemory:
    """The most bytes alive at once while images are decoded or encoded, by their number, without the weights."""

    decoding: SampleBytes
    encoding: SampleBytes

    @classmethod
    def of(cls, config: Mapping[str, Any], height: int, width: int, dtype: torch.dtype) -> VaeMemory:
        """`config`: the VAE's `config.json`. `height`, `width`: of the images, pixels; they are rounded down.

        Costs a second, whatever the sizes.
        """
        import diffusers

        shrinks = vae_shrinks_by(config)
        height, width = (max(side // shrinks, 1) * shrinks for side in (height, width))
        # The VAE of Qwen-Image is one of videos: an image is a clip of one frame.
        frames = (1,) if "z_dim" in config else ()
        channels = config["z_dim"] if "z_dim" in config else config["latent_channels"]

        def peak(call: Any, count: int, channels: int, height: int, width: int) -> int:
            images = torch.zeros(count, channels, *frames, height, width)
            with torch.no_grad(), PeakMemory() as memory:
                memory.hold(images)
                call(images)
            return memory.peak * dtype.itemsize // _SINGLE

        with FakeTensorMode(allow_non_fake_inputs=True):
            vae = getattr(diffusers, config["_class_name"]).from_config(dict(config)).eval()
            latents = channels, height // shrinks, width // shrinks
            decoding = [peak(vae.decode, count, *latents) for count in (1, 2)]
            encoding = [peak(vae.encode, count, _CHANNELS, height, width) for count in (1, 2)]
        return cls(SampleBytes.through(*decoding), SampleBytes.through(*encoding))
