"""Tensors of a safetensors object in a bucket, by the ranges of bytes they lie in: only what is wanted is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ppcl.errors import UserError
from ppcl.storage.object_store import Store

# Neighbouring tensors are read by one request up to this size, and so many requests are under way at once, so that a worker
# holds a bounded amount beside what it keeps.
_REQUEST_BYTES = 64 << 20
_AT_ONCE = 4
_LONGEST_HEADER = 100 << 20  # the format's own limit


class RemoteWeights:
    """The header of a safetensors object has been read. Raises `UserError` where it is none."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        try:
            (length,) = struct.unpack("<Q", store.read(name, 0, 8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would be {length} bytes long")
            self.header: dict[str, dict[str, Any]] = json.loads(store.read(name, 8, 8 + length))
            self.header.pop("__metadata__", None)
        except FileNotFoundError:
            raise UserError(
                f"{store.url}/{name} does not exist, but the index of the weights names it; upload it again"
            ) from None
        except (ValueError, struct.error) as error:
            raise self._damaged(error) from None
        self.start = 8 + length

    def _damaged(self, error: Exception | str) -> UserError:
        return UserError(
            f"{self.store.url}/{self.name} cannot be read as safetensors ({error}); get an intact copy of it"
        )

    @property
    def names(self) -> list[str]:
        return list(self.header)

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """These tensors, in the order they lie in."""
        if missing := [name for name in names if name not in self.header]:
            raise self._damaged(f"it has no tensor {missing[0]}, which the index of the weights names")
        block_ranges = list(self._spans(sorted(names, key=lambda name: self.header[name]["data_offsets"])))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            waiting = iter(block_ranges)
            under_way = [pool.submit(self._read, span) for span in islice(waiting, _AT_ONCE)]
            while under_way:
                read = under_way.pop(0).result()
                under_way += [pool.submit(self._read, span) for span in islice(waiting, 1)]
                yield from read.items()

    def _spans(self, names: list[str]) -> Iterator[list[str]]:
        """Runs of tensors that lie behind each other without a gap."""
        span: list[str] = []
        begin = end = 0
        for name in names:
            start, stop = self.header[name]["data_offsets"]
            if span and (start != end or stop - begin > _REQUEST_BYTES):
                yield span
                span = []
            begin = begin if span else start
            span, end = [*span, name], stop
        if span:
            yield span

    def _read(self, span: list[str]) -> dict[str, torch.Tensor]:
        """One request. What comes is made a safetensors file of its own, so that the library checks and reads it."""
        begin, end = self.header[span[0]]["data_offsets"][0], self.header[span[-1]]["data_offsets"][1]
        data = self.store.read(self.name, self.start + begin, self.start + end) if end > begin else b""
        header = {
            name: self.header[name] | {"data_offsets": [offset - begin for offset in self.header[name]["data_offsets"]]}
            for name in span
        }
        words = json.dumps(header).encode()
        try:
            return load(struct.pack("<Q", len(words)) + words + data)
        except SafetensorError as error:
            raise self._damaged(error) from None
