"""Work spread over processes: it ends with its parent, and goes on without processes where there are none."""

import os
import signal
import subprocess
import sys
import time

import pytest
from common import ROOT

from cli import DataError
from workers import parallel_map


def square(number: int) -> int:
    return number**2


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_keep_their_order(num_workers):
    with parallel_map(num_workers) as map_numbers:
        assert list(map_numbers(square, range(100))) == [number**2 for number in range(100)]


def test_without_shared_memory_one_process_does_it_all(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("_multiprocessing.SemLock", fail)
    with parallel_map(2) as map_numbers:
        assert map_numbers is map
    error = capsys.readouterr().err
    assert error.startswith("warning: no worker processes") and "Function not implemented" in error


def test_a_killed_worker_is_named():
    with pytest.raises(DataError, match="a worker process was killed"), parallel_map(2) as map_numbers:
        list(map_numbers(die, range(10)))


WORK = """
import time
from cli import run_as_script
from workers import parallel_map

def work():
    with parallel_map(2) as map_numbers:
        for _ in map_numbers(time.sleep, [0.01] * 10_000):
            print("working", flush=True)

run_as_script(work)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whole_group", [True, False])
def test_workers_end_with_their_parent(number, whole_group):
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    process.stdout.readline()
    started = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    error = process.communicate(timeout=30)[1]  # until the workers, too, have closed their output
    assert time.monotonic() - started < 10
    if number != signal.SIGKILL:
        assert (process.returncode, error) == (130, "interrupted\n")
