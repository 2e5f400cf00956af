"""What must not be told: passwords and signatures in addresses, and what the environment keeps secret.

A configuration that holds one is refused before anything is written (pipelines/config.py); what is said of anything
goes through `redacted`, or through `pipelines.errors.shown`, which calls it.
"""

import os
import re
from urllib.parse import unquote, urlsplit

NAME = re.compile(r"(?i)secret|passw|passphrase|_pwd|_auth$|token|credential|key(_id)?$|(access|api|private).?key")
SHORTEST = 8  # letters of a secret: a shorter value would be found in innocent words
ADDRESS = re.compile(r"\w[\w+.-]*://[^\s'\"<>]+")
ASKED = re.compile(r"(?i)(passw|pwd|token|secret|credential|api.?key|signature)\w*=")


def redacted(text: str) -> str:
    """Without the user and the query of addresses, where signatures stand, and without the environment's secrets."""
    said = re.sub(r"(?<=://)[^/\s?'\"]*@", "", text)
    said = re.sub(r"(://[^\s?'\"]*\?)[^\s=?'\"]+=[^\s'\",]*[^\s'\",:]", r"\1...", said)
    for value in _of_environment():
        said = said.replace(value, "...")
    return said


def tells_secret(text: str) -> bool:
    """An address with a user, as some take a token for a name, or with a password by whatever name behind ? or #."""
    if "://" not in text or not any(mark in text for mark in "@?#"):  # most of ten million links
        return False
    return any(_address_tells(found) for found in ADDRESS.findall(text))


def _address_tells(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:  # no address at all
        return "@" in address
    return "@" in parts.netloc or bool(ASKED.search(unquote(f"{parts.query}&{parts.fragment}")))


def environment_without() -> dict[str, str]:
    """For a process that looks at strangers' bytes."""
    return {name: value for name, value in os.environ.items() if not NAME.search(name)}


def _of_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)
