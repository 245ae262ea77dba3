"""Shared by every script: one line for an error, and files that appear whole or not at all."""

import argparse
import contextlib
import errno
import fcntl
import signal
import sys
import time

import pytest
from filelock import FileLock, Timeout

import cli
from cli import DataError, file_lock, number_between, quietly, remove_leftovers, run_as_script, write_atomically


@pytest.fixture
def script(monkeypatch):
    """Runs a function as a script; returns its exit status or last line."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["some/script.py"])

    def run(main):
        with pytest.raises(SystemExit) as exit_:
            run_as_script(main)
        return exit_.value.code

    yield run
    signal.signal(signal.SIGTERM, before)


def fail(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_an_error_of_the_users_is_one_line(script):
    assert script(fail(DataError("a.csv: line 3\n\x1b[2J"))) == r"script.py: error: a.csv: line 3\n\x1b[2J"
    assert script(fail(FileNotFoundError(2, "No such file", "b"))) == "script.py: error: [Errno 2] No such file: 'b'"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_as_script(lambda: 1 / 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_script_ends_with_130(script, capsys, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    assert script(lambda: signal.raise_signal(number)) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("text", ["0", "11", "1.5", "nan", "ten", "9" * 5000, ""])
def test_a_number_that_cannot_be_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 to 10"):
        number_between(int, 1, 10)(text)
    assert number_between(int, 1, 10)("10") == 10 and number_between(float, 0, 1)("1e-3") == 1e-3


def test_a_quiet_script_prints_errors_alone(capsys):
    with quietly():
        print("result")
        print("error", file=sys.stderr)
        assert list(cli.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "error\n")


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "a.json"
    for content in ("first", "second"):
        with write_atomically(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    with contextlib.suppress(KeyboardInterrupt), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_a_link_is_replaced_not_written_through(tmp_path):
    target, path = tmp_path / "precious", tmp_path / "a.txt"
    target.write_text("not ours")
    path.symlink_to(target)
    with write_atomically(path) as temporary:
        temporary.write_text("ours")
    assert (target.read_text(), path.read_text(), path.is_symlink()) == ("not ours", "ours", False)


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("a.pth", ".b-1.partial.pth", ".a-1.partial.json")]
    for path in (*kept, tmp_path / ".a-0123.partial.pth"):
        path.touch()
    remove_leftovers(tmp_path / "a.pth")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("waiting", ["", "another run is here"])
def test_a_lock_that_another_process_holds_is_waited_for(tmp_path, capsys, waiting):
    lock, start = FileLock(tmp_path / ".lock"), time.monotonic()
    with lock, pytest.raises(Timeout), file_lock(tmp_path / ".lock", 0.2, waiting):
        pass
    assert time.monotonic() - start >= 0.2 and capsys.readouterr().out.strip() == waiting
    with file_lock(tmp_path / ".lock", 0.2, waiting):
        assert not capsys.readouterr().out


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE, errno.EIO, None])
def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch, capsys, code):
    def flock(file: int, operation: int) -> None:
        raise OSError(code, "no locks here") if code else NotImplementedError("no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    for timeout in (0, -1):
        with file_lock(tmp_path / ".lock", timeout):
            pass
    error = capsys.readouterr().err
    assert error.count(f"{tmp_path}: no file locks (") == error.count("no locks here") == 1
