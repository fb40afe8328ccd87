"""The configuration of serving: every key, its default and what it means, here and nowhere else.

`ppcl config --serve` prints this file's defaults with their descriptions as YAML. Unknown keys and values out of range
are errors that name the key, the value seen and what would be right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ppcl.config.loading import Section, commented, put, read_values, validated
from ppcl.config.location import Location, LocationLike


class Http(Section):
    """Where the server listens and who may use it."""

    host: str = Field(
        "127.0.0.1", description="address to listen at; an address that other machines reach needs API keys"
    )
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    api_keys_env: str = Field(
        "PPCL_API_KEYS",
        description="environment variable that holds the API keys, separated by commas; unset: none",
    )
    api_keys_file: Path | None = Field(
        None, description="file with API keys, one per line; read when the server starts"
    )
    replicas: int = Field(1, ge=1, description="replicas of the HTTP API; each needs few resources")
    attempts: int = Field(
        3, ge=1, description="engine replicas to try for a request, if replicas die before it is done"
    )
    assign_seconds: float = Field(
        30.0, gt=0, description="seconds a request waits for a replica to take it, if none is ready"
    )
    body_seconds: float = Field(30.0, gt=0, description="seconds a client has to send a request's body")
    ping_seconds: float = Field(
        15.0,
        gt=0,
        description="seconds without an event after which a stream sends a comment, so that proxies keep it open",
    )


class Limits(Section):
    """Limits of one request; the error message names the limit that was exceeded."""

    body_bytes: int = Field(1024**2, ge=1024, description="bytes of a request's body")
    prompt_characters: int = Field(32_000, ge=1, description="characters of a prompt, and of a negative prompt")
    prompt_tokens: int = Field(
        512,
        ge=1,
        description="tokens of a prompt, and of a negative prompt, counted by the pipeline's tokenizer; the pipeline's "
        "max_sequence_length limits them, too",
    )
    pixels: int = Field(2048 * 2048, ge=64, description="pixels of one image, width times height")
    aspect: float = Field(4.0, ge=1, description="an image's longer side over its shorter one")
    pictures: int = Field(10, ge=1, description="images of one request (`n`)")
    steps: int = Field(100, ge=1, description="denoising steps of an image")
    work: int = Field(10 * 1024 * 1024 * 50, ge=64, description="images times pixels times steps of one request")


class EngineSettings(Section):
    """One replica: what it loads and how it batches."""

    variants: list[str] | None = Field(
        None, description="names of the variants to serve; only their weights are loaded; null: all of the result"
    )
    loras: Location | None = Field(
        None,
        description="folder, or s3://bucket/key, of the LoRAs that requests may name: ink.safetensors is the LoRA ink",
    )
    lora_transfer: bool = Field(
        False,
        description="have students take what LoRAs change in blocks they replace; fitted on the teacher at the start",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one, else the CPU")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    batch: int = Field(
        8, ge=1, description="images of one workload to generate at once, and rows of a transformer call"
    )
    queue: int = Field(64, ge=1, description="images that may be accepted and unfinished; further ones are refused")
    gather_seconds: float = Field(
        0.02,
        ge=0,
        description="seconds to wait between steps for images of the last batch, so that they stay one batch",
    )
    decoded_pixels: int = Field(
        1024 * 1024, ge=1, description="pixels of images for the VAE to decode at once, at least one image"
    )
    cpus: float | None = Field(
        None,
        gt=0,
        description="CPUs and compute threads of a replica; null: 1 with a GPU, else the machine's / max_replicas",
    )
    gpus: float = Field(
        1, gt=0, description="GPUs of a replica where it runs on one; a share lets several replicas use one GPU"
    )


class Elastic(Section):
    """Quality under load: `auto` uses the largest variant that meets the deadline, by costs measured at the start."""

    variants: list[str] | None = Field(
        None,
        description="variants of auto, large to small; null: those with more of the score per second than every larger "
        "one, and without scores the largest alone",
    )
    score: str | None = Field(
        None,
        description="the score that says how good a variant is: the name of a scorer of the job, or of ppcl score; "
        "null: the prompt checker's",
    )
    patience: float = Field(
        3.0,
        ge=1,
        description="budget of auto without a deadline: times the largest variant's seconds on an idle server",
    )
    margin: float = Field(
        0.1,
        ge=0,
        description="share of the expected seconds to add before comparing them with a deadline",
    )
    recover_seconds: float = Field(
        5.0, ge=0, description="seconds of low load after which auto goes back up by one variant"
    )
    low_water: float = Field(
        0.9,
        gt=0,
        le=1,
        description="low load: the recent demand takes less than this share of the device with the next larger variant",
    )


class Autoscaling(Section):
    """Number of replicas. With `max_replicas` at `min_replicas` there is nothing to scale."""

    policy: Literal["backlog", "requests"] = Field(
        "backlog",
        description="backlog: by waiting device-seconds at undegraded quality; requests: by number, Ray's own policy",
    )
    min_replicas: int = Field(1, ge=1, description="replicas when idle")
    max_replicas: int = Field(1, ge=1, description="maximum number of replicas")
    target_backlog_seconds: float = Field(
        10.0, gt=0, description="backlog: device-seconds of waiting work per replica to aim for"
    )
    target_requests: float = Field(
        8.0, gt=0, description="requests: running and waiting requests per replica to aim for"
    )
    upscale_delay_seconds: float = Field(
        10.0, ge=0, description="seconds for which more replicas must be needed before they start"
    )
    downscale_delay_seconds: float = Field(
        300.0, ge=0, description="seconds for which fewer replicas must suffice before some stop"
    )
    look_back_seconds: float = Field(10.0, gt=0, description="time over which the load is averaged")
    shutdown_seconds: float = Field(
        600.0,
        gt=0,
        description="seconds in which a stopping replica may finish its requests; longer than any request takes",
    )


class Log(Section):
    """One JSON object for each request and each failure, without prompts and keys."""

    file: Path | None = Field(
        None,
        description="file to append lines to; null: standard error of the replicas, which ppcl serve shows instead",
    )


class Settings(Section):
    """How a result is served."""

    http: Http = Http()
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    elastic: Elastic = Elastic()
    autoscaling: Autoscaling = Autoscaling()
    log: Log = Log()


class Served(Settings):
    """What is served, and how."""

    result: Location = Field(..., description="what ppcl compress wrote: a folder, or s3://bucket/key")
    teacher: Location | None = Field(None, description="path of the teacher, if it has moved")


def load_settings(
    result: LocationLike,
    path: Path | None = None,
    overrides: list[str] | None = None,
    http: dict[str, Any] | None = None,
) -> Served:
    """Return the settings for a result.

    Later sources win: defaults, a YAML file, `overrides` written as `key.sub=value`, the values of `http` that are set.

    Raises `UserError` that names the key, the value seen and what would be right.
    """
    values = {} if path is None else read_values(Served, path, "ppcl config --serve")
    for override in overrides or []:
        put(Served, values, override, "engine.batch=4")
    for key, value in (http or {}).items():
        if value is not None:
            put(Served, values, f"http.{key}={json.dumps(value)}", "http.port=8000")
    return validated(Served, values | {"result": str(result)}, "the serving settings" if path is None else str(path))


def commented_defaults() -> str:
    """The full default configuration as YAML, every key described."""
    return commented(Settings)
