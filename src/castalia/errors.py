"""Errors a user can cause: one clear sentence that says what, where, and how to mend it.

Every verb catches `UserError`, prints its sentence on standard error and exits with its
code (docs/contracts.md, section 2). Anything else that is raised is our own defect and
keeps its traceback.
"""


class UserError(Exception):
    """Bad input or settings. The message is one sentence: what, where, the remedy."""

    exit_code = 2


class CheckFailed(UserError):
    """A check that the user asked for did not pass (exit code 4)."""

    exit_code = 4
