"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake in the input that the user can mend.

    The message is one line naming the file or setting, the field, what was found and what was expected. The
    commands print it without a traceback and exit with status 2.
    """
