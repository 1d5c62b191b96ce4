"""Faults for the tests, without root: a full disk, short writes, renames that fail, a broken pipe.

A fault of the disk ends when its `with` does. Files written by Python fail in `write`, `fsync` or
`close`; what TensorFlow's C++ writes is limited by the size that the system allows a file of this
process.
"""

import contextlib
import errno
import io
import os
import resource
import signal


@contextlib.contextmanager
def no_file_beyond(size):
    """Files of this process cannot grow beyond `size` bytes: a write is cut short, the next fails.

    The system itself refuses, whoever writes: Python, TensorFlow's C++ or HDF5.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def failing(owner, name, number=errno.ENOSPC, matching="", times=None):
    """The function `name` of a module or class fails with this errno.

    Args:
      owner: the module or class, such as os.
      name: of the function.
      number: of the error.
      matching: only calls with an argument whose text holds this fail.
      times: how many calls fail; by default all.

    Yields:
      A list of the arguments of the calls that failed.
    """
    function, failed = getattr(owner, name), []

    def fail(*args, **kwargs):
        if any(matching in str(a) for a in args) and (times is None or len(failed) < times):
            failed.append(args)
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    setattr(owner, name, fail)
    try:
        yield failed
    finally:
        setattr(owner, name, function)


def full_disk(**how):
    """What Python has written is refused when it is handed to the disk (os.fsync)."""
    return failing(os, "fsync", errno.ENOSPC, **how)


def failing_renames(matching="", **how):
    """os.replace fails, for paths that hold the text `matching`."""
    return failing(os, "replace", errno.EIO, matching=matching, **how)


class BrokenPipe(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def flush(self):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
