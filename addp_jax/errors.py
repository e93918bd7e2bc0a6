"""The exceptions that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: a wrong field, file or folder.

    The message is one line that names the file or the config field and says
    what to do. `main.py` prints it without a traceback and exits with `status`.
    """

    status = 2  # of the process: starting again does not help


class Unreadable(UserError):
    """One file of many, an image as a rule, cannot be read; where the user asks for it, the others are used without it.

    passing: a mount or a network failed, which may be well again later.
    """

    def __init__(self, message: str, passing: bool = False):
        super().__init__(message)
        self.status = 75 if passing else UserError.status  # 75: what sysexits.h calls a temporary failure
