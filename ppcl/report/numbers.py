"""How numbers are written, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "–"


def count(value: int | None) -> str:
    """Parameters: `4.81 M`, `20.4 B`."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return str(value)


def significant(value: float | None, digits: int = 3) -> str:
    """So many significant digits, trailing zeros kept: `0.120`, `20.4`, `1234`; scientific where it is tiny."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    text = f"{value:#.{digits}g}"
    return f"{value:.0f}" if "e" in text else text.rstrip(".")


def percent(value: float | None, places: int = 1, scale: float = 100) -> str:
    """Per cent, with a thin no-break space; `scale` is 100 for a share and 1 for what is in per cent already."""
    return MISSING if value is None else f"{_signed(scale * value, places)}\u202f%"


def correlation(value: float | None) -> str:
    """A correlation from -1 to 1: `0.93`, with a true minus sign."""
    return MISSING if value is None else _signed(value, 2)


def between(low: float | None, high: float | None, places: int = 1, scale: float = 100) -> str:
    """An interval of confidence in per cent, `70.2 to 78.0`; empty where there is none. `scale` as for `percent`."""
    return "" if low is None or high is None else f"{_signed(scale * low, places)} to {_signed(scale * high, places)}"


def mean_between(values: Sequence[float]) -> str:
    """A mean with both ends of its interval: `0.120 (0.101 to 0.139)`; the mean alone where they are the same."""
    mean, low, high = values
    return (
        significant(mean)
        if low == high
        else f"{significant(mean)} ({significant(max(low, 0.0))} to {significant(high)})"
    )


def seconds(value: float | None) -> str:
    """A duration: `38 ms`, `2.63 s`, `4 min 10 s`, `3 h 05 min`."""
    if value is None:
        return MISSING
    if value < 1:
        return f"{significant(1000 * value)} ms"
    if value < 60:
        return f"{significant(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _signed(value: float, places: int) -> str:
    """With a true minus sign, and no minus before a zero."""
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "\u2212")
