"""The exceptions that a user of the commands is meant to see, and other people's in a few words."""

import os
import re

_PHRASE = 300  # characters


class UserError(Exception):
    """Bad input, told in one sentence that names the file, tensor or key, what was expected and what was found.

    Commands print it without a traceback and exit with status 2; everything else that escapes is a bug and keeps
    its traceback.
    """


class Interrupted(BaseException):
    """A run that was asked to stop and did so in order; its sentence says where the same command goes on.

    The command ends with status 75, which is sysexits' for a failure that a second try mends. As KeyboardInterrupt it
    is no Exception, since it may come anywhere, also where any failure is tried again.
    """


def phrase(e: BaseException) -> str:
    """What a file system or a bucket said, on one line and without the libraries' notes to themselves."""
    text = str(e)
    if found := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's
        return os.strerror(int(found[1]))
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    text = re.sub(r"<head>.*?</head>|<[^<>]*>", " ", text.split(" [")[0], flags=re.DOTALL)  # a page for a browser
    return " ".join(text.split())[:_PHRASE].rstrip(" .,") or type(e).__name__
