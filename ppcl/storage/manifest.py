"""Artifacts are the interface: a job's folder, its stages, and the manifest that lists the complete ones.

A stage writes its files into its own folder under the job's, then its record in `manifest.json`, last and in one
rename. The record holds a key (a hash of everything the stage's result depends on) and each file's size and sha256.
The same stage with the same key and intact files is not run again; a file that is gone or changed is found by its
hash. A later stage reads the files that the record names (`StageFiles`), never what else lies in the folder.

A job in a bucket is worked on in its mirror (see `ppcl.storage.object_store`): what the manifest names is downloaded
when it is needed and compared with its sha256; a stage's files are uploaded before its record is.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.storage.atomic import PARTIAL, replacing
from ppcl.storage.lease import hold_lease
from ppcl.storage.mirror import remove, store_of, to_local
from ppcl.storage.node_cache import file_sha256, mirror, once_a_node, parallel_map
from ppcl.storage.object_store import Store

MANIFEST = "manifest.json"
CONFIG = "config.json"  # the full configuration of the last run
LOG = "log.txt"
EVENTS = "events.jsonl"
LOCK = ".lock"
CACHE = "cache"  # a folder beside the stages', of work that another run of a stage continues from
CHECKPOINTS = "checkpoints"  # a folder in a stage's, of what is no part of its result
FORMAT = 1
# What tells one job from another, whatever the paths.
_IDENTITY = {"teacher_sha256": "another teacher", "prompts": "other prompts"}


def key_of(*parts: Any) -> str:
    """A hash of JSON-able values, the same on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole content, or nothing. Raises `UserError` where it cannot be written."""
    try:
        with replacing(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); free space or choose another output folder"
        ) from None


@dataclass(frozen=True)
class StageRecord:
    """What the manifest says of a complete stage. `files`: path under the job's folder to {size, sha256}.

    `format`: of the stage's files and key; 0 where the version that wrote it kept none.
    """

    key: str
    files: dict[str, dict[str, Any]]
    seconds: float
    info: dict[str, Any]
    format: int = 0

    @property
    def digest(self) -> str:
        """A hash of the names and contents of all files."""
        return _digest(self.files)


def _digest(files: dict[str, dict[str, Any]]) -> str:
    return key_of({name: file["sha256"] for name, file in files.items()})


@dataclass(frozen=True)
class StageFiles:
    """The files of a complete stage, as the manifest names them. It can be sent to another node.

    `names`: relative to `folder`, sorted. `digest`: of the names and contents.
    """

    folder: Path
    names: tuple[str, ...]
    digest: str = ""

    def fetch(self) -> StageFiles:
        """The same files on this node: those of a bucket are downloaded. Raises `UserError` as `fetch_stage`."""
        return replace(self, folder=fetch_stage(self.folder))

    def paths(self, pattern: str = "*") -> list[Path]:
        """The paths of those files whose name relative to the folder matches a glob pattern."""
        return [self.folder / name for name in self.names if fnmatch.fnmatch(name, pattern)]


class Artifacts:
    """A job's folder, or its URL in a bucket. `root`: where its files are on this node. `place`: its name for the user.

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
                f"{self.place} is not a ppcl result: it has no {MANIFEST}; give a folder that ppcl compress wrote"
            )
        try:
            manifest = json.loads(content)
            if not isinstance(manifest, dict):
                raise ValueError
        except ValueError:  # no JSON, no UTF-8, or no manifest
            raise UserError(
                f"{self._name(MANIFEST)} is damaged; remove it and run ppcl compress again to make the result again"
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
            raise UserError(
                f"the output folder {self.place} is not empty and is not a ppcl job; choose another --output"
            )

    def job(self) -> dict[str, Any]:
        """What the manifest says of the job, `{}` where there is none yet. Raises `UserError` as `check` does."""
        self.check()
        return {} if self._read_manifest() is None else self.manifest()["job"]

    def start(self, job: dict[str, Any]) -> None:
        """Claim the folder for a job, which the hashes of its teacher and prompts tell from another.

        `job` says where the teacher is, too: that may be another place than before. Raises `UserError` for another job.
        """
        other = self.job()
        if not other:
            self._write_manifest({"format": FORMAT, "job": job, "stages": {}})
        for key, what in _IDENTITY.items():
            if other and job.get(key) != other.get(key):
                raise UserError(
                    f"the output folder {self.place} holds another job, of {what} than this one's "
                    f"({key} is {other.get(key)!r} there and {job.get(key)!r} here; its teacher was "
                    f"{other.get('teacher')}); choose another --output"
                )

    def update_job(self, job: dict[str, Any]) -> None:
        """Note where the teacher of this job is now. Called by who holds the lock."""
        manifest = self.manifest()
        if manifest["job"] != job:
            self._write_manifest({**manifest, "job": job})

    @contextlib.contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """Hold the job's folder; a second job on the same folder is refused instead of mixing with the first."""
        if self.store:
            with hold_lease(self.store) as self._check_held:
                yield
            return
        with open(self.path(LOCK), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another ppcl job is writing to {self.place}; wait for it or choose another --output"
                ) from None
            yield

    def record(self, stage: str) -> StageRecord | None:
        values = self.manifest()["stages"].get(stage)
        return StageRecord(**values) if values else None

    def stage_files(self, stage: str, pattern: str = "*") -> StageFiles:
        """The files of a complete stage, or those of a glob pattern. Raises `UserError` where it is not complete."""
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.place} has no complete {stage}; run ppcl compress again to continue from there")
        files = {name: file for name, file in record.files.items() if fnmatch.fnmatch(name, f"{stage}/{pattern}")}
        names = sorted(str(PurePosixPath(name).relative_to(stage)) for name in files)
        return StageFiles(self.path(stage), tuple(names), _digest(files))

    def damaged(self, stage: str) -> list[str]:
        """The files of a complete stage that are gone or changed, by size and sha256; the others are then here."""
        record = self.record(stage)
        files = record.files if record else {}
        intact = parallel_map(lambda name: self._intact(name, **files[name]), list(files))
        return [name for name, is_intact in zip(files, intact, strict=True) if not is_intact]

    def _intact(self, name: str, size: int, sha256: str) -> bool:
        path = self.path(name)
        if path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256:
            return True
        return self.store is not None and self.store.download(name, path, sha256)

    def text(self, name: str) -> str:
        """A file beside the stages, such as the configuration. Raises `OSError` where it cannot be read."""
        return self.store.read(name).decode() if self.store else self.path(name).read_text()

    def continue_log(self) -> None:
        """Begin the log and the events on this node with the store's, unless this node has more, not uploaded yet."""
        if self.store is None:
            return
        for name in (LOG, EVENTS):
            with contextlib.suppress(FileNotFoundError):
                content, path = self.store.read(name), self.path(name)
                if not path.exists() or not path.read_bytes().startswith(content):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)

    def file(self, *parts: str) -> Path:
        """One file of a complete stage, downloaded if the job is in a bucket; absent if it is damaged or missing."""
        path, name = self.path(*parts), "/".join(parts)
        record = self.record(parts[0]) if self.store else None
        if record and name in record.files and not self._intact(name, **record.files[name]):
            path.unlink(missing_ok=True)
        return path

    def commit(
        self, stage: str, key: str, seconds: float = 0.0, info: dict[str, Any] | None = None, format: int = 1
    ) -> None:
        """Record a stage as complete, with every whole file now in its folder but for checkpoints."""
        folder = self.path(stage)
        paths = {
            str(path.relative_to(self.root)): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != PARTIAL and CHECKPOINTS not in path.relative_to(folder).parts
        }
        files = {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in paths.items()}
        if self.store:
            self._upload_stage(self.store, stage, paths)
        record = StageRecord(key, files, round(seconds, 3), info or {}, format)
        manifest = self.manifest()
        manifest["stages"][stage] = asdict(record)
        self._write_manifest(manifest)

    def _upload_stage(self, store: Store, stage: str, paths: dict[str, Path]) -> None:
        """Upload a stage's files, then remove what workers uploaded on the way and the stage did not keep."""
        parallel_map(lambda name: store.upload(paths[name], name), list(paths))
        uploaded = [f"{stage}/{name}" for name in Store(f"{store.url}/{stage}").objects()]
        stale = [name for name in uploaded if name not in paths and CHECKPOINTS not in name.split("/")]
        parallel_map(store.remove, stale)

    def drop_record(self, stage: str) -> None:
        """Take a stage out of the manifest, and keep its files."""
        manifest = self.manifest()
        if manifest["stages"].pop(stage, None):
            self._write_manifest(manifest)

    def invalidate(self, stage: str, keep: str | None = None) -> None:
        """Drop a stage's record, then its files but for the folder `keep`, from which the stage resumes."""
        self.drop_record(stage)
        folder = self.path(stage)
        if keep is None:
            remove(folder)
            return
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if self.store:
            names |= {name.split("/")[0] for name in Store(f"{self.store.url}/{stage}").objects()}
        for name in sorted(names - {keep}):
            remove(folder / name)

    def is_complete(self, stage: str, key: str, format: int, emit: Callable[[str], None]) -> bool:
        """Whether a stage can be skipped; says through `emit` why a complete one has to be made again."""
        record = self.record(stage)
        if record is None:
            return False
        if record.format != format:
            emit(
                f"{stage}: another version of ppcl wrote it, in format {record.format}, and this one writes format "
                f"{format}; making it again"
            )
            return False
        if record.key != key:
            emit(f"{stage}: what it depends on has changed; making it again")
            return False
        if damaged := self.damaged(stage):
            emit(
                f"{stage}: {damaged[0]} is damaged or missing (its sha256 differs from the manifest's); making it again"
            )
            return False
        return True


def fetch_stage(folder: str | Path) -> Path:
    """The folder of a complete stage on this node: itself, or downloaded into its mirror and verified.

    Raises `UserError` where a file is damaged or missing.
    """
    if store_of(folder) is None:
        return Path(folder)
    on_this_node = to_local(folder)
    artifacts = Artifacts(on_this_node.parent)
    with once_a_node(on_this_node):
        record = artifacts.record(on_this_node.name)
        if record is None:
            raise UserError(f"{artifacts.place} has no complete {on_this_node.name}; run ppcl compress again")
        if bad := artifacts.damaged(on_this_node.name):
            raise UserError(
                f"{artifacts.place}/{bad[0]} is damaged or missing; run ppcl compress again to make it again"
            )
        known = {artifacts.path(name) for name in record.files}
        for path in on_this_node.rglob("*"):
            # Left from another run of the stage.
            if path.is_file() and path not in known:
                path.unlink()
    return on_this_node
