"""Where models, prompts and results lie: a folder, or a prefix of a bucket, `s3://bucket/key`.

Everything that touches a bucket goes through this module. Endpoint, credentials and region come from the usual
environment variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_DEFAULT_REGION`, ...).

Code works on files. What lies in a bucket is worked on in its *mirror*, a folder of this node named after it under
`PPCL_SCRATCH` (a temporary folder by default); a path inside of a mirror says by itself where it comes from, so it can be
sent to another node, which has a mirror of its own. The bucket is the truth: what is read from it is held against the
sha256 that its writer left in the object's metadata, or against a manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from fsspec.asyn import sync
from pydantic import PlainSerializer, WrapValidator

from ppcl.errors import UserError, cannot_write

_SCHEME = "s3://"
_MIRROR = "ppcl-mirror"
_SHA256 = "sha256"  # in an object's metadata

# Tries of one request, if AWS_MAX_ATTEMPTS does not say otherwise, and the pause after the first, seconds; it doubles.
_ATTEMPTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_CONNECT_SECONDS, _READ_SECONDS = 10, 30
# Objects on their way at once.
_AT_ONCE = 8
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
_UNREACHABLE = ("EndpointConnectionError", "ConnectTimeoutError")
_REFUSED = {
    "AccessDenied": "the credentials may not do that",
    "InvalidAccessKeyId": "it does not know the access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
}

T = TypeVar("T")


def is_url(place: Any) -> bool:
    return isinstance(place, str) and place.startswith(_SCHEME)


def _place(value: Any, path: Callable[[Any], Path]) -> Path | str:
    if not is_url(value):
        return path(value)
    if not value.removeprefix(_SCHEME).split("/")[0]:
        raise ValueError("the bucket's name is missing; give s3://bucket/key")
    return value.rstrip("/")


# A setting that is a path, or the URL of something in a bucket, which stays text.
Place = Annotated[Path, WrapValidator(_place), PlainSerializer(str, when_used="json")]


class Object(NamedTuple):
    """What the store says of an object in a listing; the tag changes with the content."""

    size: int
    tag: str


class Store:
    """The objects under a URL, by names relative to it. Every request is tried again for a while where the store fails.

    Raises `UserError` for a bucket that is not there, credentials that are wrong, and a store that stays unusable, and
    `FileNotFoundError` for an object that does not exist.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.bucket, _, self.prefix = self.url.removeprefix(_SCHEME).partition("/")

    def __reduce__(self) -> tuple:
        return Store, (self.url,)

    def _key(self, name: str) -> str:
        return "/".join(filter(None, (self.prefix, name)))

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self._key(name)}"

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._tried(lambda: _files().call_s3(method, Bucket=self.bucket, **arguments))

    def _tried(self, action: Callable[[], T]) -> T:
        """Raises `UserError` with what to do about it, once it is clear that trying again does not help."""
        from aiohttp import ClientError as ConnectionFailed
        from botocore.exceptions import BotoCoreError, ClientError

        attempts = max(1, int(os.environ.get("AWS_MAX_ATTEMPTS") or _ATTEMPTS))
        for attempt in range(attempts):
            try:
                return action()
            except FileExistsError:
                raise
            except (OSError, BotoCoreError, ClientError, ConnectionFailed) as error:
                told = self._hopeless(error)
                if told:
                    raise UserError(told) from None
                if isinstance(error, FileNotFoundError):
                    raise
                failure = _reason(error)
                logging.getLogger(__name__).debug("%s: %s", self.url, failure)
            if attempt + 1 < attempts:
                time.sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.5))
        raise UserError(
            f"the store of {self.url} does not work ({failure}; tried {attempts} times); what is complete is kept: the same "
            "command continues when it works again"
        )

    def _hopeless(self, error: Exception) -> str | None:
        """The sentence about an error that stays, however often it is tried."""
        if type(error).__name__ in _NO_CREDENTIALS:
            return f"there are no credentials for {self.url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        code, status = _answer(error)
        if code == "NoSuchBucket":
            return f"the bucket {self.bucket} of {self.url} does not exist at {_endpoint()}; make it or correct the URL"
        if code == "PreconditionFailed" or status == 412:
            raise FileExistsError(self.url) from None
        if code == "RequestTimeTooSkewed":
            return f"the store at {_endpoint()} refuses {self.url}: the clock of {socket.gethostname()} is wrong by too much; set it"
        if code in _REFUSED or status in (401, 403):
            why = _REFUSED.get(code, "it does not accept the credentials, or they may not do that")
            return f"the store at {_endpoint()} refuses {self.url}: {why}; look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and the bucket's policy"
        if isinstance(error, OSError) and not status and (told := cannot_write(error)):
            return f"{told}; free space, or set PPCL_SCRATCH to another folder"
        if status and 400 <= status < 500 and status not in (404, 408, 429) and not isinstance(error, FileNotFoundError):
            return f"the store at {_endpoint()} does not accept a request for {self.url}: {_reason(error)}"
        return None

    def objects(self, under: str = "") -> dict[str, Object]:
        """Every object whose name begins with `under`, by its name."""
        found: dict[str, Object] = {}
        more: dict[str, Any] = {}
        # With the slash, or `result` would list `result-2` too.
        prefix = self._key(under) if under else f"{self.prefix}/" if self.prefix else ""
        while True:
            answer = self._call("list_objects_v2", Prefix=prefix, **more)
            for item in answer.get("Contents", ()):
                name = item["Key"].removeprefix(f"{self.prefix}/") if self.prefix else item["Key"]
                if not name.endswith("/"):
                    found[name] = Object(item["Size"], item["ETag"])
            if not answer.get("IsTruncated"):
                return found
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def head(self, name: str = "") -> dict[str, Any] | None:
        """What the store says of an object: its size, metadata, tag, and times by the store's own clock; None if it is not there."""
        try:
            return self._call("head_object", Key=self._key(name))
        except FileNotFoundError:
            return None

    def sha256(self, name: str = "") -> str | None:
        """What the writer of an object left as its sha256; None where it left none, or there is no such object."""
        answer = self.head(name)
        return answer["Metadata"].get(_SHA256) if answer else None

    def read(self, name: str = "", start: int | None = None, stop: int | None = None) -> bytes:
        """An object, or the bytes `start` to `stop` of it, `stop` excluded."""
        part = {} if start is None else {"Range": f"bytes={start}-{stop - 1}"}

        async def get() -> bytes:
            answer = await _files()._call_s3("get_object", Bucket=self.bucket, Key=self._key(name), **part)
            async with answer["Body"] as body:
                content = await body.read()
            # A connection that is cut may read as the end.
            if len(content) != answer["ContentLength"] or (part and len(content) != stop - start):
                raise ConnectionError(f"only {len(content)} bytes came of {self._path(name)}")
            return content

        return self._tried(lambda: sync(_files().loop, get))

    def write(self, name: str, content: bytes, **conditions: str) -> str:
        """Write an object whole; gives its tag. `conditions`: `IfNoneMatch="*"` or `IfMatch=tag`, else `FileExistsError`."""
        metadata = {_SHA256: hashlib.sha256(content).hexdigest()}
        return self._call("put_object", Key=self._key(name), Body=content, Metadata=metadata, **conditions)["ETag"]

    def upload(self, path: Path, name: str) -> None:
        """Write a file as an object, unless the same content is there already."""
        sha256 = file_sha256(path)
        if self.sha256(name) != sha256:
            self._tried(lambda: _files().put_file(str(path), self._path(name), Metadata={_SHA256: sha256}))

    def download(self, name: str, path: Path, sha256: str | None = None) -> bool:
        """Read an object into a file, whole or not at all; false where it is not there, or is not what its sha256 says.

        `sha256`: what it must be; by default what its writer left. A file that is there already and right is kept.
        """
        sha256 = sha256 or self.sha256(name)
        if sha256 and path.is_file() and file_sha256(path) == sha256:
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self._tried(lambda: _files().get_file(self._path(name), str(partial)))
            if sha256 and file_sha256(partial) != sha256:
                return False
            os.replace(partial, path)
        except FileNotFoundError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        return True

    def remove(self, under: str) -> None:
        """Remove an object, or all under a name."""
        names = [name for name in self.objects(under) if name == under or name.startswith(f"{under}/")]
        for name in names:
            self._call("delete_object", Key=self._key(name))

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, both times by the store's clock; None if it is not there."""
        answer = self.head(name)
        if answer is None:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - answer["LastModified"]).total_seconds()

    def snapshot(self, names: Collection[str], listed: dict[str, Object]) -> Path:
        """A folder of this node with these of the objects, as they were when `listed`. Downloads those it does not have."""
        folder = _scratch() / "snapshots" / hashlib.sha256(f"{self.url} {sorted(listed.items())}".encode()).hexdigest()[:16]
        with once_a_node(folder):
            each(lambda name: self._snapshot_file(folder / name, name), [n for n in names if not (folder / n).exists()])
        return folder

    def _snapshot_file(self, path: Path, name: str) -> None:
        if not self.download(name, path):
            raise UserError(f"{self.url}/{name} is damaged or gone: its content is not what its sha256 says; upload it again")


