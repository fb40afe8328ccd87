"""Variants as models: the answers of `GET /v1/models`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from serve.api.errors import invalid, shown
from serve.config import Limits
from serve.protocol import AUTO, WITH, ModelInfo, PipelineInfo, Refused


def listing(infos: list[ModelInfo], pipeline: PipelineInfo, limits: Limits, created: int) -> dict[str, Any]:
    """Return OpenAI's list of models, extended by the pipeline's defaults and the limits of a request."""
    return {
        "object": "list",
        "data": [auto(pipeline, created), *(model(info, created) for info in infos), *with_loras(infos, created)],
        "loras": list(pipeline.loras),
        "defaults": {"size": f"{pipeline.width}x{pipeline.height}", "num_inference_steps": pipeline.steps},
        "arguments": list(pipeline.arguments),
        "multiple": pipeline.multiple,
        "limits": limits.model_dump(),
    }


def model(info: ModelInfo, created: int) -> dict[str, Any]:
    """Return a variant as a model. Its LoRAs are models of their own, see `with_loras`."""
    return {"object": "model", "created": created, "owned_by": "ppcl", **asdict(info) | {"loras": list(info.loras)}}


def with_loras(infos: list[ModelInfo], created: int) -> list[dict[str, Any]]:
    """Return every variant with every LoRA as a model, `half+ink`. `lora_share`: what of the LoRA is on with it.

    What was measured of the variant was so without the LoRA.
    """
    return [
        {
            "id": f"{info.id}{WITH}{lora}",
            "object": "model",
            "created": created,
            "owned_by": "ppcl",
            "variant": info.id,
            "lora": lora,
            "lora_share": share,
        }
        for info in infos
        for lora, share in info.loras.items()
    ]


def auto(pipeline: PipelineInfo, created: int) -> dict[str, Any]:
    """Return the model `auto`: the largest of its variants that is expected to meet the deadline."""
    return {
        "id": AUTO,
        "object": "model",
        "created": created,
        "owned_by": "ppcl",
        "variants": list(pipeline.auto),
    }


def retrieve(name: str, infos: list[ModelInfo], pipeline: PipelineInfo, created: int) -> dict[str, Any]:
    """Return one model. Raises `Refused` with 404 where there is no such model."""
    if name == AUTO:
        return auto(pipeline, created)
    for info in infos:
        if info.id == name:
            return model(info, created)
    for combined in with_loras(infos, created):
        if combined["id"] == name:
            return combined
    raise unknown_model(name, infos)


def unknown_model(name: str, infos: list[ModelInfo], param: str = "model") -> Refused:
    return invalid(
        f"there is no model {shown(name)}; there are {', '.join([AUTO, *(info.id for info in infos)])}",
        param,
        "model_not_found",
        404,
    )
