"""Stream prompts from text, JSON-lines, CSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ppcl.calibration.splits import LEAST_PROMPTS
from ppcl.config.location import LocationLike
from ppcl.errors import UserError
from ppcl.storage.manifest import key_of
from ppcl.storage.mirror import file_version, local_file
from ppcl.storage.node_cache import file_sha256

_PARQUET_ROWS = 1024


class Prompt(NamedTuple):
    """`id` counts the file's prompts from 0; `image` is the absolute path of its image, where images are used."""

    id: int
    text: str
    image: str | None


def read_prompts(
    location: LocationLike, column: str, image_column: str | None = None, limit: int | None = None
) -> Iterator[Prompt]:
    """Yield the first `limit` prompts of a file, in order, without blank ones. Memory does not grow with the file.

    `.txt` has one prompt a line; `.jsonl`, `.csv` and `.parquet` have them in `column`, and the image paths, relative
    to the file's folder, in `image_column`. Raises `UserError` that names the line or row.
    """
    path = local_file(location)
    if not path.is_file():
        raise UserError(f"the prompt file {path} does not exist; set prompts to a .txt, .jsonl, .csv or .parquet file")
    readers = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"the prompt file {path} ends in {path.suffix!r}; supported are {', '.join(readers)}")
    if path.suffix == ".txt" and image_column:
        raise UserError(
            f"the prompt file {path} names no images; calibration.source 'images' takes .jsonl, .csv or .parquet"
        )
    columns = [column, image_column] if image_column else [column]
    return islice(_prompts(path, readers[path.suffix](path, columns)), limit)


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
            version = file_version(Path(prompt.image))
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
    path = local_file(location)
    return key_of(file_sha256(path), path.suffix, images)


def count_prompts(location: LocationLike, column: str, limit: int | None = None) -> int:
    """The number of prompts that are used. Raises `UserError` as `read_prompts` does."""
    return sum(1 for _ in read_prompts(location, column, limit=limit))


def _prompts(path: Path, rows: Iterable[tuple[str, list[Any]]]) -> Iterator[Prompt]:
    """Check and number the prompts of `rows`: (name of the row in an error, its values)."""
    number = 0
    try:
        for where, (text, *image) in rows:
            for value, what in ((text, "prompt"), *((i, "image's path") for i in image)):
                if not isinstance(value, str):
                    raise UserError(f"{path}, {where}: the {what} is {value!r}, which is not text")
            if not text.strip():
                continue
            yield Prompt(number, text.strip(), str((path.parent / image[0]).absolute()) if image else None)
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt file {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def _txt(path: Path, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            yield f"line {number}", [line]


def _jsonl(path: Path, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is not a JSON object with the key {columns[0]!r}")
            _require(f"{path}, line {number}", columns, row)
            yield f"line {number}", [row[name] for name in columns]


def _csv(path: Path, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames is None:
                return
            _require(str(path), columns, reader.fieldnames)
            for row in reader:
                yield f"line {reader.line_num}", [row[name] for name in columns]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num} is not valid CSV ({error})") from None


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            _require(str(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    yield f"row {number}", list(values)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the prompt file {path} cannot be read as Parquet ({error})") from None


def _require(where: str, columns: list[str], present: Iterable[str]) -> None:
    for name in columns:
        if name not in present:
            raise UserError(
                f"{where} has no column {name!r}; it has {', '.join(present)}; set calibration.prompt_column or "
                "image_column"
            )
