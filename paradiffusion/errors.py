"""The one exception for what a user can cause and mend, and what a library's error says."""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a condition on the user's side.

    The message is one sentence that says what was found, what was expected and what to do. Entry points print it
    without a traceback and exit with status 2.

    Attributes:
        told: it stands on the terminal already.
    """

    told: bool = False


def reason_of(error: BaseException) -> str:
    """The first line of what a library's error says; its type, where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
