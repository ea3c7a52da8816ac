"""Suggestions for a misspelt word."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 60  #: characters of a word that is compared: the time grows with the square


def did_you_mean(word: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean 'promises'?" if a valid word is close to the word, otherwise "". cutoff: 1 is equal."""
    close = get_close_matches(word, list(valid), n=1, cutoff=cutoff) if len(word) <= LONGEST else []
    return f"; did you mean {close[0]!r}?" if close else ""
