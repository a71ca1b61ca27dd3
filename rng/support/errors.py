"""Errors that a user can mend, an option parser that raises them, files written whole or not at all."""

import argparse
import functools
import io
import math
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """A file, folder or option that cannot be used; the message is one sentence that says what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError; its help keeps the lines of the script's docstring."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; see --help")


def script(main):
    """Wraps a script's `main(argv=None) -> int`: an InputError becomes one line on stderr and exit code 2.

    Ctrl-C gives 130, an output pipe that its reader closed 141. What the output's encoding lacks is escaped.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
            print("stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            return 141
        except OSError as error:  # a name that is too long, a disk that is gone
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapped


def number(kind, low, high=math.inf):
    """A type for add_argument: an int or a float (kind) from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            limit = "" if high == math.inf else f" to {high:g}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} is not possible, give a {name} from {low:g}{limit}")
        return value

    return parse


@contextmanager
def reading(sentence):
    """Whatever goes wrong in its block becomes an InputError: a damaged file fails in many ways."""
    try:
        yield
    except Exception as error:
        raise InputError(sentence) from error


@contextmanager
def writing(path, advice="name another"):
    """An OSError in its block becomes an InputError that says why `path` cannot be written."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write {path}: {reason}; {advice}") from error


def make_folder(folder):
    """Creates a folder and its parents where they are missing."""
    with writing(f"the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path, keep=True):
    """Yields the name of a file to write, which then replaces `path`, or what that links to, in one step.

    After an error, or without keep, it is removed and `path` stays as it was. The name is short, since that
    of `path` may be as long as names can be, and no other process has it. A replaced file's mode stays.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{os.urandom(6).hex()}.tmp")
    try:
        yield temporary
        if keep:
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file, whole or not at all; InputError if it cannot be written."""
    with writing(path, "name a file in a folder that exists"), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def append_line(path, text):
    """Adds a line to a text file. On a full disk (InputError) part of it may remain, without a line end."""
    with writing(path, "make space, the same command goes on"):
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(text + "\n")
