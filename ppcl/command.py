"""The console command `ppcl`. It says what to install where the command line's own dependencies are missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from ppcl.errors import UserError
from ppcl.own_packages import check_imports

_NEEDED = ("typer", "rich", "ray", "jinja2", "matplotlib", "psutil")


def main() -> None:
    """Run the command line; without the extra `jobs`, end with one sentence and exit code 2."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(_refuse(f"the command line needs {', '.join(missing)}; install ppcl[jobs], or ppcl[all] to serve too"))
    try:
        check_imports()
    except UserError as error:
        sys.exit(_refuse(str(error)))
    from jobs.cli.main import main as run  # only now: typer and rich come with the extra `jobs`

    run()


def _refuse(sentence: str) -> int:
    print(f"ppcl: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
