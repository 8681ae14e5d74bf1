"""Exceptions that end a command with a message instead of a stack trace."""


class InputError(ValueError):
    """Something the user gave cannot be used: a recipe, a file, a command line.

    The message names the file or key, what is wrong with it, and what to do. The commands print it and exit with code
    2. Most are raised on all processes, and the main one prints; `process` is set if a single process raised it.
    """

    process: int | None = None


class RunFailed(Exception):
    """A run cannot continue though its input is valid: disk or memory is full, or numbers are not finite.

    The message, of one or two lines, says what happened and what to change; the commands add what is saved and how to
    resume, and exit with code 3.
    """


class Interrupted(BaseException):
    """The run stopped early and can be resumed; the message says why. The commands exit with code 75.

    Not an `Exception`, so that no `except Exception` catches it.
    """

    alone = False
    """Whether this process of several stops by itself, while others are within a step: they cannot save together."""
