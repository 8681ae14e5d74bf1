"""The three exceptions that end a command in a message instead of a stack trace."""


class InputError(ValueError):
    """Something the user gave cannot be used: a recipe, a file, a command line.

    The message names the file or key, what is wrong with it, and what to do. The commands print it without a stack
    trace and exit with code 2. Most are met by all processes alike, and the main one speaks; `process` is set where one
    process alone met it.
    """

    process: int | None = None


class RunFailed(Exception):
    """A run cannot go on, for no fault of its recipe: the disk or the memory is full, or its numbers are not finite.

    The message, of one or two lines, says what happened and what to change; the commands add what is safe and how to
    resume, and exit with code 3.
    """


class Interrupted(BaseException):
    """The run stopped early and can be resumed; the message says why. The commands exit with code 75.

    Not an `Exception`, so that no `except Exception` on its way keeps it.
    """
