"""Suites: files of test prompts as benchmarks have them, JSON lines with `prompt`, and with whatever scorers need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ppcl.calibration.prompts import half_character, read_prompts, unreadable_json
from ppcl.config.checks import PROMPTS_SUITE
from ppcl.config.location import LocationLike
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.evaluation.prompt_checker import TestPrompt, load_checker, named_prompts
from ppcl.storage.mirror import local_file

PROMPT, ID, CATEGORY = "prompt", "id", "category"
# As some benchmarks call them.
_ALSO = {ID: "prompt_id", CATEGORY: "tag"}


def configured_prompts(config: Config) -> list[TestPrompt]:
    """The prompts of `evaluation.prompts` and of `evaluation.suites`. Raises `UserError`.

    Lines of JSON keep their columns and their category, unless a checker knows the categories.
    """
    settings, column = config.evaluation, config.calibration.prompt_column
    prompts: list[TestPrompt] = []
    if settings.prompts is not None:
        if settings.checker is None and settings.prompts.text.endswith(".jsonl"):
            prompts = read_suite(settings.prompts, PROMPTS_SUITE, settings.max_prompts, column)
        else:
            texts = [prompt.text for prompt in read_prompts(settings.prompts, column, None, settings.max_prompts)]
            checker = load_checker(settings.checker) if settings.checker else None
            prompts = named_prompts(checker, texts) if checker else [TestPrompt(text) for text in texts]
    for name, location in settings.suites.items():
        prompts += read_suite(location, name, settings.max_prompts)
    return prompts


def read_suite(location: LocationLike, suite: str, limit: int | None = None, column: str = PROMPT) -> list[TestPrompt]:
    """The first `limit` prompts of a suite, in order. Raises `UserError` that names the line.

    Every line has a text in `column`; `id` (or `prompt_id`), where lines have one, differs from line to line;
    `category` (or `tag`) is what scores are grouped by. All columns go with the prompt to the scorers; `id` is its
    number where its line has none.
    """
    prompts: list[TestPrompt] = []
    seen: set[str] = set()
    for number, row in json_lines(location, f"the suite {suite!r}"):
        if limit is not None and len(prompts) == limit:
            break
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{location}, line {number} has no text under {column!r}; give every line one")
        if half := half_character(text):
            raise UserError(f"{location}, line {number}: the text has half a character ({half}); write it whole")
        name = str(_either(row, ID) if _either(row, ID) is not None else len(prompts))
        if name in seen:
            raise UserError(f"{location}, line {number} has the id {name!r} of another line; give each its own")
        seen.add(name)
        category = _either(row, CATEGORY)
        prompts.append(TestPrompt(text.strip(), None if category is None else str(category), suite, row | {ID: name}))
    if not prompts:
        raise UserError(f"the suite {location} holds no prompts")
    if len({prompt.category is None for prompt in prompts}) > 1:
        raise UserError(f"the suite {location} has lines with a category and lines without; give all one, or none")
    return prompts


def json_lines(location: LocationLike, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with the numbers of their lines. Raises `UserError`."""
    path = local_file(location)
    if not path.is_file():
        raise UserError(f"{what}: the file {location} does not exist; give one of JSON lines")
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{location}, line {number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} {unreadable_json(error)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write one a line")
    return row


def _either(row: dict[str, Any], key: str) -> Any:
    return row.get(key, row.get(_ALSO[key]))
