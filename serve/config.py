"""The configuration of serving: every key, its default and what it means, here and nowhere else.

Unknown keys and values out of range are errors that name the key, the value seen and what would be right.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Http(Section):
    """Where the server listens and who may use it."""

    host: str = Field("127.0.0.1", description="address to listen at; one that others reach needs API keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    api_keys_env: str = Field(
        "PPCL_API_KEYS", description="environment variable that holds the API keys, separated by commas; unset: no key from it"
    )
    api_keys_file: Path | None = Field(None, description="file that holds API keys, one a line; read when the server starts")
    body_seconds: float = Field(30.0, gt=0, description="seconds a client has to send a request's body")
    ping_seconds: float = Field(
        15.0, gt=0, description="seconds without an event after which a stream sends a comment, so that nothing between closes it"
    )


class Limits(Section):
    """What one request may ask for; more is refused with a sentence that names the limit."""

    body_bytes: int = Field(1024**2, ge=1024, description="bytes of a request's body")
    prompt_characters: int = Field(32_000, ge=1, description="characters of a prompt, and of a negative prompt")
    prompt_tokens: int = Field(512, ge=1, description="tokens of a prompt, and of a negative prompt, counted by the pipeline's tokenizer")
    pixels: int = Field(2048 * 2048, ge=64, description="pixels of one picture, width times height")
    aspect: float = Field(4.0, ge=1, description="a picture's longer side over its shorter one")
    pictures: int = Field(10, ge=1, description="pictures of one request (`n`)")
    steps: int = Field(100, ge=1, description="denoising steps of a picture")
    work: int = Field(
        10 * 1024 * 1024 * 50, ge=64, description="pictures times pixels times steps of one request"
    )


class Settings(Section):
    """How a result is served."""

    http: Http = Http()
    limits: Limits = Limits()
