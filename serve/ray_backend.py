"""The API's backend over replicas of the engine: cancellation, retries, and Ray's errors converted to ours."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.config import Http
from serve.protocol import Accepted, Event, FinalImage, GenerationRequest, ModelInfo, PipelineInfo, Preview, Refused

# Seconds for an answer that does not depend on the replica's load.
_ANSWER_TIMEOUT_S = 10.0
_RETRY_AFTER = 2.0


class RayBackend:
    """`handle`: of the deployment of `serve.ray_app.Replica`."""

    def __init__(self, handle: DeploymentHandle, settings: Http):
        self._handle, self._settings = handle, settings
        self._models: list[ModelInfo] | None = None
        self._pipeline: PipelineInfo | None = None

    async def models(self) -> list[ModelInfo]:
        if self._models is None:
            self._models = await self._ask("models")
        return self._models

    async def pipeline(self) -> PipelineInfo:
        if self._pipeline is None:
            self._pipeline = await self._ask("pipeline")
        return self._pipeline

    async def metrics_text(self) -> str:
        return await self._ask("metrics_text")

    async def healthy(self) -> bool:
        try:
            return await self._ask("healthy")
        except Refused:
            return False

    async def _ask(self, method: str) -> Any:
        response = getattr(self._handle, method).remote()
        try:
            return await asyncio.wait_for(response, _ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise _unavailable("no replica answers yet; try again soon", "not_ready") from None
        except BackPressureError as error:
            raise _full(error) from None
        except (RayError, RayServeException):
            raise _unavailable("no replica answers; try again soon", "not_ready") from None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate the images. A request whose replica dies is retried on another one, with the same variant and seeds.

        Events that were yielded before are not repeated.
        """
        started_at = time.monotonic()
        yielded: set[tuple[Any, ...]] = set()
        accepted: Accepted | None = None
        for _ in range(self._settings.attempts):
            events = self._events(_retry(request, accepted, time.monotonic() - started_at))
            try:
                async for event in events:
                    if (key := _key(event)) not in yielded:
                        yielded.add(key)
                        accepted = event if isinstance(event, Accepted) else accepted
                        yield event
            except _ReplicaLost:
                continue
            finally:
                await events.aclose()
            return
        raise _unavailable("the replicas that generated the images died; try again soon", "replica_lost")

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of one replica. Raises `Refused` or `_ReplicaLost`."""
        response = self._handle.options(stream=True).generate.remote(request)
        remaining = request.count
        timeout: float | None = self._settings.assign_seconds
        try:
            while remaining:
                try:
                    event = await asyncio.wait_for(anext(response), timeout)
                except TimeoutError:
                    raise _unavailable("no replica took the request in time; try again soon", "not_ready") from None
                except BackPressureError as error:
                    raise _full(error) from None
                except (RayActorError, TaskCancelledError, RayServeException, StopAsyncIteration) as error:
                    raise _ReplicaLost from error
                except RayError as error:
                    raise Refused(500, "server_error", "the replica failed; see its log", "engine_error") from error
                if isinstance(event, Refused):
                    raise event
                remaining -= isinstance(event, FinalImage)
                # Only the assignment to a replica is limited.
                timeout = None
                yield event
        finally:
            # Has no effect on a finished request; raises the reason again where no replica took it.
            with contextlib.suppress(RayError, RayServeException):
                response.cancel()


class _ReplicaLost(Exception):
    """The replica died or stopped before its last event."""


def _retry(request: GenerationRequest, accepted: Accepted | None, seconds: float) -> GenerationRequest:
    """Return the request for a retry: with the accepted variant and the remaining time."""
    deadline = None if request.deadline is None else max(0.0, request.deadline - seconds)
    return dataclasses.replace(request, model=accepted.variant if accepted else request.model, deadline=deadline)


def _key(event: Event) -> tuple[Any, ...]:
    if isinstance(event, Preview):
        return "preview", event.index, event.number
    return ("image", event.index) if isinstance(event, FinalImage) else ("accepted",)


def _unavailable(message: str, code: str) -> Refused:
    return Refused(503, "server_error", message, code, retry_after=_RETRY_AFTER)


def _full(error: BackPressureError) -> Refused:
    return Refused(
        429,
        "rate_limit_error",
        "every replica has as many requests as it takes; try again later",
        "queue_full",
        retry_after=error.retry_after_s or _RETRY_AFTER,
    )
