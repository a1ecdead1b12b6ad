"""Errors whose message is for the person at the keyboard: one sentence, with the fix, shown without a traceback."""


class UserError(Exception):
    """Something outside kinema's code is not as it must be: a missing file, package or device, a value out of range."""


class UsageError(UserError):
    """A command line that cannot be understood."""


class ElsewhereError(UserError):
    """Another process of the job ended with an error and says so; this one has nothing to add."""