@lru_cache(maxsize=1)
def _files() -> Any:
    """The one client of this process."""
    import s3fs

    # This module tries again itself: s3fs and botocore each would, too.
    client = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS, "retries": {"total_max_attempts": 1},
        },
    )  # fmt: skip
    client.retries = 1
    return client


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _answer(error: BaseException | None) -> tuple[str | None, int | None]:
    """The code and the HTTP status that the store answered with, if it did; s3fs hides them behind errors of its own."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__ or error.__context__
    return None, None


def _reason(error: Exception) -> str:
    code, status = _answer(error)
    if status:
        return f"it answers {status}" + (f" {code}" if code and code != str(status) else "")
    if type(error).__name__ in _UNREACHABLE:
        return f"nothing answers at {_endpoint()}, which AWS_ENDPOINT_URL sets"
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__


def each(call: Callable[[Any], T], items: Collection[Any]) -> list[T]:
    """`call(item)` for every item, several at once, in the order of the items; raises what the first of them raised."""
    if not items:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as pool:
        return list(pool.map(call, items))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scratch() -> Path:
    return Path(os.environ.get("PPCL_SCRATCH") or Path(tempfile.gettempdir()) / f"ppcl-{os.getuid()}").absolute()


def mirror(url: str) -> Path:
    """Where the files under a URL are worked on, on this node."""
    return _scratch() / _MIRROR / url.removeprefix(_SCHEME)


def store_of(path: str | Path) -> Store | None:
    """The store whose mirror a path lies in, on whatever node; None for an ordinary path."""
    parts = Path(path).parts
    if _MIRROR not in parts:
        return None
    return Store(_SCHEME + "/".join(parts[parts.index(_MIRROR) + 1 :]))


def here(path: str | Path) -> Path:
    """A path of another node on this one: itself, or its place in this node's mirror."""
    store = store_of(path)
    return Path(path) if store is None else mirror(store.url)


