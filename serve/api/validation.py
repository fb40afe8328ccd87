"""Validation: converts a client's parameters to a request to the engine, within the configured limits."""

from __future__ import annotations

import secrets

from serve.api.errors import invalid, shown
from serve.api.schema import LARGEST_SEED, ImageRequest
from serve.config import Limits
from serve.protocol import WITH, GenerationRequest, LoraOn, PipelineInfo


def to_generation_request(parameters: ImageRequest, id: str, info: PipelineInfo, limits: Limits) -> GenerationRequest:
    """Convert a client's parameters, within the limits of this server.

    Raises `Refused` with 422 that names the limit for a request that exceeds one, and with 404 for an impossible model.
    """
    _check_names(parameters)
    _check_prompts(parameters, limits)
    _check_arguments(parameters, info)
    model, lora = _model_and_lora(parameters, info)
    width, height = _size(parameters.size, info, limits)
    steps = parameters.num_inference_steps or info.steps
    _check_work(parameters, width, height, steps, limits)
    return GenerationRequest(
        id=id,
        prompt=parameters.prompt,
        model=model,
        count=parameters.n,
        height=height,
        width=width,
        steps=steps,
        seed=secrets.randbelow(LARGEST_SEED + 1) if parameters.seed is None else parameters.seed,
        arguments=parameters.arguments,
        previews=parameters.partial_images,
        deadline=None if parameters.deadline_ms is None else parameters.deadline_ms / 1000,
        min_variant=parameters.min_variant,
        lora=lora,
    )


def _model_and_lora(parameters: ImageRequest, info: PipelineInfo) -> tuple[str, LoraOn | None]:
    """The variant that a request names, and its LoRA. Raises `Refused` with 404 for one that is not served."""
    model, _, suffix = parameters.model.partition(WITH)
    if parameters.lora is not None:
        lora = LoraOn(parameters.lora.name, parameters.lora.scale)
    elif suffix:
        lora = LoraOn(suffix)
    else:
        return parameters.model, None
    if lora.name not in info.loras:
        known = f"there are {', '.join(info.loras)}" if info.loras else "this server has none"
        raise invalid(f"there is no LoRA {shown(lora.name)}; {known}", "lora", "lora_not_found", 404)
    return model, lora


def _check_names(parameters: ImageRequest) -> None:
    # A variant's name is sent in a header, which takes printable ASCII only; no variant has another name.
    for name in ("model", "min_variant"):
        value = getattr(parameters, name) or ""
        if not (value.isascii() and value.isprintable()):
            raise invalid(f"there is no model {shown(value)}", name, "model_not_found", 404)


def _check_prompts(parameters: ImageRequest, limits: Limits) -> None:
    for name in ("prompt", "negative_prompt"):
        characters = len(getattr(parameters, name) or "")
        if characters > limits.prompt_characters:
            message = f"{name} has {characters} characters; at most {limits.prompt_characters} are taken"
            raise invalid(message, name, "string_too_long", 422)


def _check_arguments(parameters: ImageRequest, info: PipelineInfo) -> None:
    for name in parameters.arguments:
        if name not in info.arguments:
            takes = f"it takes {', '.join(info.arguments)}" if info.arguments else "leave it out"
            raise invalid(f"this pipeline takes no {name}; {takes}", name, "unsupported_parameter", 422)


def _check_work(parameters: ImageRequest, width: int, height: int, steps: int, limits: Limits) -> None:
    count = parameters.n
    if steps > limits.steps:
        message = f"num_inference_steps is {steps}; at most {limits.steps} are taken"
        raise invalid(message, "num_inference_steps", "limit_exceeded", 422)
    if count > limits.pictures:
        message = f"n is {count}; at most {limits.pictures} images are made for one request"
        raise invalid(message, "n", "limit_exceeded", 422)
    work = count * width * height * steps
    if work > limits.work:
        raise invalid(
            f"{count} × {width}x{height} pixels × {steps} steps is {work}; at most {limits.work} is done for one "
            "request: ask for fewer or smaller images, or fewer steps",
            "n" if count > 1 else "size",
            "limit_exceeded",
            422,
        )


def _size(size: str, info: PipelineInfo, limits: Limits) -> tuple[int, int]:
    """Return width and height in pixels. Raises `Refused` with 422."""
    width, height = (info.width, info.height) if size == "auto" else map(int, size.split("x"))
    if width % info.multiple or height % info.multiple:
        near = "x".join(str(max(1, round(side / info.multiple)) * info.multiple) for side in (width, height))
        raise invalid(
            f"size is {size}; both sides are multiples of {info.multiple} here, such as {near}",
            "size",
            "invalid_value",
            422,
        )
    if info.largest is not None and max(width, height) > info.largest:
        raise invalid(
            f"size is {size}; the positions of this model reach to {info.largest} pixels a side",
            "size",
            "limit_exceeded",
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
