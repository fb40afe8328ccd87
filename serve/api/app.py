"""The FastAPI app: OpenAI's Images API, the playground, health and metrics, over a `Backend`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from serve.api import errors, models
from serve.api.auth import ApiKeys
from serve.api.client_disconnect import cancel_on_disconnect
from serve.api.drain import DrainGate
from serve.api.metrics import MEDIA_TYPE, HttpMetrics
from serve.api.middleware import RequestMiddleware
from serve.api.request_body import read_object
from serve.api.responses import Answer
from serve.api.schema import ImageRequest, parse
from serve.api.sse import EventStream
from serve.api.validation import to_generation_request
from serve.config import Settings
from serve.playground import Page
from serve.protocol import Accepted, Backend, Event, FinalImage, Preview, Refused

_NOT_READY_SECONDS = 2.0
_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}
}


def create_app(
    backend: Backend, settings: Settings, drain_gate: DrainGate | None = None, behind_ray: bool = False
) -> FastAPI:
    """Build the API over an engine in this process, or over replicas of it behind a Ray Serve handle.

    `drain_gate`: lets the owner stop new requests. `behind_ray`: Ray Serve's proxy is in front and gives requests ids.

    The caller runs `check_exposure` first, and `log_as_json` in the process that serves. Raises `UserError` where the
    API keys cannot be read.
    """
    keys, metrics = ApiKeys(settings.http), HttpMetrics()
    # The interactive documentation loads scripts from other hosts; /openapi.json has the same content.
    app = FastAPI(title="ppcl", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(
        RequestMiddleware,
        settings=settings,
        keys=keys,
        metrics=metrics,
        drain_gate=drain_gate or DrainGate(),
        behind_ray=behind_ray,
    )
    _add_error_handlers(app)
    _add_generation(app, backend, settings)
    _add_models(app, backend, settings)
    _add_operations(app, backend, metrics)
    _add_playground(app, Page(key_needed=bool(keys)))
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        request.state.log_fields["error"] = error.code
        return errors.response(error)

    @app.exception_handler(HTTPException)
    async def refused_by_router(request: Request, error: HTTPException) -> Response:
        refusal = errors.from_http(error)
        request.state.log_fields["error"] = refusal.code
        return errors.response(refusal, dict(error.headers or {}))


def _add_generation(app: FastAPI, backend: Backend, settings: Settings) -> None:
    http, limits = settings.http, settings.limits

    @app.post("/v1/images/generations", openapi_extra=_BODY)
    async def generate_images(request: Request) -> Response:
        parameters = parse(await read_object(request, http, limits))
        info = await backend.pipeline()
        generation = to_generation_request(parameters, request.state.request_id, info, limits)
        events = backend.generate(generation)
        try:
            accepted = await cancel_on_disconnect(request.receive, _accepted(events))
            request.state.log_fields |= {
                "variant": accepted.variant,
                "degraded": accepted.degraded,
                "images": generation.count,
            }
            answer = Answer(parameters, generation, info, accepted, request.state.started)
            if parameters.stream:
                return EventStream(_stream(answer, events), events, answer.headers(), http.ping_seconds)
            images = await cancel_on_disconnect(request.receive, _images(events))
        except BaseException:
            # Nobody waits for the remaining images.
            await events.aclose()
            raise
        return JSONResponse(await answer.complete(images), headers=answer.headers())


def _add_models(app: FastAPI, backend: Backend, settings: Settings) -> None:
    created = int(time.time())

    @app.get("/v1/models")
    async def list_models() -> Response:
        infos, pipeline = await backend.models(), await backend.pipeline()
        return JSONResponse(models.listing(infos, pipeline, settings.limits, created))

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        return JSONResponse(models.retrieve(model, await backend.models(), await backend.pipeline(), created))


def _add_operations(app: FastAPI, backend: Backend, metrics: HttpMetrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        if not await backend.healthy():
            message = "the server is not ready yet; try again soon"
            raise Refused(503, errors.SERVER, message, "not_ready", retry_after=_NOT_READY_SECONDS)
        return JSONResponse({"status": "ready"})

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text() + await backend.metrics_text(), media_type=MEDIA_TYPE)


def _add_playground(app: FastAPI, page: Page) -> None:
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground(request: Request) -> Response:
        return page.html(request.headers.get("if-none-match"))

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_page(name: str) -> Response:
        return page.part(name)


async def _accepted(events: AsyncGenerator[Event, None]) -> Accepted:
    """Return the first event, which is `Accepted` by the protocol."""
    event = await anext(events)
    assert isinstance(event, Accepted)
    return event


async def _images(events: AsyncGenerator[Event, None]) -> list[FinalImage]:
    """Return all images of a request, by index."""
    images = [event async for event in events if isinstance(event, FinalImage)]
    return sorted(images, key=lambda image: image.index)


async def _stream(answer: Answer, events: AsyncGenerator[Event, None]) -> AsyncGenerator[dict[str, Any], None]:
    async for event in events:
        if isinstance(event, Preview):
            yield await answer.partial_event(event)
        elif isinstance(event, FinalImage):
            yield await answer.completed_event(event)
