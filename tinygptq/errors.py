"""The one error a user can cause, and the helpers that keep its message to a single line."""

from __future__ import annotations


class TinyGPTQError(ValueError):
    """Something the user gave cannot be used: one line that names the thing, what was found and what to do.

    The command line prints the message on stderr and exits with code 2; a traceback is never shown for it.
    """
