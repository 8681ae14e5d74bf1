"""The one exception for what a user did."""


class InputError(ValueError):
    """Something the user gave cannot be used: a recipe, a file, a command line.

    The message names the file or key, what is wrong with it, and what to do. The commands print it without a stack
    trace and exit with code 2. Most are met by all processes alike, and the main one speaks; `process` is set where one
    process alone met it.
    """

    process: int | None = None
