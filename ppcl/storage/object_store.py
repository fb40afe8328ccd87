"""The S3 client: read, write, list and remove the objects of a bucket under a URL prefix, with retries.

All requests to a bucket go through this module. Endpoint, credentials and region come from the usual environment
variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_DEFAULT_REGION`, ...).

Writers leave the sha256 of an object in its metadata; readers compare what they get with it. How code that works on
files uses a bucket is in `ppcl.storage.mirror`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Collection
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.asyn import sync

from ppcl.config.location import SCHEME
from ppcl.errors import UserError, cannot_write
from ppcl.storage.atomic import remove_partials, replacing
from ppcl.storage.node_cache import T, file_sha256, once_a_node, parallel_map
from ppcl.storage.scratch import keep_used, reserve, scratch_folder

_SHA256 = "sha256"  # in an object's metadata
_HASHES = ".sha256"  # a folder in a snapshot, with the hash of each file as it was downloaded

# An object is downloaded by requests of so many bytes, so many of them at once: a thread's memory is bounded.
_PART_BYTES, _PARTS_AT_ONCE = 16 << 20, 4

# Attempts of one request, unless AWS_MAX_ATTEMPTS is set, and the pause after the first one, seconds; it doubles.
_ATTEMPTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_CONNECT_SECONDS, _READ_SECONDS = 10, 30
# Of an object that is read whole without a file.
_PART_BYTES = 32 << 20
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
_UNREACHABLE = ("EndpointConnectionError", "ConnectTimeoutError")
_REFUSED = {
    "AccessDenied": "the credentials may not do that",
    "InvalidAccessKeyId": "it does not know the access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
}


class _Damaged(Exception):
    """What was downloaded is not what its writer wrote."""


class Object(NamedTuple):
    """An object of a listing: its size in bytes, and a tag that changes with the content."""

    size: int
    tag: str


class Store:
    """The objects under a URL, by names relative to it. Failed requests are tried again with growing pauses.

    Raises `UserError` for a missing bucket, wrong credentials and a store that stays unusable, and `FileNotFoundError`
    for an object that does not exist.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.bucket, _, self.prefix = self.url.removeprefix(SCHEME).partition("/")

    def __reduce__(self) -> tuple:
        return Store, (self.url,)

    def _key(self, name: str) -> str:
        return "/".join(filter(None, (self.prefix, name)))

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self._key(name)}"

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._with_retries(lambda: _files().call_s3(method, Bucket=self.bucket, **arguments))

    def _with_retries(self, action: Callable[[], T]) -> T:
        """Run `action` again until it succeeds. Raises `UserError` where trying again does not help."""
        # Only what touches a bucket pays for these imports.
        from aiohttp import ClientError as ConnectionFailed
        from botocore.exceptions import BotoCoreError, ClientError

        attempts = max(1, int(os.environ.get("AWS_MAX_ATTEMPTS") or _ATTEMPTS))
        failure = ""
        for attempt in range(attempts):
            try:
                return action()
            except FileExistsError:
                raise
            except (OSError, BotoCoreError, ClientError, ConnectionFailed) as error:
                sentence = self._permanent_failure(error)
                if sentence:
                    raise UserError(sentence) from None
                if isinstance(error, FileNotFoundError):
                    raise
                failure = _reason(error)
                logging.getLogger(__name__).debug("%s: %s", self.url, failure)
            if attempt + 1 < attempts:
                time.sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.5))
        raise UserError(
            f"the store of {self.url} does not work ({failure}; tried {attempts} times); what is complete is kept: the "
            "same command continues when it works again"
        )

    def _permanent_failure(self, error: Exception) -> str | None:
        """The sentence for the user about an error that no retry can mend; None for one that may pass.

        Raises `FileExistsError` where a conditional write lost.
        """
        if type(error).__name__ in _NO_CREDENTIALS:
            return f"there are no credentials for {self.url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        code, status = _answer(error)
        if code == "NoSuchBucket":
            return f"the bucket {self.bucket} of {self.url} does not exist at {_endpoint()}; make it or correct the URL"
        if code == "PreconditionFailed" or status == 412:
            raise FileExistsError(self.url) from None
        if code == "RequestTimeTooSkewed":
            return (
                f"the store at {_endpoint()} refuses {self.url}: the clock of {socket.gethostname()} is wrong by too "
                "much; set it"
            )
        if code in _REFUSED or status in (401, 403):
            why = _REFUSED.get(code or "", "it does not accept the credentials, or they may not do that")
            return (
                f"the store at {_endpoint()} refuses {self.url}: {why}; look at AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY and the bucket's policy"
            )
        if isinstance(error, OSError) and not status and (sentence := cannot_write(error)):
            return f"{sentence}; free space, or set PPCL_SCRATCH to another folder"
        if (
            status
            and 400 <= status < 500
            and status not in (404, 408, 429)
            and not isinstance(error, FileNotFoundError)
        ):
            return f"the store at {_endpoint()} does not accept a request for {self.url}: {_reason(error)}"
        return None

    def objects(self, under: str = "") -> dict[str, Object]:
        """All objects whose name begins with `under`, by name."""
        objects: dict[str, Object] = {}
        next_page: dict[str, Any] = {}
        # With the slash, or `result` would list `result-2` too.
        prefix = self._key(under) if under else f"{self.prefix}/" if self.prefix else ""
        while True:
            answer = self._call("list_objects_v2", Prefix=prefix, **next_page)
            for item in answer.get("Contents", ()):
                name = item["Key"].removeprefix(f"{self.prefix}/") if self.prefix else item["Key"]
                if not name.endswith("/"):
                    objects[name] = Object(item["Size"], item["ETag"])
            if not answer.get("IsTruncated"):
                return objects
            next_page = {"ContinuationToken": answer["NextContinuationToken"]}

    def head(self, name: str = "") -> dict[str, Any] | None:
        """Size, metadata and tag of an object, and times by the store's own clock; None if it does not exist."""
        try:
            return self._call("head_object", Key=self._key(name))
        except FileNotFoundError:
            return None

    def sha256(self, name: str = "") -> str | None:
        """The sha256 that the writer of an object left; None where it left none or the object does not exist."""
        answer = self.head(name)
        return answer["Metadata"].get(_SHA256) if answer else None

    def read(self, name: str = "", start: int = 0, stop: int | None = None, tag: str | None = None) -> bytes:
        """Read an object, or its bytes `start` to `stop`, `stop` excluded.

        `tag`: that of the object as it was. Raises `FileExistsError` where another stands in its place.
        """
        part = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        if tag is not None:
            part["IfMatch"] = tag

        async def get() -> bytes:
            answer = await _files()._call_s3("get_object", Bucket=self.bucket, Key=self._key(name), **part)
            async with answer["Body"] as body:
                content = await body.read()
            # A connection that is cut may read as the end.
            if len(content) != answer["ContentLength"] or (stop is not None and len(content) != stop - start):
                raise ConnectionError(f"only {len(content)} bytes came of {self._path(name)}")
            return content

        return self._with_retries(lambda: sync(_files().loop, get))

    def sha256_of_content(self, name: str, size: int, tag: str) -> str:
        """The sha256 of an object of `size` bytes, which is read whole, a part at a time.

        Raises `FileExistsError` where another than that of the tag stands in its place.
        """
        sha256 = hashlib.sha256()
        for start in range(0, size, _PART_BYTES):
            sha256.update(self.read(name, start, min(start + _PART_BYTES, size), tag))
        return sha256.hexdigest()

    def write(self, name: str, content: bytes, **conditions: str) -> str:
        """Write a whole object and return its tag.

        `conditions`: `IfNoneMatch="*"` or `IfMatch=tag`. Raises `FileExistsError` where they do not hold.
        """
        metadata = {_SHA256: hashlib.sha256(content).hexdigest()}
        return self._call("put_object", Key=self._key(name), Body=content, Metadata=metadata, **conditions)["ETag"]

    def upload(self, path: Path, name: str) -> None:
        """Write a file as an object, unless the same content is there already."""
        sha256 = file_sha256(path)
        if self.sha256(name) != sha256:
            self._with_retries(lambda: _files().put_file(str(path), self._path(name), Metadata={_SHA256: sha256}))

    def download(self, name: str, path: Path, sha256: str | None = None, tag: str | None = None) -> bool:
        """Download an object into a file, whole or not at all. False where it does not exist or its sha256 differs.

        `sha256`: the expected one; by default that of the object's writer. A file that has it already is kept. `tag`:
        that of the object as it was listed. Raises `FileExistsError` where another stands in its place, and `UserError`
        where there is no room for the file.
        """
        if sha256 and path.is_file() and file_sha256(path) == sha256:
            return True
        answer = self.head(name)
        if answer is None:
            return False
        if tag is not None and answer["ETag"] != tag:
            raise FileExistsError(self.url)
        sha256 = sha256 or answer["Metadata"].get(_SHA256)
        if sha256 and path.is_file() and file_sha256(path) == sha256:
            return True
        try:
            # Its content is compared whenever it is used, and it can be downloaded again.
            with replacing(path, durable=False) as partial:
                reserve(partial, answer["ContentLength"], f"{self.url}/{name}".rstrip("/"))
                self._read_into(partial, name, answer["ContentLength"], answer["ETag"])
                if sha256 and file_sha256(partial) != sha256:
                    raise _Damaged
        except (FileNotFoundError, _Damaged):
            return False
        except FileExistsError:
            if tag is not None:
                raise
            return False
        return True

    def _read_into(self, path: Path, name: str, size: int, tag: str) -> None:
        """Read an object of `size` bytes into a file, by requests of its parts that all ask for the same content."""
        starts = range(0, size, _PART_BYTES)
        try:
            with open(path, "r+b") as file:
                for first in range(0, len(starts), _PARTS_AT_ONCE):
                    together = starts[first : first + _PARTS_AT_ONCE]
                    for start, part in zip(together, parallel_map(partial(self._part, name, size, tag), together)):
                        file.seek(start)
                        file.write(part)
        except OSError as error:
            if sentence := None if isinstance(error, FileExistsError | FileNotFoundError) else cannot_write(error):
                raise UserError(f"{sentence}; free space, or set PPCL_SCRATCH to another folder") from None
            raise

    def _part(self, name: str, size: int, tag: str, start: int) -> bytes:
        return self.read(name, start, min(start + _PART_BYTES, size), tag)

    def remove(self, under: str) -> None:
        """Remove an object, or all objects under a name."""
        names = [name for name in self.objects(under) if name == under or name.startswith(f"{under}/")]
        for name in names:
            self._call("delete_object", Key=self._key(name))

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, by the store's clock; None if it does not exist."""
        answer = self.head(name)
        if answer is None:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - answer["LastModified"]).total_seconds()

    def snapshot(self, names: Collection[str], listed: dict[str, Object]) -> Path:
        """A folder of this node with the objects `names` as they were when `listed`.

        Missing ones are downloaded, those that are there compared with their sha256. Raises `UserError` for one that is
        damaged or missing, or that another has replaced since.
        """
        folder = (
            scratch_folder()
            / "snapshots"
            / hashlib.sha256(f"{self.url} {sorted(listed.items())}".encode()).hexdigest()[:16]
        )
        keep_used(folder)
        with once_a_node(folder):
            remove_partials(folder)
            parallel_map(lambda name: self._snapshot_file(folder, name, listed[name].tag), names)
        return folder

    def _snapshot_file(self, folder: Path, name: str, tag: str) -> None:
        path, noted = folder / name, folder / _HASHES / f"{name}.sha256"
        if path.is_file() and noted.is_file() and file_sha256(path) == noted.read_text():
            return
        try:
            intact = self.download(name, path, tag=tag)
        except FileExistsError:
            raise UserError(
                f"{self.url}/{name} was replaced while it was read; leave it as it is until the job has ended, and run "
                "the same command again"
            ) from None
        if not intact:
            raise UserError(
                f"{self.url}/{name} is damaged or missing: its content does not match its sha256; upload it again"
            )
        # Not every writer leaves a hash.
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(file_sha256(path))


@lru_cache(maxsize=1)
def _files() -> Any:
    """The S3 client of this process."""
    # A slow import that only buckets need.
    import s3fs

    # This module retries by itself; s3fs and botocore would each do so, too.
    client = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"total_max_attempts": 1},
        },
    )
    client.retries = 1
    return client


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _answer(error: BaseException | None) -> tuple[str | None, int | None]:
    """The store's error code and HTTP status, if it answered; s3fs wraps them in errors of its own."""
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
