"""The demo teachers' families: how each one's transformer and stock pipeline are made, and how it answers a batch."""

from ppcl.demo.families.family import Family
from ppcl.demo.families.flux import Flux
from ppcl.demo.families.qwen_image import QwenImage
from ppcl.demo.families.sd3 import SD3

FAMILIES: dict[str, type[Family]] = {"qwen_image": QwenImage, "flux": Flux, "sd3": SD3}

__all__ = ["FAMILIES", "Family"]
