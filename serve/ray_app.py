"""Ray Serve: replicas of the engine, and the ingress that speaks HTTP.

`serve deploy` and KubeRay build the application by `serve.ray_app:from_args`, with the settings under `args`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import metrics as ray_metrics
from ray.serve.handle import DeploymentHandle

from ppcl.config.loading import validated
from ppcl.errors import UserError
from serve.api.drain import DrainGate
from serve.autoscaling import BACKLOG
from serve.config import Served
from serve.engine.metrics import INSTRUMENTS, VERBS, Instrument, Metrics
from serve.logging import log_as_json
from serve.protocol import Event, GenerationRequest, ModelInfo, PipelineInfo, Refused

ENGINE = "engine"
INGRESS = "ingress"

# Requests of an ingress replica at once: they only wait there, the engines bound how many there are.
_INGRESS_REQUESTS = 4096


class RayMetrics(Metrics):
    """Metrics of this process for the ingress' `/metrics`, copied to Ray, whose endpoint has those of all replicas."""

    def __init__(self) -> None:
        super().__init__()
        kinds: dict[str, Any] = {
            "counter": ray_metrics.Counter,
            "gauge": ray_metrics.Gauge,
            "histogram": ray_metrics.Histogram,
        }
        self._ray_metrics: dict[Instrument, Any] = {}
        for instrument in INSTRUMENTS:
            options = {"boundaries": list(instrument.buckets)} if instrument.buckets else {}
            self._ray_metrics[instrument] = kinds[instrument.kind](
                instrument.name, description=instrument.description, tag_keys=instrument.labels, **options
            )

    def record(self, instrument: Instrument, value: float = 1, **labels: str) -> None:
        super().record(instrument, value, **labels)
        getattr(self._ray_metrics[instrument], VERBS[instrument.kind])(value, tags=labels)


@serve.deployment(name=ENGINE)
class Replica:
    """One engine. It is ready once it has loaded, warmed up and profiled."""

    def __init__(self, settings: dict[str, Any], threads: int):
        import torch

        from serve.engine.engine import Engine

        served = Served.model_validate(settings)
        log_as_json(served.log.file)
        torch.set_num_threads(threads)
        self.engine = Engine(served, RayMetrics())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event | Refused, None]:
        """Yield the engine's events. A refusal is the last event, since exceptions lose their fields in Ray."""
        events = self.engine.generate(request)
        try:
            async for event in events:
                yield event
        except Refused as refused:
            yield refused
        finally:
            await events.aclose()

    async def models(self) -> list[ModelInfo]:
        return await self.engine.models()

    async def pipeline(self) -> PipelineInfo:
        return await self.engine.pipeline()

    async def healthy(self) -> bool:
        return await self.engine.healthy()

    async def metrics_text(self) -> str:
        return await self.engine.metrics_text()

    async def check_health(self) -> None:
        if not await self.engine.healthy():
            raise RuntimeError("a thread of the engine has ended")

    def load(self) -> dict[str, float]:
        return self.engine.load()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {BACKLOG: self.load()["backlog_seconds"]}

    async def close(self) -> None:
        """Fail the requests in flight."""
        await asyncio.to_thread(self.engine.close)


@serve.deployment(name=INGRESS)
@serve.ingress()
class Ingress:
    """The HTTP API over the engine's replicas."""

    def __init__(self, engine: DeploymentHandle, settings: dict[str, Any]):
        self.handle, self.settings, self.drain_gate = engine, Served.model_validate(settings), DrainGate()

    def __serve_build_asgi_app__(self) -> Any:
        from serve.api import create_app
        from serve.ray_backend import RayBackend

        log_as_json(self.settings.log.file)
        return create_app(RayBackend(self.handle, self.settings.http), self.settings, self.drain_gate, behind_ray=True)

    def stop(self) -> int:
        """Refuse new requests; return the number of those in flight."""
        self.drain_gate.open = False
        return self.drain_gate.in_flight


def cpus(settings: Served) -> float:
    """Return the CPUs of a replica."""
    if settings.engine.cpus is not None:
        return settings.engine.cpus
    return 1 if uses_gpu(settings) else max(1, (os.cpu_count() or 1) // settings.autoscaling.max_replicas)


def uses_gpu(settings: Served) -> bool:
    """Return whether replicas run on GPUs of the cluster."""
    import ray

    device = settings.engine.device
    return device == "cuda" or (device == "auto" and bool(ray.cluster_resources().get("GPU", 0)))


def from_args(args: dict[str, Any]) -> serve.Application:
    """Build the application of a cluster from the settings of a file.

    Raises `UserError` without API keys: a cluster's proxies listen on all interfaces, whatever `http.host` says.
    """
    from serve.api import ApiKeys

    settings = validated(Served, args, "args")
    if not ApiKeys(settings.http):
        raise UserError(
            f"a cluster that serves needs API keys; set {settings.http.api_keys_env} on its nodes, "
            "or http.api_keys_file under args"
        )
    return application(settings)


def application(settings: Served) -> serve.Application:
    """Build the application for the cluster that this process is connected to."""
    scaling = settings.autoscaling
    gpus = settings.engine.gpus if uses_gpu(settings) else 0
    graceful = {"graceful_shutdown_timeout_s": scaling.shutdown_seconds, "graceful_shutdown_wait_loop_s": 0.5}
    engine_class: Any = Replica
    engine = engine_class.options(
        ray_actor_options={"num_cpus": cpus(settings), "num_gpus": gpus},
        # The engine itself refuses excess requests and says when to retry.
        max_ongoing_requests=2 * settings.engine.queue,
        max_queued_requests=2 * scaling.max_replicas * settings.engine.queue,
        autoscaling_config=_autoscaling(settings),
        health_check_period_s=5,
        **graceful,
    ).bind(_part(settings, {"result", "teacher", "limits", "engine", "elastic", "log"}), max(1, int(cpus(settings))))
    ingress_class: Any = Ingress
    return ingress_class.options(
        num_replicas=settings.http.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_INGRESS_REQUESTS,
        **graceful,
    ).bind(engine, _part(settings, {"result", "http", "limits", "log"}))


def _part(settings: Served, names: set[str]) -> dict[str, Any]:
    """Return a deployment's settings as plain values, so that Ray can tell whether they changed."""
    return settings.model_dump(mode="json", include=names)


def _autoscaling(settings: Served) -> dict[str, Any]:
    scaling = settings.autoscaling
    policy = {
        "backlog": {
            "policy_function": "serve.autoscaling:BacklogPolicy",
            "policy_kwargs": {"target_seconds": scaling.target_backlog_seconds},
        }
    }
    return {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_requests,
        "upscale_delay_s": scaling.upscale_delay_seconds,
        "downscale_delay_s": scaling.downscale_delay_seconds,
        "look_back_period_s": scaling.look_back_seconds,
        "metrics_interval_s": scaling.look_back_seconds / 5,
    } | ({"policy": policy[scaling.policy]} if scaling.policy in policy else {})
