"""The app: routes of OpenAI's Images API, the page, health and metrics, over whatever engine stands behind `Backend`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from serve.api import errors, models
from serve.api import responses as images
from serve.api.auth import ApiKeys
from serve.api.client_disconnect import cancel_on_disconnect
from serve.api.drain import DrainGate
from serve.api.metrics import MEDIA_TYPE, HttpMetrics
from serve.api.middleware import RequestMiddleware
from serve.api.request_body import read_object
from serve.api.schema import ImageRequest, parse
from serve.api.sse import EventStream
from serve.api.validation import generation
from serve.config import Settings
from serve.playground import Page
from serve.protocol import Accepted, Backend, Event, FinalImage, GenerationRequest, PipelineInfo, Preview, Refused

_NOT_READY_SECONDS = 2.0
_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}
}


def create_app(
    backend: Backend, settings: Settings, drain_gate: DrainGate | None = None, behind_ray: bool = False
) -> FastAPI:
    """The API over an engine in this process, or over replicas of it behind a Ray Serve handle.

    `drain_gate`: by which its owner ends it. `behind_ray`: Ray Serve's proxy stands in front, which gives requests their ids.

    Whoever runs it calls `check_exposure` first, and `log_as_json` in the process that serves. Raises `UserError` where the
    API keys cannot be read.
    """
    http, limits, keys, metrics = settings.http, settings.limits, ApiKeys(settings.http), HttpMetrics()
    # The interactive documentation loads scripts from elsewhere; /openapi.json says the same.
    app = FastAPI(title="ppcl", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(
        RequestMiddleware,
        settings=settings,
        keys=keys,
        metrics=metrics,
        drain_gate=drain_gate or DrainGate(),
        behind_ray=behind_ray,
    )
    page, created = Page(key_needed=bool(keys)), int(time.time())

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        request.state.told["error"] = error.code
        return errors.answer(error)

    @app.exception_handler(HTTPException)
    async def router_refused(request: Request, error: HTTPException) -> Response:
        told = errors.from_http(error)
        request.state.told["error"] = told.code
        return errors.answer(told, dict(error.headers or {}))

    @app.post("/v1/images/generations", openapi_extra=_BODY)
    async def generate_images(request: Request) -> Response:
        asked = parse(await read_object(request, http, limits))
        info = await backend.pipeline()
        wanted = generation(asked, request.state.request_id, info, limits)
        events = backend.generate(wanted)
        try:
            accepted = await cancel_on_disconnect(request.receive, _accepted(events))
            request.state.told |= {"variant": accepted.variant, "degraded": accepted.degraded, "images": wanted.count}
            if asked.stream:
                sent = _stream(asked, wanted, info, accepted, events, request.state.started)
                return EventStream(sent, events, images.headers(accepted), http.ping_seconds)
            pictures = await cancel_on_disconnect(request.receive, _pictures(events))
        except BaseException:
            # Nobody wants the rest.
            await events.aclose()
            raise
        seconds = time.monotonic() - request.state.started
        answer = await images.whole_answer(asked, wanted, info, accepted, pictures, seconds)
        return JSONResponse(answer, headers=images.headers(accepted))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(models.listing(await backend.models(), await backend.pipeline(), limits, created))

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        return JSONResponse(models.one(model, await backend.models(), created))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        if not await backend.healthy():
            raise Refused(
                503,
                errors.SERVER,
                "the server is not ready yet; try again soon",
                "not_ready",
                retry_after=_NOT_READY_SECONDS,
            )
        return JSONResponse({"status": "ready"})

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text() + await backend.metrics_text(), media_type=MEDIA_TYPE)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground(request: Request) -> Response:
        return page.html(request.headers.get("if-none-match"))

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_page(name: str) -> Response:
        return page.part(name)

    return app


async def _accepted(events: AsyncGenerator[Event, None]) -> Accepted:
    return await anext(events)


async def _pictures(events: AsyncGenerator[Event, None]) -> list[FinalImage]:
    """All images of a request, by index."""
    pictures = [event async for event in events if isinstance(event, FinalImage)]
    return sorted(pictures, key=lambda picture: picture.index)


async def _stream(
    asked: ImageRequest,
    wanted: GenerationRequest,
    info: PipelineInfo,
    accepted: Accepted,
    events: AsyncGenerator[Event, None],
    started: float,
) -> AsyncGenerator[dict[str, Any], None]:
    async for event in events:
        if isinstance(event, Preview):
            yield await images.partial_event(asked, wanted, event)
        elif isinstance(event, FinalImage):
            yield await images.completed_event(asked, wanted, info, accepted, event, time.monotonic() - started)
