"""Errors that a user can mend, and how a script ends on one."""

import functools
import math
import sys


class InputError(Exception):
    """A file, folder or option that cannot be used; the message is one sentence that says what to do."""


def script(main):
    """Wraps a script's `main(argv=None) -> int`: an InputError becomes one line on stderr and exit code 2, Ctrl-C 130."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return wrapped


def number(kind, low, high=math.inf):
    """A type for argparse's add_argument: an int or a float (kind) from low to high, else InputError."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            limit = "" if high == math.inf else f" to {high:g}"
            name = "whole number" if kind is int else "number"
            raise InputError(f"{text} is not possible for this option; give a {name} from {low:g}{limit}")
        return value

    return parse
