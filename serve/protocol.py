"""Requests and events between the API and the engine: plain data, so that Ray can send them between processes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

AUTO = "auto"
# Between a variant's name and a LoRA's in the name of a model.
WITH = "+"


@dataclass(frozen=True)
class LoraOn:
    """A LoRA of the server by name, and how strongly it is on: `scale` times what it was trained to."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """A request for images of one prompt.

    `model`: a variant's name, a plan as text, or `auto`. `count`: number of images; image i has the seed `seed + i`.
    `arguments`: further arguments of the pipeline's call, such as `negative_prompt`, `true_cfg_scale`. `previews`:
    partial images of each. `deadline`: seconds from admission to the last image, None without one. `min_variant`: the
    smallest variant that `auto` may take. `lora`: one of the server's.
    """

    id: str
    prompt: str
    model: str
    count: int
    height: int
    width: int
    steps: int
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)
    previews: int = 0
    deadline: float | None = None
    min_variant: str | None = None
    lora: LoraOn | None = None


@dataclass(frozen=True)
class Accepted:
    """The first event. `degraded`: `auto` chose a smaller variant than the largest for lack of time."""

    variant: str
    degraded: bool
    expected_seconds: float


@dataclass(frozen=True)
class Preview:
    """A preview of image `index` after `step` steps. `image`: (H, W, 3) uint8. `number` counts its previews from 0."""

    index: int
    number: int
    step: int
    image: np.ndarray


@dataclass(frozen=True)
class FinalImage:
    """The finished image `index`. `image`: (H, W, 3) uint8.

    `seconds`: by phase (`queued`, `encoding`, `denoising`, `decoding`).
    """

    index: int
    image: np.ndarray
    seed: int
    prompt_tokens: int
    seconds: dict[str, float]


Event = Accepted | Preview | FinalImage


class Refused(Exception):
    """A refused request: HTTP status, OpenAI's error type and code, one sentence, and the parameter it is about.

    `retry_after`: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(status, type, message, code, param, retry_after)
        self.status, self.type, self.message = status, type, message
        self.code, self.param, self.retry_after = code, param, retry_after

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class ModelInfo:
    """A variant as clients see it. `share`: of the teacher's parameters.

    `quality`: in [0, 1], the prompt checker's score, or what is left of the teacher's score by `elastic.score`; None
    without one. `seconds_per_step`: profiled at the start for one image of the default size. `loras`: by name of the
    server's LoRAs, the share of it that the variant takes.
    """

    id: str
    parameters: int
    share: float
    blocks: int
    quality: float | None
    seconds_per_step: float | None
    loras: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineInfo:
    """The pipeline's defaults `steps`, `height` and `width`, which are those of the result's evaluation.

    `multiple`: both sides of an image are multiples of so many pixels, the size of one token of the transformer.
    `largest`: the longest side of an image, pixels; None where there is none.
    `auto`: the variants that `auto` takes, from large to small. `auto_by`: why these.
    `arguments`: names that `GenerationRequest.arguments` may hold, such as `negative_prompt`. `loras`: names of LoRAs.
    """

    steps: int
    height: int
    width: int
    multiple: int
    arguments: tuple[str, ...]
    loras: tuple[str, ...] = ()
    auto: tuple[str, ...] = ()
    auto_by: str = ""
    largest: int | None = None


class Backend(Protocol):
    """What the API is built on: an engine in this process, or replicas of it behind a Ray Serve handle."""

    async def models(self) -> list[ModelInfo]:
        """Return the named variants, the largest first. The API adds `auto`."""
        ...

    async def pipeline(self) -> PipelineInfo: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yield `Accepted`, then the other events as they come. Raises `Refused`. Closing it cancels the rest."""
        ...

    async def healthy(self) -> bool: ...

    async def metrics_text(self) -> str:
        """Return the engine's metrics, named `ppcl_*`, in Prometheus' text format.

        `/metrics` shows them after those of HTTP, named `ppcl_http_*`. On a cluster they are those of the replica that
        answered; Ray's own endpoint has all.
        """
        ...
