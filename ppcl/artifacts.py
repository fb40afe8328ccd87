"""Artifacts are the interface: a job's folder, its stages, and the manifest that says which of them are complete.

A stage writes its files into its own folder under the job's, then its entry in `manifest.json`, last and in one
rename. The entry holds a key (a hash of everything the stage's result depends on) and each file's size and sha256. The
same stage with the same key and intact files is not run again; a file that is gone or changed is found by its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.teacher import file_sha256

MANIFEST = "manifest.json"
CONFIG = "config.json"  # the full configuration of the last run
LOG = "log.txt"
FORMAT = 1


def key_of(*parts: Any) -> str:
    """A hash of JSON-able values, the same on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole content, or nothing: written beside, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror}); free space or choose another output folder") from None


@dataclass(frozen=True)
class Entry:
    """One stage's line in the manifest. `files`: path under the job's folder to {size, sha256}."""

    key: str
    files: dict[str, dict[str, Any]]
    seconds: float
    info: dict[str, Any]


class Artifacts:
    """A job's folder. Raises `UserError` where it holds something else than a job of this kind."""

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def manifest(self) -> dict[str, Any]:
        path = self.path(MANIFEST)
        if not path.exists():
            raise UserError(f"{self.root} is no result of ppcl: it has no {MANIFEST}; give a folder that ppcl compress wrote")
        try:
            manifest = json.loads(path.read_text())
            if not isinstance(manifest, dict):
                raise ValueError
        except ValueError:  # no JSON, no UTF-8, or no manifest
            raise UserError(f"{path} is damaged; remove it and run ppcl compress again, which makes the result anew") from None
        if manifest.get("format") != FORMAT:
            raise UserError(f"{path} has format {manifest.get('format')}, this ppcl reads format {FORMAT}")
        return manifest

    def check(self) -> None:
        """Refuse a folder that holds something else, before anything is written. Raises `UserError`."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"the output {self.root} is a file; choose a folder with --output")
        if self.path(MANIFEST).exists():
            self.manifest()
        elif self.root.is_dir() and any(self.root.iterdir()):
            raise UserError(f"the output folder {self.root} is not empty and no job of ppcl; choose another --output")

    def start(self, job: dict[str, Any]) -> None:
        """Claim the folder for a job: `job` is what tells one job from another (the teacher's and prompts' identity)."""
        self.check()
        if not self.path(MANIFEST).exists():
            write_atomically(self.path(MANIFEST), json.dumps({"format": FORMAT, "job": job, "stages": {}}, indent=1))
        else:
            other = self.manifest()["job"]
            if other != job:
                differs = [k for k in {**job, **other} if job.get(k) != other.get(k)]
                raise UserError(
                    f"the output folder {self.root} holds another job: {differs[0]} is {other.get(differs[0])!r} there and "
                    f"{job.get(differs[0])!r} here; choose another --output"
                )

    def entry(self, stage: str) -> Entry | None:
        found = self.manifest()["stages"].get(stage)
        return Entry(**found) if found else None

    def damaged(self, stage: str) -> list[str]:
        """The files of a complete stage that are gone or changed, by size and sha256."""
        entry = self.entry(stage)
        bad = []
        for name, expected in (entry.files if entry else {}).items():
            path = self.path(name)
            if not path.is_file() or path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
                bad.append(name)
        return bad

    def commit(self, stage: str, key: str, seconds: float = 0.0, info: dict[str, Any] | None = None) -> None:
        """Enter a stage as complete, with every file now in its folder."""
        folder = self.path(stage)
        files = {
            str(path.relative_to(self.root)): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "checkpoints" not in path.relative_to(folder).parts
        }
        manifest = self.manifest()
        manifest["stages"][stage] = {"key": key, "files": files, "seconds": round(seconds, 3), "info": info or {}}
        write_atomically(self.path(MANIFEST), json.dumps(manifest, indent=1))

    def forget_entry(self, stage: str) -> None:
        """Drop a stage's entry, and keep its files."""
        manifest = self.manifest()
        if manifest["stages"].pop(stage, None):
            write_atomically(self.path(MANIFEST), json.dumps(manifest, indent=1))

    def forget(self, stage: str) -> None:
        """Drop a stage's entry, then its files."""
        self.forget_entry(stage)
        shutil.rmtree(self.path(stage), ignore_errors=True)

    def state(self, stage: str, key: str, tell: Callable[[str], None]) -> bool:
        """Whether a stage can be skipped; says through `tell` why a complete one has to be made again."""
        entry = self.entry(stage)
        if entry is None:
            return False
        if entry.key != key:
            tell(f"{stage}: what it depends on has changed; making it again")
            return False
        bad = self.damaged(stage)
        if bad:
            tell(f"{stage}: {bad[0]} is damaged or gone (its sha256 differs from the manifest's); making it again")
            return False
        return True
