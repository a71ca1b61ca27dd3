"""Errors that a user can mend, and how a script ends on one."""

import functools
import sys


class InputError(Exception):
    """A file, folder or option that cannot be used; the message is one sentence that says what to do."""


def script(main):
    """Wraps a script's `main(argv=None) -> int`: an InputError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapped
