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
    """A sentence about the file that could not be written, where that is the error or its cause; else None.

    Libraries wrap the operating system's error: safetensors in its own type, Ray in one that keeps only the words.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _CANNOT_WRITE:
            return f"{cause.filename or 'the output'} cannot be written: {_CANNOT_WRITE[cause.errno]}"
        for words in (_CANNOT_WRITE[number] for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
            if words in str(cause):
                return f"the output cannot be written: {words}"
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
    return None
