"""Stream prompts from text, JSON-lines, CSV and Parquet files, and from folders of Parquet shards."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ppcl.calibration.splits import LEAST_PROMPTS
from ppcl.config.location import SCHEME, Location, LocationLike
from ppcl.errors import UserError
from ppcl.storage.manifest import key_of
from ppcl.storage.mirror import file_version, local_file
from ppcl.storage.node_cache import file_sha256
from ppcl.storage.object_store import Store

_PARQUET_ROWS = 1024
_SHARD = ".parquet"


class Prompt(NamedTuple):
    """`id` counts the prompts from 0; `image` is the absolute path or the URL of its image, where images are used."""

    id: int
    text: str
    image: str | None


class PromptFile(NamedTuple):
    """A file of prompts: its path on this node, and its place, for messages and for what it names beside itself."""

    path: Path
    place: str


def read_prompts(
    location: LocationLike, column: str, image_column: str | None = None, limit: int | None = None
) -> Iterator[Prompt]:
    """Yield the first `limit` prompts of a file, in order, without blank ones. Memory does not grow with the file.

    `.txt` has one prompt a line; `.jsonl`, `.csv` and `.parquet` have them in `column`, and the images in
    `image_column`: paths relative to the file's folder, or `s3://` URLs. A folder has Parquet shards, read in the order
    of their names. Raises `UserError` that names the line or row.
    """
    files = prompt_files(location)
    for file in files:
        if file.path.suffix not in _READERS:
            raise UserError(
                f"the prompt file {file.place} ends in {file.path.suffix!r}; supported are {', '.join(_READERS)}, and "
                f"folders of {_SHARD}"
            )
        if file.path.suffix == ".txt" and image_column:
            raise UserError(
                f"the prompt file {file.place} names no images; calibration.source 'images' takes .jsonl, .csv or "
                ".parquet"
            )
    columns = [column, image_column] if image_column else [column]
    return islice(_numbered(files, columns), limit)


def prompt_files(location: LocationLike) -> list[PromptFile]:
    """The files of prompts at a location, downloaded where they are in a bucket. Raises `UserError` for none."""
    location = Location.of(location)
    if location.is_url:
        return _prompt_objects(location)
    path = location.path
    if path.is_dir():
        return [PromptFile(path / name, str(path / name)) for name in _shards(str(path), _names_below(path))]
    path = local_file(path)
    if not path.is_file():
        raise UserError(
            f"the prompt file {path} does not exist; set prompts to a .txt, .jsonl, .csv or .parquet file, or to a "
            f"folder of {_SHARD} files"
        )
    return [PromptFile(path, str(path))]


def _prompt_objects(location: Location) -> list[PromptFile]:
    store = Store(location.url)
    if store.prefix and store.head() is not None:
        return [PromptFile(local_file(location), location.url)]
    names = list(store.objects())
    if not names:
        raise UserError(f"{location} does not exist; upload it or correct the URL")
    places = [f"{location}/{name}" for name in _shards(str(location), names)]
    return [PromptFile(local_file(place), place) for place in places]


def _names_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(f"*{_SHARD}") if path.is_file()]


def _shards(place: str, names: Iterable[str]) -> list[str]:
    """Names of Parquet files, in order, numbers by their value; what begins with a dot or `_` is a writer's own."""
    shards = [
        name
        for name in names
        if name.endswith(_SHARD) and not any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
    ]
    if not shards:
        raise UserError(f"the folder of prompts {place} holds no {_SHARD} files; give such a folder, or one file")
    return sorted(shards, key=lambda name: ([(t, int(n)) for t, n in re.findall(r"(\D*)(\d{1,18})", name)], name))


def prompts_sha256(location: LocationLike) -> str:
    """One hash of the content of all files at a location."""
    hashes = [file_sha256(file.path) for file in prompt_files(location)]
    return hashes[0] if len(hashes) == 1 else key_of(hashes)


def check_prompts(
    location: LocationLike,
    column: str,
    image_column: str | None = None,
    limit: int | None = None,
    different: int = LEAST_PROMPTS,
) -> str:
    """Read a prompt file once, so that its mistakes are found before any work is done; return a hash of its content.

    `different`: how many prompts must differ; by default one for each split. Images enter the hash by path, size and
    time of change. Raises `UserError` as `read_prompts` does, for fewer than `different` prompts that
    differ, and for images that do not exist.
    """
    count = 0
    texts: set[str] = set()
    images: list[tuple[Any, ...]] = []
    for prompt in read_prompts(location, column, image_column, limit):
        count += 1
        if len(texts) < different:
            texts.add(prompt.text)
        if prompt.image is not None:
            version = file_version(prompt.image)
            if version is None:
                raise UserError(f"{location}: the image {prompt.image} of prompt {count} does not exist")
            images.append(version)
    if not count:
        raise UserError(f"the prompt file {location} holds no prompts")
    if len(texts) < different:
        raise UserError(
            f"the prompt file {location} gives only {len(texts)} different prompt{'s' if len(texts) > 1 else ''}"
            f"{f' in its first {limit}' if limit else ''}; at least {different} are needed, one to train, one to "
            "validate and one to test"
        )
    return key_of(prompts_sha256(location), prompt_files(location)[0].path.suffix, images)


