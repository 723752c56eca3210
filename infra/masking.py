"""What is printed or written of texts that may hold a secret, and of errors that may hold a server's whole page."""

import re

MASK = "***"
_LINE_LENGTH = 200

# User information stands before the last @ of a URI's authority. A password may hold a raw / or @, so that a name and a
# colon are followed by any text to the last @; a path with an @, behind a port, is masked needlessly.
_USER_INFORMATION = re.compile(r"(?<=://)(?:[^\s/:@'\"<>]*:[^\s'\"<>]*@|[^\s/?#'\"<>]*@)")
_PASSWORD_OPTION = re.compile(
    r"(?<=[?&])([\w.-]*(?:password|passwd|secret|token|key)[\w.-]*=)[^&\s'\"<>]*", re.IGNORECASE
)

# What follows one of these in a client's message is what the server sent.
_SERVERS_OWN = re.compile(r"Response body|Response text|<!doctype|<html", re.IGNORECASE)


def masked(text: str) -> str:
    """Return a text in which user names, passwords and tokens of URIs are replaced by `***`."""
    return _PASSWORD_OPTION.sub(rf"\1{MASK}", _USER_INFORMATION.sub(f"{MASK}@", text))


def has_secret(uri: str) -> bool:
    """Whether a URI holds a user name, a password or a token."""
    return masked(uri) != uri


def one_line(error: BaseException) -> str:
    """Return an error's type and the start of its message: one line, masked, without what a server sent as a page."""
    message, *_ = _SERVERS_OWN.split(str(error)[: 50 * _LINE_LENGTH], maxsplit=1)
    words = " ".join(masked(message).split())
    printable = "".join(letter for letter in words if letter.isprintable()).rstrip(" .:;")
    shown = printable if len(printable) <= _LINE_LENGTH else printable[: _LINE_LENGTH - 1] + "…"
    return f"{type(error).__name__}: {shown}"
