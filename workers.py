"""Work spread over processes, where the system has them."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

from cli import DataError

CHUNK_SIZE = 16  # items given to a process at a time


@contextlib.contextmanager
def parallel_map(num_workers: int) -> Iterator[Callable]:
    """Yield a function like `map` that works in `num_workers` processes; results keep the items' order.

    After an error or Ctrl-C in the block no further item is begun. Where no process can be started, as
    without /dev/shm, it warns and yields `map` itself. Raises DataError if a process was killed.
    """
    pool = _start_workers(num_workers) if num_workers > 1 else None
    try:
        yield functools.partial(pool.map, chunksize=CHUNK_SIZE) if pool else map
    except BrokenExecutor as error:
        raise DataError("a worker process was killed, perhaps for its memory: lower --num-workers") from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _start_workers(num_workers: int) -> ProcessPoolExecutor | None:
    try:
        pool = ProcessPoolExecutor(num_workers, initializer=_prepare_worker)
        pool.submit(int).result()  # starts them
    except (OSError, NotImplementedError, BrokenExecutor) as error:
        print(f"warning: no worker processes ({error}); everything is done in one", file=sys.stderr)
        return None
    return pool


def _prepare_worker() -> None:
    """Leave Ctrl-C and SIGTERM, which may reach every process, to the parent; end when it has ended, even if killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:  # a worker left behind would wait for ever, with the parent's file locks
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
