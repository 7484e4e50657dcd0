"""The one kind of error that means: you can mend this. Everything else that is raised is a fault of this package or of what it stands on."""


class MoshiTTTError(ValueError):
    """Something given from outside does not hold: an argument, a setting, a file, a checkpoint.

    The message names the field, its value and the cure. The commands print it as one line, and any other exception with its trace.
    """


class MoshiTTTOSError(MoshiTTTError, OSError):
    """As [`MoshiTTTError`], of what the file system or the network refused or does not have."""


class MoshiTTTFileNotFoundError(MoshiTTTOSError, FileNotFoundError):
    """As [`MoshiTTTOSError`], of a file or folder that is not there."""
