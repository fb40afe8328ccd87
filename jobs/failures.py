"""What made a stage fail, in one line: the exception's class, its sentence and where in this program it was raised."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ppcl

_ROOT = Path(ppcl.__path__[0]).parent
_OURS = re.compile(r"(?:^|/)((?:ppcl|jobs|serve)/[\w/]+\.py)$")
_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in ')
_COLOUR = re.compile(r"\x1b\[\d+m")
# What Python and Ray write between an error and the one that was raised from it, or while it was handled.
_RAISED_FROM = "The above exception was the direct cause of the following exception:"
_RAISED_WHILE_HANDLING = "During handling of the above exception, another exception occurred:"
_LONGEST = 300
# A module of one of this program's packages that is missing: the package is another one.
_SHADOWED = re.compile(r"No module named '(ppcl|jobs|serve)\.")


class WorkerLost(RuntimeError):
    """A worker that died or stopped answering. Its message is complete without a line of code."""


# Kinds of errors that the same work would have again: mistakes in code, and memory that does not suffice.
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
_RECURRING = (
    *_OUT_OF_MEMORY,
    "AssertionError",
    "AttributeError",
    "ImportError",
    "IndexError",
    "KeyError",
    "ModuleNotFoundError",
    "NameError",
    "NotImplementedError",
    "TypeError",
    "UnboundLocalError",
    "ZeroDivisionError",
)


@dataclass(frozen=True)
class _Cause:
    """`frames`: (file, line), the innermost last."""

    kind: str
    sentence: str
    frames: list[tuple[str, int]]


def will_recur(error: BaseException) -> bool:
    """Whether trying again would fail in the same way, after as much work: a mistake in code, or too little memory."""
    chain = list(_chain(error))
    if any(isinstance(wrapped, WorkerLost) for wrapped in chain):
        return False
    return _shadowed(chain) is not None or _cause(error).kind in _RECURRING


def advice(error: BaseException) -> str:
    """What a user can do about a failure that will recur."""
    if _shadowed(list(_chain(error))):
        return "take that module away"
    if _cause(error).kind in _OUT_OF_MEMORY:
        return "use smaller batches, more workers, or devices with more memory"
    return "this is a bug of ppcl, or of a package that it uses"


def describe_failure(error: BaseException) -> str:
    """One line about the innermost cause of an error: `KeyError: 7 (ppcl/search/pareto.py, line 12)`.

    Looks through the errors in which Ray Core, Ray Data and Ray Train wrap what a worker raised.
    """
    chain = list(_chain(error))
    lost = next((wrapped for wrapped in chain if isinstance(wrapped, WorkerLost)), None)
    if lost is not None:
        return str(lost)
    if shadowed := _shadowed(chain):
        return (
            f"the workers find another module {shadowed!r} before ppcl's own; take its folder off their PYTHONPATH "
            "and working directory"
        )
    return _one_line(_cause(error))


def _shadowed(chain: list[BaseException]) -> str | None:
    """The name of one of our packages that another module stands before, as far as errors tell."""
    match = next((match for error in chain if (match := _SHADOWED.search(str(error)))), None)
    return match[1] if match else None


def _cause(error: BaseException) -> _Cause:
    """The innermost error."""
    chain = list(_chain(error))
    # The text of a worker's traceback tells what its pickled exception has lost: its cause and its frames.
    texts = [text for wrapped in chain if (text := _remote_traceback(wrapped))]
    parsed = _parse(texts[-1]) if texts else None
    return parsed or _local(chain[-1])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those inside of it, the innermost last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = _inside(error)


def _inside(error: BaseException) -> BaseException | None:
    workers = getattr(error, "worker_failures", None)  # Ray Train, by rank
    if workers:
        return workers[min(workers)]
    for name in ("controller_failure", "_base_exc", "cause"):  # Ray Train, its worker, Ray Core
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return inner
    return error.__cause__


def _remote_traceback(error: BaseException) -> str | None:
    # Known by its name: Ray must not be imported before it is configured.
    if any(base.__name__ == "RayTaskError" for base in type(error).__mro__):
        return _COLOUR.sub("", str(error))
    text = getattr(error, "_traceback_str", None)  # Ray Train
    return text if isinstance(text, str) else None


def _parse(text: str) -> _Cause | None:
    """The first cause in the text of a traceback; None where it holds none."""
    first = text.split(_RAISED_FROM)[0].split(_RAISED_WHILE_HANDLING)[-1]
    lines = first.splitlines()
    numbers = [number for number, line in enumerate(lines) if _FRAME.match(line)]
    if not numbers:
        return None
    frames = [(match[1], int(match[2])) for line in lines if (match := _FRAME.match(line))]
    message = [line for line in lines[numbers[-1] + 1 :] if line.strip() and not line.startswith(" ")]
    if not message:
        return None
    kind, _, sentence = message[0].partition(": ")
    return _Cause(kind.rpartition(".")[2], sentence, frames)


def _local(error: BaseException) -> _Cause:
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return _Cause(type(error).__name__, lines[0] if lines else "", frames)


def _one_line(cause: _Cause) -> str:
    sentence = cause.sentence if len(cause.sentence) <= _LONGEST else f"{cause.sentence[:_LONGEST]}…"
    message = f"{cause.kind}: {sentence}" if sentence else cause.kind
    where = _where(cause.frames)
    return f"{message} ({where})" if where else message


def _where(frames: list[tuple[str, int]]) -> str | None:
    """The innermost frame of this program's own code, else the innermost of any."""
    for file, line in reversed(frames):
        match = _OURS.search(file)
        if match and (_ROOT / match[1]).is_file():
            return f"{match[1]}, line {line}"
    return f"{frames[-1][0]}, line {frames[-1][1]}" if frames else None
