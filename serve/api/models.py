"""Variants as models: what `GET /v1/models` tells of each, and of `auto`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from serve.api.errors import invalid, shown
from serve.config import Limits
from serve.protocol import AUTO, ModelCard, PipelineCard, Refused


def listing(cards: list[ModelCard], pipeline: PipelineCard, limits: Limits, created: int) -> dict[str, Any]:
    """OpenAI's list of models; ours: how the pipeline is called by default, and what one request may ask for."""
    return {
        "object": "list",
        "data": [auto(cards, created), *(model(card, created) for card in cards)],
        "defaults": {"size": f"{pipeline.width}x{pipeline.height}", "num_inference_steps": pipeline.steps},
        "arguments": list(pipeline.arguments),
        "multiple": pipeline.multiple,
        "limits": limits.model_dump(),
    }


def model(card: ModelCard, created: int) -> dict[str, Any]:
    return {"object": "model", "created": created, "owned_by": "ppcl", **asdict(card)}


def auto(cards: list[ModelCard], created: int) -> dict[str, Any]:
    """The model that is one of the others: the largest whose pictures are expected in time."""
    return {
        "id": AUTO,
        "object": "model",
        "created": created,
        "owned_by": "ppcl",
        "variants": [card.id for card in cards],
    }


def one(name: str, cards: list[ModelCard], created: int) -> dict[str, Any]:
    """Raises `Refused` with 404 where there is no such model."""
    if name == AUTO:
        return auto(cards, created)
    for card in cards:
        if card.id == name:
            return model(card, created)
    raise unknown_model(name, cards)


def unknown_model(name: str, cards: list[ModelCard], param: str = "model") -> Refused:
    return invalid(
        f"there is no model {shown(name)}; there are {', '.join([AUTO, *(card.id for card in cards)])}",
        param,
        "model_not_found",
        404,
    )
