"""What reaches a user as one line instead of a traceback."""


class UserError(Exception):
    """Something only the user can mend, said with what to do. Exit code 2, before any worker starts."""


class Unfinished(Exception):
    """Work is left that running the same command again may finish. Exit code 1."""
