"""Images as files, and what an answer says of them."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from serve.api.schema import ImageRequest
from serve.protocol import Accepted, FinalImage, GenerationRequest, PipelineInfo, Preview

VARIANT, DEGRADED = "x-ppcl-variant", "x-ppcl-degraded"


async def base64_of(image: np.ndarray, asked: ImageRequest) -> str:
    """The image `(H, W, 3)` uint8 as a file in base64, made in a thread: a large one takes a while."""
    return await asyncio.to_thread(_encoded, image, asked)


def _encoded(image: np.ndarray, asked: ImageRequest) -> str:
    quality = 100 if asked.output_compression is None else asked.output_compression
    # png: the least effort, which takes a fifth of the time of the usual one for a tenth more bytes.
    options = {"compress_level": 1} if asked.output_format == "png" else {"quality": quality}
    file = io.BytesIO()
    Image.fromarray(image).save(file, asked.output_format, **options)
    return base64.b64encode(file.getvalue()).decode()


def headers(accepted: Accepted) -> dict[str, str]:
    """What was served, where a client does not read the body."""
    return {VARIANT: accepted.variant, DEGRADED: str(accepted.degraded).lower()}


def usage(pictures: Sequence[FinalImage], request: GenerationRequest, info: PipelineInfo) -> dict[str, Any]:
    """The prompt's tokens, once however many images, and the transformer's image tokens of every image."""
    text = max(picture.prompt_tokens for picture in pictures)
    image = len(pictures) * (request.height // info.multiple) * (request.width // info.multiple)
    return {
        "input_tokens": text,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": text},
        "output_tokens": image,
        "total_tokens": text + image,
    }


def _disclosed(accepted: Accepted) -> dict[str, Any]:
    return {"variant": accepted.variant, "degraded": accepted.degraded}


def _size(request: GenerationRequest) -> str:
    return f"{request.width}x{request.height}"


async def whole_answer(
    asked: ImageRequest,
    request: GenerationRequest,
    info: PipelineInfo,
    accepted: Accepted,
    pictures: Sequence[FinalImage],
    seconds: float,
) -> dict[str, Any]:
    """OpenAI's `ImagesResponse`, and what was served: variant, whether it was degraded, seed, seconds by phase."""
    files = await asyncio.gather(*(base64_of(picture.image, asked) for picture in pictures))
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": file, "seed": picture.seed, "timings": picture.seconds}
            for file, picture in zip(files, pictures, strict=True)
        ],
        "size": _size(request),
        "output_format": asked.output_format,
        "background": "opaque",
        "usage": usage(pictures, request, info),
        **_disclosed(accepted),
        "seed": request.seed,
        "num_inference_steps": request.steps,
        "timings": {"expected": accepted.expected_seconds, "total": seconds},
    }


def _event(kind: str, asked: ImageRequest, request: GenerationRequest, file: str) -> dict[str, Any]:
    return {
        "type": f"image_generation.{kind}",
        "b64_json": file,
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": asked.output_format,
        "quality": {"standard": "medium", "hd": "high"}.get(asked.quality, asked.quality),
        "size": _size(request),
    }


async def partial_event(asked: ImageRequest, request: GenerationRequest, preview: Preview) -> dict[str, Any]:
    """`image_generation.partial_image`; ours: `index` of the image, and the `step` after which it looks like this."""
    return {
        **_event("partial_image", asked, request, await base64_of(preview.image, asked)),
        "partial_image_index": preview.number,
        "index": preview.index,
        "step": preview.step,
    }


async def completed_event(
    asked: ImageRequest,
    request: GenerationRequest,
    info: PipelineInfo,
    accepted: Accepted,
    picture: FinalImage,
    seconds: float,
) -> dict[str, Any]:
    """`image_generation.completed` of one image; ours: its `index`, `seed` and what was served."""
    return {
        **_event("completed", asked, request, await base64_of(picture.image, asked)),
        "usage": usage([picture], request, info),
        "index": picture.index,
        "seed": picture.seed,
        **_disclosed(accepted),
        "num_inference_steps": request.steps,
        "timings": {**picture.seconds, "expected": accepted.expected_seconds, "total": seconds},
    }
