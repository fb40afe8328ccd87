"""Artifacts are the interface: a job's folder, its stages, and the manifest that says which of them are complete.

A stage writes its files into its own folder under the job's, then its entry in `manifest.json`, last and in one
rename. The entry holds a key (a hash of everything the stage's result depends on) and each file's size and sha256. The
same stage with the same key and intact files is not run again; a file that is gone or changed is found by its hash.

A job in a bucket is worked on in its mirror (see `ppcl.storage.object_store`): what the manifest names is downloaded when it is wanted
and held against its sha256; a stage's files are uploaded before its entry is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.storage.lease import hold_lease
from ppcl.storage.mirror import remove, store_of, to_local
from ppcl.storage.node_cache import file_sha256, mirror, once_a_node, parallel_map
from ppcl.storage.object_store import Store

MANIFEST = "manifest.json"
CONFIG = "config.json"  # the full configuration of the last run
LOG = "log.txt"
LOCK = ".lock"
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
        raise UserError(
            f"{path} could not be written ({error.strerror}); free space or choose another output folder"
        ) from None


@dataclass(frozen=True)
class Entry:
    """One stage's line in the manifest. `files`: path under the job's folder to {size, sha256}."""

    key: str
    files: dict[str, dict[str, Any]]
    seconds: float
    info: dict[str, Any]


class Artifacts:
    """A job's folder, or its place in a bucket. `root`: where its files are on this node. `place`: what the user calls it.

    Raises `UserError` where it holds something else than a job of this kind.
    """

    def __init__(self, place: LocationLike):
        location = Location.of(place)
        self.store: Store | None = Store(location.url) if location.is_url else store_of(location.path)
        self.root = mirror(self.store.url) if self.store else location.path.absolute()
        self.place = self.store.url if self.store else str(self.root)
        self._check_held: Callable[[], None] = lambda: None

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def _name(self, *parts: str) -> str:
        """What a user calls a file of the job."""
        return "/".join((self.place, *parts))

    def _read_manifest(self) -> bytes | None:
        try:
            return self.store.read(MANIFEST) if self.store else self.path(MANIFEST).read_bytes()
        except FileNotFoundError:
            return None

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self._check_held()
        content = json.dumps(manifest, indent=1)
        if self.store:
            self.store.write(MANIFEST, content.encode())
        else:
            write_atomically(self.path(MANIFEST), content)

    def manifest(self) -> dict[str, Any]:
        content = self._read_manifest()
        if content is None:
            raise UserError(
                f"{self.place} is no result of ppcl: it has no {MANIFEST}; give a folder that ppcl compress wrote"
            )
        try:
            manifest = json.loads(content)
            if not isinstance(manifest, dict):
                raise ValueError
        except ValueError:  # no JSON, no UTF-8, or no manifest
            raise UserError(
                f"{self._name(MANIFEST)} is damaged; remove it and run ppcl compress again, which makes the result anew"
            ) from None
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{self._name(MANIFEST)} has format {manifest.get('format')}, this ppcl reads format {FORMAT}"
            )
        return manifest

    def check(self) -> None:
        """Refuse a folder that holds something else, before anything is written. Raises `UserError`."""
        if not self.store and self.root.exists() and not self.root.is_dir():
            raise UserError(f"the output {self.root} is a file; choose a folder with --output")
        if self._read_manifest() is not None:
            self.manifest()
        elif self.store.objects() if self.store else self.root.is_dir() and any(self.root.iterdir()):
            raise UserError(f"the output folder {self.place} is not empty and no job of ppcl; choose another --output")

    def start(self, job: dict[str, Any]) -> None:
        """Claim the folder for a job: `job` is what tells one job from another (the teacher's and prompts' identity)."""
        self.check()
        if self._read_manifest() is None:
            self._write_manifest({"format": FORMAT, "job": job, "stages": {}})
        else:
            other = self.manifest()["job"]
            if other != job:
                differs = [k for k in {**job, **other} if job.get(k) != other.get(k)]
                raise UserError(
                    f"the output folder {self.place} holds another job: {differs[0]} is {other.get(differs[0])!r} there and "
                    f"{job.get(differs[0])!r} here; choose another --output"
                )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the job's folder; a second job on the same folder is refused instead of mixing with the first."""
        if self.store:
            with hold_lease(self.store) as self._check_held:
                yield
            return
        with open(self.path(LOCK), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another ppcl works in {self.place}; wait for it or choose another --output") from None
            yield

    def entry(self, stage: str) -> Entry | None:
        found = self.manifest()["stages"].get(stage)
        return Entry(**found) if found else None

    def damaged(self, stage: str) -> list[str]:
        """The files of a complete stage that are gone or changed, by size and sha256; the others are on this node now."""
        entry = self.entry(stage)
        files = entry.files if entry else {}
        whole = parallel_map(lambda name: self._intact(name, **files[name]), list(files))
        return [name for name, intact in zip(files, whole, strict=True) if not intact]

    def _intact(self, name: str, size: int, sha256: str) -> bool:
        path = self.path(name)
        if path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256:
            return True
        return self.store is not None and self.store.download(name, path, sha256)

    def text(self, name: str) -> str:
        """A file that lies beside the stages, such as the configuration. Raises `OSError` where it cannot be read."""
        return self.store.read(name).decode() if self.store else self.path(name).read_text()

    def continue_log(self) -> None:
        """Begin the log on this node with what the store has of it, unless this node has more: what could not be published."""
        if self.store is None:
            return
        with contextlib.suppress(FileNotFoundError):
            content, path = self.store.read(LOG), self.path(LOG)
            if not path.exists() or not path.read_bytes().startswith(content):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def file(self, *parts: str) -> Path:
        """One file of a complete stage, downloaded where the job is in a bucket; not there if it is damaged or gone."""
        path, name = self.path(*parts), "/".join(parts)
        entry = self.entry(parts[0]) if self.store else None
        if entry and name in entry.files and not self._intact(name, **entry.files[name]):
            path.unlink(missing_ok=True)
        return path

    def commit(self, stage: str, key: str, seconds: float = 0.0, info: dict[str, Any] | None = None) -> None:
        """Enter a stage as complete, with every file now in its folder."""
        folder = self.path(stage)
        paths = {
            str(path.relative_to(self.root)): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "checkpoints" not in path.relative_to(folder).parts
        }
        files = {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in paths.items()}
        if self.store:
            parallel_map(lambda name: self.store.upload(paths[name], name), list(paths))
            there = [f"{stage}/{name}" for name in Store(f"{self.store.url}/{stage}").objects()]
            # What workers uploaded on the way and the stage did not keep.
            parallel_map(
                self.store.remove,
                [name for name in there if name not in files and "checkpoints" not in name.split("/")],
            )
        manifest = self.manifest()
        manifest["stages"][stage] = {"key": key, "files": files, "seconds": round(seconds, 3), "info": info or {}}
        self._write_manifest(manifest)

    def forget_entry(self, stage: str) -> None:
        """Drop a stage's entry, and keep its files."""
        manifest = self.manifest()
        if manifest["stages"].pop(stage, None):
            self._write_manifest(manifest)

    def forget(self, stage: str) -> None:
        """Drop a stage's entry, then its files."""
        self.forget_entry(stage)
        remove(self.path(stage))

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


def fetch_stage(folder: str | Path) -> Path:
    """The folder of a complete stage on this node: itself, or downloaded into its mirror and held against the manifest.

    Raises `UserError` where a file is damaged or gone.
    """
    if store_of(folder) is None:
        return Path(folder)
    on_this_node = to_local(folder)
    artifacts = Artifacts(on_this_node.parent)
    with once_a_node(on_this_node):
        if artifacts.entry(on_this_node.name) is None:
            raise UserError(f"{artifacts.place} has no complete {on_this_node.name}; run ppcl compress again")
        if bad := artifacts.damaged(on_this_node.name):
            raise UserError(
                f"{artifacts.place}/{bad[0]} is damaged or gone; run ppcl compress again, which makes it anew"
            )
        known = {artifacts.path(name) for name in artifacts.entry(on_this_node.name).files}
        for path in on_this_node.rglob("*"):
            # Left from another run of the stage.
            if path.is_file() and path not in known:
                path.unlink()
    return on_this_node
