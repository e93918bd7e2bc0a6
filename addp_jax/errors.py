"""The exceptions that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: a wrong field, file or folder.

    The message is one line that names the file or the config field and says
    what to do. `main.py` prints it without a traceback and exits with `status`.

    passing: a mount, a network, a bucket or a full disk has failed, which may be well again later.
    """

    def __init__(self, message: str = "", passing: bool = False):
        super().__init__(message)
        self.passing = passing

    @property
    def status(self) -> int:
        """Of the process: 2 where starting again does not help, 75 where it may (a temporary failure in sysexits.h)."""
        return 75 if self.passing else 2


class Unreadable(UserError):
    """One file of many, an image as a rule, cannot be read; where the user asks for it, the others are used without it."""
