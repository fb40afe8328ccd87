"""A location: a path of this machine, or the URL of an object in a bucket."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ppcl.errors import UserError

SCHEME = "s3://"

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_SERVED = "give a folder or file of this machine, or s3://bucket/key"


@dataclass(frozen=True)
class Location:
    """A path of this machine, or an `s3://bucket/key` URL without a slash at its end.

    Raises `ValueError` for an empty text, another scheme, and a URL without a bucket.
    """

    text: str

    def __post_init__(self) -> None:
        scheme = _URL.match(self.text)
        if not self.text:
            raise ValueError(f"the location is empty; {_SERVED}")
        if scheme and scheme["scheme"] != "s3":
            raise ValueError(f"{scheme['scheme']}:// is not served; {_SERVED}")
        if self.text.startswith("s3:/") and not self.text.removeprefix(SCHEME).split("/")[0]:
            raise ValueError("the bucket's name is missing; give s3://bucket/key")
        if self.text.startswith("s3:/") and not scheme:
            raise ValueError("a URL has two slashes after its scheme; give s3://bucket/key")
        object.__setattr__(self, "text", self.text.rstrip("/") if scheme else str(Path(self.text)))

    @classmethod
    def of(cls, place: LocationLike) -> Location:
        """The location that a caller gave. Raises `UserError` that names the place."""
        if isinstance(place, Location):
            return place
        try:
            return cls(str(place))
        except ValueError as error:
            raise UserError(f"{str(place)!r} cannot be read or written: {error}") from None

    @property
    def is_url(self) -> bool:
        return self.text.startswith(SCHEME)

    @property
    def url(self) -> str:
        """Raises `ValueError` for a path of this machine."""
        if not self.is_url:
            raise ValueError(f"{self.text} is a path of this machine and has no URL")
        return self.text

    @property
    def path(self) -> Path:
        """Raises `ValueError` for a URL."""
        if self.is_url:
            raise ValueError(f"{self.text} is in a bucket and has no path on this machine")
        return Path(self.text)

    def absolute(self) -> Location:
        """The location that means the same from every working folder."""
        return self if self.is_url else Location(str(self.path.absolute()))

    @property
    def parent(self) -> tuple[Location, str]:
        """The location that holds this one, and its name there. Raises `ValueError` for a bucket itself."""
        if not self.is_url:
            path = self.path.absolute()
            return Location(str(path.parent)), path.name
        place, _, name = self.text.rpartition("/")
        return Location(place), name

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.text}/{name}") if self.is_url else Location(str(self.path / name))

    def __str__(self) -> str:
        return self.text

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validates text, paths and locations; serializes to text."""
        return core_schema.no_info_plain_validator_function(
            _validated, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )


LocationLike = Location | Path | str
"""What callers may give in place of a `Location`."""


def _validated(value: Any) -> Location:
    if isinstance(value, Location):
        return value
    if not isinstance(value, str | Path):
        raise PydanticCustomError("location_type", "input should be a path or an s3:// URL")
    return Location(str(value))


def is_url(place: LocationLike) -> bool:
    """Whether a place is in a bucket."""
    return str(place).startswith(SCHEME)
