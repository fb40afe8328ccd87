"""Where something lies: a path of this machine, or the URL of something in a bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, WrapValidator

SCHEME = "s3://"


def is_url(place: Any) -> bool:
    return isinstance(place, str) and place.startswith(SCHEME)


def _place(value: Any, path: Callable[[Any], Path]) -> Path | str:
    if not is_url(value):
        return path(value)
    if not value.removeprefix(SCHEME).split("/")[0]:
        raise ValueError("the bucket's name is missing; give s3://bucket/key")
    return value.rstrip("/")


# A setting that is a path, or the URL of something in a bucket, which stays text.
Location = Annotated[Path, WrapValidator(_place), PlainSerializer(str, when_used="json")]
