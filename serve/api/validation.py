"""From what a client asked for to what the engine is asked for, within what this server serves."""

from __future__ import annotations

import secrets

from serve.api.errors import invalid, shown
from serve.api.schema import LARGEST_SEED, ImageRequest
from serve.config import Limits
from serve.protocol import GenerationRequest, PipelineInfo


def generation(asked: ImageRequest, id: str, info: PipelineInfo, limits: Limits) -> GenerationRequest:
    """Raises `Refused`: with 422 that names the limit for a request that is well-formed and too much, with 404 for a model that
    can be none."""
    # A variant's name goes into a header, where no other character may stand; none has one.
    for name in ("model", "min_variant"):
        value = getattr(asked, name) or ""
        if not (value.isascii() and value.isprintable()):
            raise invalid(f"there is no model {shown(value)}", name, "model_not_found", 404)
    for name in ("prompt", "negative_prompt"):
        characters = len(getattr(asked, name) or "")
        if characters > limits.prompt_characters:
            raise invalid(
                f"{name} has {characters} characters; at most {limits.prompt_characters} are taken",
                name,
                "string_too_long",
                422,
            )
    for name in asked.arguments:
        if name not in info.arguments:
            takes = f"it takes {', '.join(info.arguments)}" if info.arguments else "leave it out"
            raise invalid(f"this pipeline takes no {name}; {takes}", name, "unsupported_parameter", 422)
    width, height = _size(asked.size, info, limits)
    steps = asked.num_inference_steps or info.steps
    if steps > limits.steps:
        raise invalid(
            f"num_inference_steps is {steps}; at most {limits.steps} are taken",
            "num_inference_steps",
            "limit_exceeded",
            422,
        )
    if asked.n > limits.pictures:
        raise invalid(
            f"n is {asked.n}; at most {limits.pictures} images are made for one request", "n", "limit_exceeded", 422
        )
    work = asked.n * width * height * steps
    if work > limits.work:
        raise invalid(
            f"{asked.n} × {width}x{height} pixels × {steps} steps is {work}; at most {limits.work} is done for one request: ask for "
            "fewer or smaller images, or fewer steps",
            "n" if asked.n > 1 else "size",
            "limit_exceeded",
            422,
        )
    return GenerationRequest(
        id=id,
        prompt=asked.prompt,
        model=asked.model,
        count=asked.n,
        height=height,
        width=width,
        steps=steps,
        seed=secrets.randbelow(LARGEST_SEED + 1) if asked.seed is None else asked.seed,
        arguments=asked.arguments,
        previews=asked.partial_images,
        deadline=None if asked.deadline_ms is None else asked.deadline_ms / 1000,
        min_variant=asked.min_variant,
    )


def _size(size: str, info: PipelineInfo, limits: Limits) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = (info.width, info.height) if size == "auto" else map(int, size.split("x"))
    if width % info.multiple or height % info.multiple:
        near = "x".join(str(max(1, round(side / info.multiple)) * info.multiple) for side in (width, height))
        raise invalid(
            f"size is {size}; both sides are multiples of {info.multiple} here, such as {near}",
            "size",
            "invalid_value",
            422,
        )
    if width * height > limits.pixels:
        raise invalid(
            f"size is {size}, {width * height} pixels; at most {limits.pixels} are made", "size", "limit_exceeded", 422
        )
    if max(width, height) > limits.aspect * min(width, height):
        raise invalid(
            f"size is {size}; the longer side is at most {limits.aspect:g} times the shorter one",
            "size",
            "limit_exceeded",
            422,
        )
    return width, height
