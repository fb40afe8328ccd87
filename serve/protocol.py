"""What passes between the API and the engine: requests in, events out. Plain data, so that it also crosses Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

AUTO = "auto"


@dataclass(frozen=True)
class GenerationRequest:
    """Images of one prompt that a client wants.

    `model`: a variant's name, a plan as text, or `auto`. `count`: images, each with its own seed, `seed + index`.
    `arguments`: further arguments of the pipeline's call, such as `negative_prompt`, `true_cfg_scale`. `previews`: partial
    images wanted of each. `deadline`: seconds from its admission until all images are wanted, None for no hurry.
    `min_variant`: the smallest variant that `auto` may take.
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


@dataclass(frozen=True)
class Accepted:
    """The first event: the variant that will be used, and whether `auto` took a smaller one than the largest for lack of time."""

    variant: str
    degraded: bool
    expected_seconds: float


@dataclass(frozen=True)
class Preview:
    """What image `index` looks like after `step` of its steps: `image (H, W, 3)` uint8. `number` counts its previews from 0."""

    index: int
    number: int
    step: int
    image: np.ndarray


@dataclass(frozen=True)
class FinalImage:
    """Image `index`, finished: `image (H, W, 3)` uint8. `seconds`: by phase (`queued`, `encoding`, `denoising`, `decoding`)."""

    index: int
    image: np.ndarray
    seed: int
    prompt_tokens: int
    seconds: dict[str, float]


Event = Accepted | Preview | FinalImage


class Refused(Exception):
    """A request that is not served, as the client is told: HTTP status, OpenAI error type and code, one sentence, the key it is
    about, and seconds after which to try again."""

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
    """A variant as clients see it. `share`: of the teacher's parameters; `quality`: score from the result's evaluation in
    [0, 1], None where it has none; `seconds_per_step`: profiled at start, for one image of the default size."""

    id: str
    parameters: int
    share: float
    blocks: int
    quality: float | None
    seconds_per_step: float | None


@dataclass(frozen=True)
class PipelineInfo:
    """How the pipeline is called where a request does not say: `steps`, `height`, `width`, those of the result's evaluation.

    `multiple`: pixels of which both sides are a multiple, one token of the transformer. `arguments`: names of the further
    arguments that `GenerationRequest.arguments` may hold, such as `negative_prompt`.
    """

    steps: int
    height: int
    width: int
    multiple: int
    arguments: tuple[str, ...]


class Backend(Protocol):
    """What the API stands on: an engine in this process, or replicas of it behind a Ray Serve handle."""

    async def models(self) -> list[ModelInfo]:
        """The named variants, the largest first; `auto` is the API's own."""
        ...

    async def pipeline(self) -> PipelineInfo: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """`Accepted` first, then the others as they come; raises `Refused`. Closing it (`aclose`) cancels what is not done."""
        ...

    async def healthy(self) -> bool: ...

    async def metrics_text(self) -> str:
        """The engine's metrics in Prometheus' text format, which `/metrics` shows after those of HTTP. They are named
        `ppcl_*`; HTTP's are named `ppcl_http_*`. On a cluster: of the replica that was asked; Ray's own endpoint has all."""
        ...
