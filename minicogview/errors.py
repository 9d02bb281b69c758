"""The one exception that a user's mistake raises. The command line prints its message and exits with status 2."""


class MiniCogViewError(ValueError):
    """A wrong input, file or setting. The message is one line: what was wrong, where, and what to do."""
