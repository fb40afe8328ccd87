"""The one exception for what a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input: one sentence that says what was wrong, the value seen, and what to do.

    The command line prints it without a traceback and exits with code 2; nothing has been half-written.
    """
