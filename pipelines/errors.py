"""What reaches a user as one line instead of a traceback."""

import re


class UserError(Exception):
    """Something only the user can mend, said with what to do. Exit code 2, before any worker starts."""


class Unfinished(Exception):
    """Work is left that running the same command again may finish. Exit code 1."""


def shown(text: object) -> str:
    """For a terminal or a table: what is said in somebody's file names or URLs does nothing there, and tells no secret.

    Control characters are escaped; of a URL its user and its query, which is what a signature stands in, are left out.
    """
    said = re.sub(r"(?<=://)[^/\s?'\"]*@", "", str(text))
    said = re.sub(r"(://[^\s?'\"]*\?)[^\s=?'\"]+=[^\s'\",]*[^\s'\",:]", r"\1...", said)
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", lambda c: ascii(c[0])[1:-1], said)
