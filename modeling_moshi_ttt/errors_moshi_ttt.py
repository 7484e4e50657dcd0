"""The one kind of error that means: you can mend this. All else that is raised is a fault of this package or of what it stands on."""

from collections.abc import Iterator
from contextlib import contextmanager


class MoshiTTTError(ValueError):
    """Something given from outside does not hold: an argument, a setting, a file, a checkpoint.

    The message names the field, its value and the cure. The commands print it as one line, and any other exception with its trace.
    """


class MoshiTTTOSError(MoshiTTTError, OSError):
    """As [`MoshiTTTError`], of what the file system or the network refused or does not have."""


class MoshiTTTFileNotFoundError(MoshiTTTOSError, FileNotFoundError):
    """As [`MoshiTTTOSError`], of a file or folder that is not there."""


@contextmanager
def os_errors_as_ours() -> Iterator[None]:
    """Around loading by transformers, which says with an OSError of its own making, without a number of the system's, that a file is missing
    or is no JSON: the same as [`MoshiTTTOSError`], in one line.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, MoshiTTTError) or error.errno is not None:
            raise
        raise MoshiTTTOSError(" ".join(str(error).split())) from error
