"""Exceptions that are meant for users of the commands, and short phrases for those of libraries."""

import os
import re

_PHRASE = 300  # characters


class UserError(Exception):
    """Bad input, reported in one sentence that names the file, tensor or key, what was expected and what was found.

    Commands print it without a traceback and exit with status 2; any other exception that escapes is a bug and keeps
    its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """Gives IPython what a cell shows: the sentence, as a command does."""
        return [f"error: {self}"]


class Interrupted(BaseException):
    """Raised when a run stops cleanly on request; its message says where the same command resumes.

    The command exits with status 75, sysexits' code for a failure that a retry fixes. Like KeyboardInterrupt it is not
    an Exception, since it may occur anywhere, including where any failure is retried.
    """


def phrase(e: BaseException) -> str:
    """Returns the error message of a file system or a bucket on one line, without the libraries' internal notes."""
    text = str(e)
    if found := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's
        return os.strerror(int(found[1]))
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    text = re.sub(r"<head>.*?</head>|<[^<>]*>", " ", text.split(" [")[0], flags=re.DOTALL)  # an HTML error page
    return " ".join(text.split())[:_PHRASE].rstrip(" .,") or type(e).__name__
