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


class Busy(UserError):
    """Another process is at this work; on a cluster it may be one that is about to end."""


def reason_of(error: BaseException) -> str:
    """The first line of what a library's error says; its type, where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
