"""Answers: encoded images with their metadata."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from serve.api.schema import ImageRequest
from serve.protocol import Accepted, FinalImage, GenerationRequest, PipelineInfo, Preview

VARIANT_HEADER, DEGRADED_HEADER = "x-ppcl-variant", "x-ppcl-degraded"


async def base64_of(image: np.ndarray, parameters: ImageRequest) -> str:
    """Encode an image (H, W, 3) uint8 as a file in base64, in a thread, since a large one takes long."""
    return await asyncio.to_thread(_encode, image, parameters)


def _encode(image: np.ndarray, parameters: ImageRequest) -> str:
    quality = 100 if parameters.output_compression is None else parameters.output_compression
    # The lowest effort for png takes a fifth of the default's time for a tenth more bytes.
    options = {"compress_level": 1} if parameters.output_format == "png" else {"quality": quality}
    file = io.BytesIO()
    Image.fromarray(image).save(file, parameters.output_format, **options)
    return base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Answer:
    """What the answers to one request are made of. `started`: when it arrived, by `time.monotonic()`."""

    parameters: ImageRequest
    request: GenerationRequest
    info: PipelineInfo
    accepted: Accepted
    started: float

    def headers(self) -> dict[str, str]:
        """Return the served variant as headers, for clients that do not read the body."""
        return {VARIANT_HEADER: self.accepted.variant, DEGRADED_HEADER: str(self.accepted.degraded).lower()}

    async def complete(self, images: Sequence[FinalImage]) -> dict[str, Any]:
        """Return OpenAI's `ImagesResponse`, extended by variant, `degraded`, seeds and seconds by phase."""
        seconds = time.monotonic() - self.started
        files = await asyncio.gather(*(base64_of(image.image, self.parameters) for image in images))
        return {
            "created": int(time.time()),
            "data": [
                {"b64_json": file, "seed": image.seed, "timings": image.seconds}
                for file, image in zip(files, images, strict=True)
            ],
            "size": self._size,
            "output_format": self.parameters.output_format,
            "background": "opaque",
            "usage": self._usage(images),
            **self._served,
            "seed": self.request.seed,
            "num_inference_steps": self.request.steps,
            "timings": {"expected": self.accepted.expected_seconds, "total": seconds},
        }

    async def partial_event(self, preview: Preview) -> dict[str, Any]:
        """Return `image_generation.partial_image`, extended by the image's `index` and the `step` of the preview."""
        return {
            **self._event("partial_image", await base64_of(preview.image, self.parameters)),
            "partial_image_index": preview.number,
            "index": preview.index,
            "step": preview.step,
        }

    async def completed_event(self, image: FinalImage) -> dict[str, Any]:
        """Return `image_generation.completed` of one image, extended by its `index`, `seed` and what was served."""
        seconds = time.monotonic() - self.started
        return {
            **self._event("completed", await base64_of(image.image, self.parameters)),
            "usage": self._usage([image]),
            "index": image.index,
            "seed": image.seed,
            **self._served,
            "num_inference_steps": self.request.steps,
            "timings": {**image.seconds, "expected": self.accepted.expected_seconds, "total": seconds},
        }

    def _event(self, kind: str, file: str) -> dict[str, Any]:
        quality = self.parameters.quality
        return {
            "type": f"image_generation.{kind}",
            "b64_json": file,
            "background": "opaque",
            "created_at": int(time.time()),
            "output_format": self.parameters.output_format,
            "quality": {"standard": "medium", "hd": "high"}.get(quality, quality),
            "size": self._size,
        }

    def _usage(self, images: Sequence[FinalImage]) -> dict[str, Any]:
        """Return the prompt's tokens, counted once, and the transformer's image tokens of all images."""
        text_tokens = max(image.prompt_tokens for image in images)
        per_image = (self.request.height // self.info.multiple) * (self.request.width // self.info.multiple)
        image_tokens = len(images) * per_image
        return {
            "input_tokens": text_tokens,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": text_tokens},
            "output_tokens": image_tokens,
            "total_tokens": text_tokens + image_tokens,
        }

    @property
    def _served(self) -> dict[str, Any]:
        return {"variant": self.accepted.variant, "degraded": self.accepted.degraded}

    @property
    def _size(self) -> str:
        return f"{self.request.width}x{self.request.height}"
