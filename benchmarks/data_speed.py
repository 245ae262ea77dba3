"""Measure the reading of stars: stars a second and memory, when files are decoded and when the cache is read.

    python benchmarks/data_speed.py                      2,000 simulated stars, a minute or two
    python benchmarks/data_speed.py --per-class 4000     20,000 stars: 7 GB of disk for a while

The baseline reads a star's files anew whenever it is asked for, in one process, with astropy and Pillow. Both read
the same simulated files, which the system's file cache holds: the figures are the processor's, not the disk's.
"""

import argparse
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from astropy.io import fits
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import cache
import cli
from catalog import Star, read_catalog
from simulate_sdss_data import simulate
from star_files import catalog_path, cutout_path, spectrum_path

BATCH_SIZE = 32
BASELINE_STARS = 500  # at most, spread over the classes


def read_with_astropy_and_pillow(directory: Path, star: Star) -> tuple[torch.Tensor, torch.Tensor]:
    """A star's flux and image, without any check."""
    with fits.open(spectrum_path(directory, star)) as hdus:
        flux = torch.from_numpy(hdus[1].data["flux"].astype(np.float32))
    with Image.open(cutout_path(directory, star)) as image:
        return flux, torch.from_numpy(np.array(image))


def read_all(prepared: cache.PreparedStars) -> None:
    """All stars once, in batches of random ones, as an epoch of training reads them."""
    for rows in torch.randperm(len(prepared.stars), generator=torch.Generator().manual_seed(0)).split(BATCH_SIZE):
        prepared.spectra[rows], prepared.images[rows]


def seconds(action: Callable[..., object], *arguments: object) -> float:
    """The duration of one call."""
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def peak_memory(directory: Path, num_workers: int) -> int:
    """Peak memory of this process in bytes, above that after the imports, when it decodes and reads all stars."""
    at_start = resident_bytes("VmRSS")
    shutil.rmtree(directory / cache.CACHE_DIR, ignore_errors=True)
    with cli.quietly():
        read_all(cache.read_stars(directory, "fusion", num_workers)[0])
    return resident_bytes("VmHWM") - at_start


def resident_bytes(field: str) -> int:
    """VmRSS, this process's resident memory, or VmHWM, its peak; on Linux alone."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(directory: Path, num_workers: int) -> list[tuple[str, str, str, str]]:
    """The rows of the table: figure, here, baseline, ratio."""
    stars, _ = read_catalog(catalog_path(directory))
    some = stars[:: -(-len(stars) // BASELINE_STARS)]
    baseline = len(some) / seconds(lambda: [read_with_astropy_and_pillow(directory, star) for star in some])

    def row(figure: str, took: float) -> tuple[str, str, str, str]:
        rate = len(stars) / took
        return figure, f"{rate:,.0f} stars/s", f"{baseline:,.0f} stars/s", f"× {rate / baseline:.1f}"

    rows = []
    for workers in sorted({1, num_workers}):
        shutil.rmtree(directory / cache.CACHE_DIR, ignore_errors=True)
        took = seconds(cache.read_stars, directory, "fusion", workers)
        rows.append(row(f"files decoded into the cache, --num-workers {workers}", took))
    started = time.perf_counter()
    prepared, _ = cache.read_stars(directory, "fusion", num_workers)
    rows.append((f"start of a run, {len(stars):,} cached stars", f"{time.perf_counter() - started:.2f} s", "", ""))
    rows.append(row(f"batches of {BATCH_SIZE} read from the cache", seconds(read_all, prepared)))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        memory = fresh.submit(peak_memory, directory, num_workers).result()
    in_memory = len(stars) * sum(dtype.itemsize for dtype in cache.ROWS.values())
    figure = "peak memory, all stars decoded and read; baseline: all of them in memory"
    rows.append((figure, f"{memory / 1e6:.0f} MB", f"{in_memory / 1e6:.0f} MB", f"× {memory / in_memory:.2f}"))
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = cli.ScriptParser(__doc__)
    add, number = parser.add_argument, cli.number_between
    add("--per-class", type=number(int, 1, 20_000), default=400, metavar="N", help="stars of each of M0 to M4")
    add("--num-workers", type=number(int, 1, 64), default=2, metavar="N", help="worker processes that decode")
    add("--work-dir", type=Path, metavar="DIR", help="for temporary files; by default, the system's directory for them")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work_dir:
        directory = Path(work_dir, "stars")
        simulate(directory, per_class=args.per_class, seed=0, min_snr=5, num_workers=args.num_workers)
        with cli.quietly():
            rows = measure(directory, args.num_workers)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| figure | here | baseline | |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    cli.run_as_script(main)
