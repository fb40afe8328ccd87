"""A module of the user's with the name of one of this program's packages, which Python would import in their place."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ppcl.errors import UserError

NAMES = ("ppcl", "jobs", "serve")
_ROOT = Path(__file__).parent.parent


def check_imports() -> None:
    """Raise `UserError` where this process finds another module under the name of one of our packages."""
    for name in NAMES:
        spec = find_spec(name)
        found = Path(spec.origin) if spec and spec.origin else None
        if found is None or found.parent.parent != _ROOT:
            where = found or "a folder that is no package"
            raise UserError(
                f"Python finds another module {name!r} before ppcl's own: {where}; take its folder off PYTHONPATH"
            )


def check_working_folder(folder: Path) -> None:
    """Raise `UserError` where Ray's workers would import a module of a folder in place of one of our packages.

    Ray puts the folder that its driver was started in first on the path of its workers.
    """
    folder = folder.resolve()
    if folder == _ROOT:
        return
    for name in NAMES:
        for path in (folder / name / "__init__.py", folder / f"{name}.py"):
            if path.exists():
                raise UserError(
                    f"Ray's workers would import {path} in place of ppcl's own package {name!r}; run ppcl from another "
                    "folder, or rename that module"
                )
