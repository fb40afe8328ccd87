"""Logs as JSON, one object a line. What clients write, prompts and keys above all, is in none of them."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger("ppcl.serve")


class JsonLines(logging.Formatter):
    """A record's message and the fields of its `told`, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(fields | getattr(record, "told", {}))


def log_as_json(stream: TextIO | None = None) -> None:
    """Have this process write its serving log to a stream, standard error unless another is given, once however often asked."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def tell_request(**fields: Any) -> None:
    log.info("request", extra={"told": {name: value for name, value in fields.items() if value is not None}})


def tell_failure(id: str, error: BaseException) -> None:
    """Where an error came from. Not its message: libraries put what they were given into it, a prompt among others."""
    frames = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error("failure", extra={"told": {"id": id, "error": type(error).__name__, "at": frames[-12:]}})
