"""Prompts from text, JSON-lines, CSV and Parquet files, read as a stream."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ppcl.config.location import Location
from ppcl.errors import UserError
from ppcl.storage.manifest import key_of
from ppcl.storage.mirror import local_file, store_of
from ppcl.storage.node_cache import file_sha256

_PARQUET_ROWS = 1024


class Prompt(NamedTuple):
    """`id` counts the file's prompts from 0; `image` is the absolute path of its picture, where pictures are used."""

    id: int
    text: str
    image: str | None


def read_prompts(
    path: Location, column: str, image_column: str | None = None, limit: int | None = None
) -> Iterator[Prompt]:
    """The first `limit` prompts of a file, in order; blank ones are skipped. Memory does not grow with the file.

    `.txt` has one prompt a line; `.jsonl`, `.csv` and `.parquet` have them in `column`, and the pictures' paths,
    relative to the file's folder, in `image_column`. Raises `UserError` that names the line or row.
    """
    path = local_file(path)
    if not path.is_file():
        raise UserError(f"the prompt file {path} does not exist; set prompts to a .txt, .jsonl, .csv or .parquet file")
    readers = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"the prompt file {path} ends in {path.suffix!r}; supported are {', '.join(readers)}")
    if path.suffix == ".txt" and image_column:
        raise UserError(
            f"the prompt file {path} names no pictures; calibration.source 'images' takes .jsonl, .csv or .parquet"
        )
    columns = [column, image_column] if image_column else [column]
    return islice(_prompts(path, readers[path.suffix](path, columns)), limit)


def check_prompts(
    path: Location, column: str, image_column: str | None = None, limit: int | None = None, different: int = 2
) -> str:
    """Read a prompt file once, so that its mistakes are told before any work is done; gives a hash of its content.

    Raises `UserError` as `read_prompts` does, for fewer than `different` prompts that differ (2 where some are held out, 1
    where none are), and for pictures that do not exist.
    Pictures enter the hash by path, size and time of change.
    """
    count, texts, pictures = 0, set(), []
    for prompt in read_prompts(path, column, image_column, limit):
        count += 1
        if len(texts) < 2:
            texts.add(prompt.text)
        if prompt.image is not None:
            pictures.append(_identity(prompt.image))
            if pictures[-1] is None:
                raise UserError(f"{path}: the picture {prompt.image} of prompt {count} does not exist")
    if not count:
        raise UserError(f"the prompt file {path} holds no prompts")
    if len(texts) < different:
        raise UserError(
            f"the prompt file {path} gives only 1 different prompt{f' in its first {limit}' if limit else ''}; at least 2 "
            "are needed, since some are held out"
        )
    path = local_file(path)
    return key_of(file_sha256(path), path.suffix, pictures)


def _identity(picture: str) -> tuple[Any, ...] | None:
    """What tells a picture from another; None where there is none."""
    if store := store_of(picture):
        answer = store.head()
        return answer and (store.url, answer["ContentLength"], answer["ETag"])
    try:
        stat = Path(picture).stat()
    except OSError:
        return None
    return picture, stat.st_size, stat.st_mtime_ns


def _prompts(path: Path, rows: Iterable[tuple[str, list[Any]]]) -> Iterator[Prompt]:
    """`rows` are (what to call the row in an error, its values)."""
    number = 0
    try:
        for where, (text, *image) in rows:
            for value, what in ((text, "prompt"), *((i, "picture's path") for i in image)):
                if not isinstance(value, str):
                    raise UserError(f"{path}, {where}: the {what} is {value!r}, which is no text")
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
                f"{where} has no column {name!r}; it has {', '.join(present)}; set calibration.prompt_column or image_column"
            )
