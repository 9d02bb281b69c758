"""The one exception that a user's mistake raises: the CLI prints its line and exits with status 2."""


class MiniCogViewError(ValueError):
    """A wrong input, file or setting. The message is one line: what was wrong, where, what to do."""
