"""One training at a time in runs/NAME."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from fpnssd.training import distributed
from fpnssd.training.checkpoints import BEST, LAST
from utils import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def lock_run(name: str, resume: bool) -> Iterator[None]:
    """Reserves runs/NAME while the block runs; the processes of torchrun are one training.

    Raises:
        InputError: if another process trains there; without `resume` if the run exists; with `resume` if it does not.
    """
    folder, problem = Path("runs") / name, None
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            try:
                if resume and not (folder / LAST).exists():
                    raise InputError(f"nothing to resume: no checkpoint {str(folder / LAST)!r}")
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(folder / ".lock"))
                if not resume and any((folder / file).exists() for file in (LAST, BEST)):
                    raise InputError(f"{folder} has a run already: --resume continues it, --name NAME starts another")
            except InputError as error:
                problem = str(error)
        problem = distributed.broadcast(problem)
        if problem:
            raise InputError(problem)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks a file. Raises an InputError if another process holds the lock; prints a note if locks are not supported.

    On POSIX systems it is a record lock: it is released however the process ends, is not inherited by DataLoader
    workers, which may outlive the process by seconds, and works across machines on network file systems with locks.
    """
    if fcntl is None:
        try:
            with filelock.FileLock(path, timeout=0):
                yield
        except filelock.Timeout as error:
            raise InputError(_in_use(path, "another process")) from error
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(_in_use(path, _holder(file))) from error
            reason = f"{path.parent} cannot be locked ({error.strerror})"
            print(f"note: {reason}: nothing stops a second training with this name", file=sys.stderr)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200) or "another process"


def _in_use(path: Path, holder: str) -> str:
    return f"{path.parent} is being trained by {holder}: wait for it, stop it, or start another run with --name"
