"""The exception for mistakes that a user can fix, "did you mean", and names that are safe to print."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one `printable` line that names the file or key and says what to do.

    The CLI prints just that.
    """

    status = 2  # of the process that ends with it

    def __str__(self) -> str:
        return printable(super().__str__())  # names in it may hold anything


class Failure(UserError):
    """A failure that is not the input's fault, such as a stalled disk: the same command may succeed later."""

    status = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: `; did you mean 'optim.lr'?`, or "" if no known word is near.

    Names with the same last part come first; a dotted word is also compared by its last part.
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    known = list(known)
    same = [name for name in known if last(name) == last(word)]
    near = difflib.get_close_matches(word, same, 1, 0.0) or difflib.get_close_matches(word, known, 1)
    near = near or difflib.get_close_matches(last(word), map(last, known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    """`text` on one line and safe for a terminal: control characters as escapes, undecodable bytes as "\ufffd"."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