def count_prompts(location: LocationLike, column: str, limit: int | None = None) -> int:
    """The number of prompts that are used. Raises `UserError` as `read_prompts` does."""
    return sum(1 for _ in read_prompts(location, column, limit=limit))


def _numbered(files: list[PromptFile], columns: list[str]) -> Iterator[Prompt]:
    number = 0
    for file in files:
        for text, image in _prompts(file, columns):
            yield Prompt(number, text, image)
            number += 1


def _prompts(file: PromptFile, columns: list[str]) -> Iterator[tuple[str, str | None]]:
    """The texts and images of a file's rows, checked, without those whose text is blank."""
    try:
        for where, (text, *images) in _READERS[file.path.suffix](file, columns):
            row = f"{file.place}, {where}"
            _require_text(text, "prompt", row)
            for image in images:
                _require_text(image, "image's path", row)
                if not image.strip():
                    raise UserError(f"{row}: the image's path is empty; give every prompt its image")
            if text.strip():
                yield text.strip(), _image_place(file.place, images[0], row) if images else None
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt file {file.place} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def _require_text(value: Any, what: str, row: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{row}: the {what} is {value!r}, which is not text")
    if half := half_character(value):
        raise UserError(f"{row}: the {what} has half a character ({half}), which no file can hold; write it whole")


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text, as JSON writes it: what UTF-8 cannot hold. None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def _image_place(file: str, image: str, row: str) -> str:
    """The path or URL of an image that a file of prompts names, absolute or relative to the file's folder."""
    if "://" in image:
        try:
            return str(Location(image))
        except ValueError as error:
            raise UserError(f"{row}: the image {image!r} cannot be read: {error}") from None
    if not file.startswith(SCHEME) or image.startswith("/"):
        return str((Path(file).parent / image).absolute())
    bucket, *folder = file.removeprefix(SCHEME).split("/")[:-1]
    for part in image.split("/"):
        if part == ".." and not folder:
            raise UserError(f"{row}: the image {image!r} leads out of the bucket; give its s3:// URL")
        if part == "..":
            folder.pop()
        elif part != ".":
            folder.append(part)
    return f"{SCHEME}{bucket}/{'/'.join(folder)}"


def _txt(file: PromptFile, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    with open(file.path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            yield f"line {number}", [line]


def unreadable_json(error: Exception) -> str:
    """What is wrong with a line, from what reading it as JSON raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg}); correct or remove it"
    # Valid, and nothing that Python reads.
    if isinstance(error, RecursionError):
        return "has brackets in thousands of levels; remove what holds them"
    return "has a number of thousands of digits; shorten or remove it"


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, with keys that it has twice."""


def _jsonl(file: PromptFile, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    with open(file.path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.place}, line {number}"
            try:
                row = json.loads(line, object_pairs_hook=_Pairs)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} {unreadable_json(error)}") from None
            if not isinstance(row, _Pairs):
                raise UserError(f"{where} is not a JSON object with the key {columns[0]!r}")
            _require(where, columns, [name for name, _ in row])
            values = dict(row)
            yield f"line {number}", [values[name] for name in columns]


def _csv(file: PromptFile, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    with open(file.path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            if reader.fieldnames is None:
                return
            _require(file.place, columns, list(reader.fieldnames))
            for row in reader:
                yield f"line {reader.line_num}", [row[name] for name in columns]
        except csv.Error as error:
            raise UserError(f"{file.place}, line {reader.line_num} is not valid CSV ({error})") from None


def _parquet(file: PromptFile, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    try:
        with pq.ParquetFile(file.path) as rows:
            _require(file.place, columns, rows.schema_arrow.names)
            number = 0
            for batch in rows.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    yield f"row {number}", list(values)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the prompt file {file.place} cannot be read as Parquet ({error})") from None


_READERS: dict[str, Callable[[PromptFile, list[str]], Iterator[tuple[str, list[Any]]]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _require(where: str, columns: list[str], present: list[str]) -> None:
    for name in columns:
        if present.count(name) > 1:
            raise UserError(f"{where} has {present.count(name)} columns {name!r}; rename or remove all but one")
        if name not in present:
            raise UserError(
                f"{where} has no column {name!r}; it has {', '.join(present)}; set calibration.prompt_column or "
                "image_column"
            )
