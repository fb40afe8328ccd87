"""ppcl: compress multi-modal diffusion transformers into families of pluggable variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl.replacements import Plan
    from ppcl.result import Result

__version__ = "0.2.0"
__all__ = ["Plan", "Result", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used: `ppcl --version` does without."""
    if name == "Result":
        from ppcl.result import Result

        return Result
    if name == "Plan":
        from ppcl.replacements import Plan

        return Plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
