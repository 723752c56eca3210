"""Mask secrets in texts, and shorten errors that may contain a server's whole page, before they are printed."""

import re

MASK = "***"
_LINE_LENGTH = 200

# User information is before the last @ of a URI's authority. A password may contain a raw / or @, so after a name and a
# colon any text up to the last @ is masked. A path with an @ after a port is masked needlessly.
_USER_INFORMATION = re.compile(r"(?<=://)(?:[^\s/:@'\"<>]*:[^\s'\"<>]*@|[^\s/?#'\"<>]*@)")
_PASSWORD_OPTION = re.compile(
    r"(?<=[?&])([\w.-]*(?:password|passwd|secret|token|key)[\w.-]*=)[^&\s'\"<>]*", re.IGNORECASE
)

# In a client's message, the text after one of these was sent by the server.
_SERVERS_OWN = re.compile(r"Response body|Response text|<!doctype|<html", re.IGNORECASE)


def masked(text: str) -> str:
    """Replace user names, passwords and tokens of URIs in a text by `***`."""
    return _PASSWORD_OPTION.sub(rf"\1{MASK}", _USER_INFORMATION.sub(f"{MASK}@", text))


def has_secret(uri: str) -> bool:
    """Return whether a URI contains a user name, a password or a token."""
    return masked(uri) != uri


def one_line(error: BaseException) -> str:
    """Return an error's type and the start of its message: one line, masked, without a page sent by a server."""
    message, *_ = _SERVERS_OWN.split(str(error)[: 50 * _LINE_LENGTH], maxsplit=1)
    words = " ".join(masked(message).split())
    printable = "".join(letter for letter in words if letter.isprintable()).rstrip(" .:;")
    shown = printable if len(printable) <= _LINE_LENGTH else printable[: _LINE_LENGTH - 1] + "…"
    return f"{type(error).__name__}: {shown}"
