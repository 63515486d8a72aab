"""Names in messages."""

from __future__ import annotations

from dino_jax.errors import UserError, printable


def test_a_name_stays_on_one_line_and_out_of_the_terminal():
    assert printable("a\nb\tc\x1b[31m\u2028\udcff") == "a\\nb\\tc\\x1b[31m\\u2028\ufffd"
    assert printable("Müll 図.jpg") == "Müll 図.jpg"


def test_an_error_is_one_line_whatever_it_names():
    error = UserError("a\nb\x1b[31m.jpg: cannot be read")
    assert str(error) == f"{error}" == "a\\nb\\x1b[31m.jpg: cannot be read"
    assert str(UserError(str(error))) == str(error)
