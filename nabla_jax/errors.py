"""The one exception a user is meant to read."""

import re

# Control characters and line ends, however Unicode writes them: a file's name may hold what steers a terminal.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """A mistake in the input that the user can mend.

    The message is one line naming the file or setting, the field, what was found and what was expected. The
    commands print it without a traceback and exit with status 2. Line ends in it become spaces, other control
    characters are written as escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_CONTROL.sub(_plain, str(message)))


def _plain(control: re.Match[str]) -> str:
    return " " if control[0] in "\n\r\t" else ascii(control[0])[1:-1]