def local_file(place: str | Path) -> Path:
    """One file, downloaded to this node where it lies in a bucket. A path inside of a mirror is downloaded too."""
    store = Store(place) if is_url(place) else store_of(place)
    if store is None:
        return Path(place)
    path, tag = mirror(store.url), mirror(store.url).with_name(f".{store.url.rpartition('/')[2]}.tag")
    answer = store.head()
    if answer is None:
        raise UserError(f"{store.url} does not exist; upload it or correct the URL")
    with once_a_node(path):
        if not path.is_file() or not tag.is_file() or tag.read_text() != answer["ETag"]:
            if not store.download("", path):
                raise UserError(f"{store.url} is damaged: its content is not what its sha256 says; upload it again")
            tag.write_text(answer["ETag"])
    return path


def exists(path: str | Path) -> bool:
    """Whether a file is there; of a mirror, whether it is in the store."""
    store = store_of(path)
    return Path(path).exists() if store is None else store.head() is not None


def publish(path: Path) -> None:
    """Upload a file of a mirror, if it is one."""
    store = store_of(path)
    if store is not None:
        store.upload(path, "")


def remove(path: Path) -> None:
    """Remove a file or folder, here and in the store whose mirror it is in."""
    store = store_of(path)
    if store is not None:
        parent = Store(store.url.rpartition("/")[0])
        parent.remove(store.url.rpartition("/")[2])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def gather(folder: Path) -> None:
    """Download what other nodes uploaded into a folder of a mirror."""
    store = store_of(folder)
    if store is None:
        return
    names = [name for name in store.objects() if "checkpoints" not in name.split("/")]

    def get(name: str) -> None:
        if not store.download(name, folder / name):
            raise UserError(f"{store.url}/{name} changed or went away while it was read; run the same command again")

    each(get, names)


