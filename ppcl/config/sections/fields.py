"""Types of values that several sections have, and the mark of a key that changes no result."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo


def _at_most_a_batch(replicas: int, info: ValidationInfo) -> int:
    size = info.data.get("batch_size", replicas)
    if replicas > size:
        raise ValueError(f"it must not be more than batch_size, {size}: each replica takes samples of every batch")
    return replicas


def _interval_or_text(item: Any) -> Any:
    if isinstance(item, str) or (isinstance(item, list | tuple) and [type(block) for block in item] == [int, int]):
        return item
    raise ValueError("write an interval as [first, last], and anything else as a text such as 'text:3-5'")


# Marks a key that says how a stage is run and not what comes out of it: a change of it makes nothing anew.
OPERATIONAL: dict[str, Any] = {"operational": True}

Decay = Annotated[float, Field(ge=0, lt=1)]
Replicas = Annotated[int, AfterValidator(_at_most_a_batch)]
Share = Annotated[float, Field(gt=0, lt=1)]
# VAEs shrink an image by 8, and published transformers take patches of 2 × 2 of what is left.
Pixels = Annotated[int, Field(ge=8, multiple_of=8)]
PlanItem = Annotated[tuple[int, int] | str, BeforeValidator(_interval_or_text)]
