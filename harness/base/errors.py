"""The error for the user."""

from __future__ import annotations


class UserError(Exception):
    """An argument, a file or a backend cannot be used. The message is one line: what is wrong, and what is valid.

    The base class of every such error: `cli.main` prints the message and exits with 2, the plugin raises
    pytest.UsageError.
    """
