"""Files and folders that are made whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

from rng.errors import InputError


def make_folder(folder):
    """Creates a folder and its parents where they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror.lower()}; name another") from error


@contextmanager
def replacing(path, keep=True):
    """Yields the name of a file to write, which then takes the place of `path` (of what it links to) in one step.

    After an error, or without keep, it is removed and `path` stays as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        if keep:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file, whole or not at all; InputError if it cannot be written."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        reason = error.strerror.lower()
        raise InputError(f"cannot write {path}: {reason}; name a file in a folder that exists") from error


def append_line(path, text):
    """Adds a line to a text file; InputError if the disk is full. What a failure leaves of it has no line end."""
    try:
        with open(path, "a") as file:
            file.write(text + "\n")
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror.lower()}); make space, the same command goes on") from error
