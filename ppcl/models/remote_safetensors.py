"""Read single tensors of a safetensors object in a bucket by byte ranges."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ppcl.errors import UserError
from ppcl.models.safetensors_header import read_header
from ppcl.storage.object_store import Store

# Adjacent tensors are read by one request up to this size, with so many requests at once: the memory of a worker beside
# the tensors that it keeps is bounded.
_REQUEST_BYTES = 64 << 20
_AT_ONCE = 4


class RemoteWeights:
    """A safetensors object, its header read. Raises `UserError` where it does not exist or is no safetensors file."""

    def __init__(self, store: Store, name: str, tag: str, size: int | None = None):
        """`tag`: that of the object when the teacher was opened; another one in its place is refused.

        `size`: in bytes, where it is known; an object that is shorter than its header says is refused.
        """
        self.store, self.name, self.tag = store, name, tag
        try:
            self.header, self.start = read_header(self._bytes, size)
        except FileNotFoundError:
            raise UserError(
                f"{store.url}/{name} does not exist, but the index of the weights names it; upload it again"
            ) from None
        except (ValueError, struct.error) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception | str) -> UserError:
        return UserError(
            f"{self.store.url}/{self.name} cannot be read as safetensors ({error}); get an intact copy of it"
        )

    def _bytes(self, start: int, stop: int) -> bytes:
        """A range of the object as it was when it was opened. Raises `UserError` where it was replaced since."""
        try:
            return self.store.read(self.name, start, stop, self.tag)
        except FileExistsError:
            raise UserError(
                f"{self.store.url}/{self.name} was replaced while it was read; leave the teacher as it is until the "
                "job has ended, and run the same command again"
            ) from None

    @property
    def names(self) -> list[str]:
        return list(self.header)

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors `names`, in the order of the file. Raises `UserError` for one that is missing."""
        if missing := [name for name in names if name not in self.header]:
            raise self._damaged(f"it has no tensor {missing[0]}, which the index of the weights names")
        runs = iter(list(self._adjacent(sorted(names, key=lambda name: self.header[name]["data_offsets"]))))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            pending = [pool.submit(self._read, run) for run in islice(runs, _AT_ONCE)]
            while pending:
                tensors = pending.pop(0).result()
                pending += [pool.submit(self._read, run) for run in islice(runs, 1)]
                yield from tensors.items()

    def _adjacent(self, names: list[str]) -> Iterator[list[str]]:
        """Split tensors, sorted by offset, into runs without gaps."""
        run: list[str] = []
        begin = end = 0
        for name in names:
            start, stop = self.header[name]["data_offsets"]
            if run and (start != end or stop - begin > _REQUEST_BYTES):
                yield run
                run = []
            begin = begin if run else start
            run, end = [*run, name], stop
        if run:
            yield run

    def _read(self, run: list[str]) -> dict[str, torch.Tensor]:
        """Read a run by one request, as a safetensors file of its own, which the library checks and parses."""
        begin, end = self.header[run[0]]["data_offsets"][0], self.header[run[-1]]["data_offsets"][1]
        data = self._bytes(self.start + begin, self.start + end) if end > begin else b""
        header = {
            name: self.header[name] | {"data_offsets": [offset - begin for offset in self.header[name]["data_offsets"]]}
            for name in run
        }
        encoded = json.dumps(header).encode()
        try:
            return load(struct.pack("<Q", len(encoded)) + encoded + data)
        except SafetensorError as error:
            raise self._damaged(error) from None
