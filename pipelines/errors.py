"""What reaches a user as one line instead of a traceback."""

import re

from pipelines.secrets import redacted


def shown(text: object) -> str:
    """For a terminal or a table: what is said in somebody's file names or URLs does nothing there, and tells no secret.

    Control characters are escaped, and so is what turns the direction of writing.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", lambda c: ascii(c[0])[1:-1], redacted(str(text)))


class _Said(Exception):
    def __init__(self, text: object) -> None:
        super().__init__(shown(text))


class UserError(_Said):
    """Something only the user can mend, said with what to do. Exit code 2, before any worker starts."""


class Unfinished(_Said):
    """Work is left that running the same command again may finish. Exit code 1."""
