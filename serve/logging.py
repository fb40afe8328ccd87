"""Logs as JSON, one object a line. What clients write, prompts and keys above all, is in none of them."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger("ppcl.serve")


class JsonLines(logging.Formatter):
    """A record's message and the fields of its `told`, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(fields | getattr(record, "told", {}))


def log_as_json(file: Path | None = None) -> None:
    """Have this process append its serving log to a file, or write it to standard error, once however often asked."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    # A line is one write at the end of the file, so that several processes can share it.
    handler = logging.StreamHandler(sys.stderr) if file is None else logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def log_request(**fields: Any) -> None:
    log.info("request", extra={"told": {name: value for name, value in fields.items() if value is not None}})


def log_failure(id: str, error: BaseException) -> None:
    """Where an error came from. Not its message: libraries put what they were given into it, a prompt among others."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    log.error("failure", extra={"told": {"id": id, "error": type(error).__name__, "at": frames[-12:]}})


def plain(line: str) -> str:
    """A line of the log as people read it."""
    told = json.loads(line)
    at = datetime.fromisoformat(told.pop("time")).astimezone().strftime("%H:%M:%S")
    if told["event"] == "request":
        generated = f"{told['variant']}{' (degraded)' if told.get('degraded') else ''}" if "variant" in told else None
        parts = [
            at,
            told["status"],
            told["method"],
            told["route"],
            f"{told['seconds']:.3f} s",
            generated,
            told.get("error"),
            told["id"],
        ]
    else:
        parts = [at, told["event"], told.get("error"), *reversed(told.get("at", [])[-3:]), told.get("id")]
    return "  ".join(str(part) for part in parts if part is not None)
