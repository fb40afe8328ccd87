"""What several commands use: the console, and how a command that was stopped ends."""

from __future__ import annotations

import os
import sys

from rich.console import Console

# Where there is no terminal to ask, rich takes 80 columns, into which the table of variants does not go.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


class CommandStopped(Exception):
    """Ctrl-C or SIGTERM, under a name that typer does not answer itself, and with what it means."""

    def __init__(self, sentence: str, exit_code: int = 130):
        super().__init__(sentence)
        self.exit_code = exit_code
