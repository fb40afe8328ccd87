"""What several commands use: the console, the LoRA of their options, and how a command that was stopped ends."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from ppcl.errors import UserError

# Where there is no terminal to ask, rich takes 80 columns, into which the table of variants does not go.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


class CommandStopped(Exception):
    """Ctrl-C or SIGTERM, under a name that typer does not answer itself, and with what it means."""

    def __init__(self, sentence: str, exit_code: int = 130):
        super().__init__(sentence)
        self.exit_code = exit_code


def lora_choice(lora: str | None, scale: float, transfer: bool) -> tuple[str, float] | None:
    """The LoRA and the strength that `--lora` and `--lora-scale` give. Raises `UserError` for a transfer of none."""
    if transfer and lora is None:
        raise UserError("--lora-transfer has no LoRA to transfer; give one with --lora, or leave --lora-transfer out")
    return None if lora is None else (lora, scale)
