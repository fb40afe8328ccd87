"""Logs as JSON, one object per line. They never contain what clients write, prompts and keys above all."""

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
    """Formats a record's message and its `fields` as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(fields | getattr(record, "fields", {}))


def log_as_json(file: Path | None = None) -> None:
    """Append this process' serving log to a file, or write it to standard error. Repeated calls replace the handler."""
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
    log.info("request", extra={"fields": {name: value for name, value in fields.items() if value is not None}})


def log_failure(id: str, error: BaseException) -> None:
    """Log an error's type and stack. Its message is left out: libraries put their inputs into it, such as a prompt."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    log.error("failure", extra={"fields": {"id": id, "error": type(error).__name__, "at": frames[-12:]}})


def readable(line: str) -> str:
    """Format a line of the log for people."""
    fields = json.loads(line)
    time = datetime.fromisoformat(fields.pop("time")).astimezone().strftime("%H:%M:%S")
    error, id = fields.get("error"), fields.get("id")
    if fields["event"] == "request":
        variant = fields.get("variant")
        if variant is not None and fields.get("degraded"):
            variant = f"{variant} (degraded)"
        seconds = f"{fields['seconds']:.3f} s"
        parts = [time, fields["status"], fields["method"], fields["route"], seconds, variant, error, id]
    else:
        parts = [time, fields["event"], error, *reversed(fields.get("at", [])[-3:]), id]
    return "  ".join(str(part) for part in parts if part is not None)
