"""Shared by every script: the command line, errors, progress bars, atomic writing of files, and file locks."""

import argparse
import contextlib
import contextvars
import errno
import functools
import io
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
from tqdm.auto import tqdm


class DataError(ValueError):
    """An input of the user cannot be used. The message, one line, names the file, the fault and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with line breaks and control characters, which could command a terminal, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_as_script(main: Callable[[], None]) -> None:
    """Run `main`; end with one clear line and exit status 1 on a user's error, 130 on Ctrl-C or SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" in place of "″"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it; it ends a run as Ctrl-C does
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (DataError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def number_between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """An argparse type: an integer or a number from `low` to `high`."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")

    return number


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, but those that mean "not given", and the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class ScriptParser(argparse.ArgumentParser):
    """The options of a script. --help shows its docstring, whose paragraphs are a title, examples, and notes."""

    def __init__(self, docstring: str, **options: Any) -> None:
        title, examples, *notes = docstring.strip().split("\n\n")
        epilog = "\n\n".join([f"examples:\n{examples}", *notes])
        super().__init__(description=title, epilog=epilog, formatter_class=_Help, allow_abbrev=False, **options)

    def add_quiet(self) -> None:
        self.add_argument("--quiet", action="store_true", help="print errors only, and show no progress")

    def option(self, name: str) -> str:
        """The option that sets this attribute, as the user writes it."""
        return next(action.option_strings[-1] for action in self._actions if action.dest == name)


_quiet = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Inside the block, if `quiet`, standard output and progress bars are suppressed; errors are still shown."""
    if not quiet:
        yield
        return
    before = _quiet.set(True)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        _quiet.reset(before)


class _Lines(io.TextIOBase):
    """Writes each update of a progress bar as a line."""

    def write(self, text: str) -> int:
        if shown := text.strip():
            sys.stderr.write(f"{shown}\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A bar with rate and time left, gone at the end; without a terminal, a line every ten seconds."""
    if _quiet.get():
        options["disable"] = True
    if not sys.stderr.isatty():
        layout = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
        options |= {"file": _Lines(), "delay": 10, "mininterval": 10, "maxinterval": 30, "bar_format": layout}
    return tqdm(iterable, leave=False, **options)


def partial_path(path: Path) -> Path:
    """A unique name beside `path`, for a file that is renamed to `path` once it is whole."""
    return path.with_name(f".{path.stem}-{uuid.uuid4().hex}.partial{path.suffix}")


def remove_leftovers(path: Path) -> None:
    """Delete the partial files that killed processes left beside `path`, whose name may contain wildcards.

    No process may be writing `path` meanwhile.
    """
    for leftover in path.parent.glob(f".{path.stem}-*.partial{path.suffix}"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block succeeds, the file written there becomes `path`.

    Whatever happens inside, and whenever the process dies, `path` holds either its old content or
    the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_foreign_file(path: Path, *marks: str, head_bytes: int = 1024) -> None:
    """Raise DataError if `path` exists and the calling script did not write it: a mark is not in its first bytes."""
    if path.exists():
        with open(path, "rb") as file:
            head = file.read(head_bytes)
        if not all(mark.encode() in head for mark in marks):
            raise DataError(f"{path}: exists, and this script did not write it; move it away, or write elsewhere")


# Errors of file systems without locks, as some NFS, FUSE and cluster mounts are.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE, errno.EIO, errno.ENOSYS}


@contextlib.contextmanager
def file_lock(path: Path, timeout: float, waiting: str = "") -> Iterator[None]:
    """Hold the lock file `path`, waiting at most `timeout` seconds for it (-1: without limit).

    Prints `waiting` if it has to wait. Raises filelock.Timeout if another process still holds the lock. Where the
    file system has no locks, it warns and goes on without.
    """
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0 if waiting else timeout)
        except filelock.Timeout:
            if not waiting:
                raise
            print(waiting, flush=True)
            lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:  # filelock.Timeout is an OSError, too, without errno
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _warn_of_no_locks(path.parent, str(error))
    try:
        yield
    finally:
        lock.release()


@functools.cache  # one warning per directory
def _warn_of_no_locks(directory: Path, reason: str) -> None:
    print(f"warning: {directory}: no file locks ({reason}); start no second run there meanwhile", file=sys.stderr)
