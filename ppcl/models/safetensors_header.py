"""The header of a safetensors file, read without the file: what tensors it has, of what type and shape, and where."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

_LONGEST_HEADER = 100 << 20  # the format's own limit

Header = dict[str, dict[str, Any]]
"""By tensor `dtype`, such as `BF16`, `shape` and `data_offsets`: begin and end, counted from the header's end."""


def read_header(read: Callable[[int, int], bytes], size: int | None = None) -> tuple[Header, int]:
    """The header of a file, and the offset of its numbers.

    `read(start, stop)` gives bytes of the file. `size`: in bytes, where it is known. Raises `ValueError` for what is no
    whole safetensors file.
    """
    first = read(0, 8)
    if len(first) < 8:
        raise ValueError("it has no header")
    (length,) = struct.unpack("<Q", first)
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header would be {length} bytes long")
    header = json.loads(read(8, 8 + length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    try:
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if not all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in header.values()):
            raise TypeError
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError("its header does not describe tensors") from None
    if size is not None and size != end:
        raise ValueError(f"it has {size} bytes, and its header describes {end}")
    return header, start
