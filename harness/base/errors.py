"""The error that a command line ends with."""

from __future__ import annotations


class UserError(Exception):
    """The command cannot be carried out as given; the message is the one line that says why. Exit code 2."""
