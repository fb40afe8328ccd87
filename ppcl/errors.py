"""Errors a user can cause: one clear sentence each."""

from __future__ import annotations

import errno

_CANNOT_WRITE = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
}


class UserError(Exception):
    """A mistake in the input: one sentence that says what was wrong, the value seen, and what to do.

    The command line prints it without a traceback and exits with code 2; nothing has been half-written.
    """


def cannot_write(error: BaseException) -> str | None:
    """What the operating system says where an error is, or was caused by, a file that could not be written; else None.

    Libraries wrap it: safetensors in an error of its own, Ray in one that keeps the words only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return f"{error.filename or 'the output'} cannot be written: {_CANNOT_WRITE[error.errno]}"
        for words in (_CANNOT_WRITE[number] for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
            if words in str(error):
                return f"the output cannot be written: {words}"
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
