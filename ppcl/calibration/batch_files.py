"""Folders with one file a batch, kept from one run to the next: which are whole, and their place in a result.

A file appears whole or not at all (`ppcl.calibration.dataset` renames it), so one that is there needs no other record.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ppcl.storage.manifest import write_atomically
from ppcl.storage.mirror import download, remove, store_of
from ppcl.storage.node_cache import file_sha256, parallel_map

_COMPLETE = "complete.json"


def whole_files(folder: Path, names: list[str]) -> set[str]:
    """Those files that are there, on this node, and whole; damaged ones are removed. Cost: every file is read once."""
    if store := store_of(folder):
        there = sorted(store.objects().keys() & set(names))
        whole = parallel_map(lambda name: store.download(name, folder / name), there)
    else:
        # A file here may share its disk blocks with one in a result: a change there is one here.
        marker = folder / _COMPLETE
        known = json.loads(marker.read_text()) if marker.exists() else {}
        there = [name for name in names if (folder / name).exists()]
        whole = [name not in known or file_sha256(folder / name) == known[name] for name in there]
    for name in [name for name, right in zip(there, whole, strict=True) if not right]:
        remove(folder / name)
    return {name for name, right in zip(there, whole, strict=True) if right}


def publish(folder: Path, names: list[str], into: Path) -> None:
    """Put all files of a folder into a result, on the same disk blocks where the file system can do that.

    Raises `UserError` where a bucket lost one meanwhile.
    """
    download(folder)
    if not store_of(folder):
        write_atomically(folder / _COMPLETE, json.dumps({name: file_sha256(folder / name) for name in names}))
    into.mkdir(parents=True)
    for name in names:
        try:
            os.link(folder / name, into / name)
        except OSError:
            shutil.copyfile(folder / name, into / name)


def remove_others(folder: Path, prefix: str) -> None:
    """Remove the folders beside this one whose names begin with `prefix`, here and in a bucket."""
    names = {path.name for path in folder.parent.glob(f"{prefix}*")}
    if store := store_of(folder.parent):
        names |= {name.split("/")[0] for name in store.objects() if name.startswith(prefix)}
    for name in sorted(names - {folder.name}):
        remove(folder.with_name(name))