@contextlib.contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """A folder for what one process makes: the folder itself, or a temporary one whose files are uploaded at the end."""
    store = store_of(folder)
    if store is None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(dir=_made(_scratch() / "made")) as made:
        yield Path(made)
        files = [path for path in sorted(Path(made).rglob("*")) if path.is_file()]
        each(lambda path: store.upload(path, str(path.relative_to(made))), files)


@contextlib.contextmanager
def resumable(
    folder: str | Path, attempt: str, whole: Callable[[Path], bool], damaged: Callable[[Path], None]
) -> Iterator[Path]:
    """A folder of checkpoints, whole files that are replaced now and then, which the same work continues from, on any node.

    In a store: it begins with what lies there, and each file is uploaded soon after it was written. `attempt` names this
    run of the work, the same on all nodes: they all begin with what was there when its first process looked, but for files
    that are not what their writer left, or not `whole`: those `damaged` is told of.
    """
    store = store_of(folder)
    if store is None:
        yield Path(folder)
        return
    found = _scratch() / "checkpoints" / attempt
    with once_a_node(found):
        if not found.exists():
            coming = _made(found.with_name(f"{attempt}.coming"))
            names = list(store.objects())
            there = each(lambda name: store.download(name, coming / name) and whole(coming / name), names)
            for path in [coming / name for name, right in zip(names, there, strict=True) if not right]:
                path.unlink(missing_ok=True)
                damaged(path)
            os.replace(coming, found)
    with tempfile.TemporaryDirectory(dir=_made(_scratch() / "made")) as made:
        for path in [path for path in found.rglob("*") if path.is_file()]:
            own = Path(made) / path.relative_to(found)
            own.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, own)
        with _Uploads(Path(made), store):
            yield Path(made)
    shutil.rmtree(found, ignore_errors=True)


class _Uploads:
    """Uploads what is written into a folder, in the background; what lies there already, and unfinished files, are left out."""

    EVERY = 1.0

    def __init__(self, folder: Path, store: Store):
        self.folder, self.store = folder, store
        self.known = {path: self._version(path) for path in self._files()}
        self.failure: Exception | None = None
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != ".partial"]

    @staticmethod
    def _version(path: Path) -> tuple[int, int]:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_ino

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.ending.set()
        self.thread.join()
        if error is None and self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        last = False
        while not last:
            last = self.ending.wait(self.EVERY)
            try:
                self._upload()
                self.failure = None
            except Exception as error:
                # The work goes on: the next checkpoint is tried again, and the end raises what the last try did.
                self.failure = error

    def _upload(self) -> None:
        for path in self._files():
            if self.known.get(path) == self._version(path):
                continue
            # A second name: the first may come to stand for the next checkpoint while this one is on its way.
            held = path.with_name(f"{path.name}.held.partial")
            held.unlink(missing_ok=True)
            os.link(path, held)
            version = self._version(held)
            self.store.upload(held, str(path.relative_to(self.folder)))
            held.unlink()
            self.known[path] = version


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def once_a_node(path: Path) -> Iterator[None]:
    """One process of this node at a time: what one of them downloads, the others find."""
    _made(path.parent)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
