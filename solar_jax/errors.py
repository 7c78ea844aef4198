"""The one exception that a user of the commands is meant to see."""


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
