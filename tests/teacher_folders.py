"""Folders of pipelines in the forms that people have them in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ppcl.storage.object_store import Store


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """As the hub's client keeps a repository: files are links to blobs named by their hash."""
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob, link = cache / "blobs" / f"{number:040x}", snapshot / path.relative_to(folder)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def upload_all(folder: Path, store: Store) -> None:
    """Every file of a folder, as an object of a bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, str(path.relative_to(folder)))


def set_index(folder: Path, **values: Any) -> None:
    """Change entries of a pipeline's `model_index.json`."""
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
