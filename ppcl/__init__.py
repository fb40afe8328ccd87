"""ppcl: compress multi-modal diffusion transformers into families of pluggable variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl.result import Result

__version__ = "0.2.0"
__all__ = ["Result", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Result` when it is first used: it needs torch, which `ppcl --version` does not."""
    if name == "Result":
        from ppcl.result import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
