"""How quickly the downloader fetches stars from a server that takes its time, and how many bytes that takes.

    python benchmarks/download_speed.py                     400 stars, 100 ms a request: two minutes
    python benchmarks/download_speed.py --image-rate 1      at the downloader's default rate: seven minutes

The server is the tests' local one. The yardstick is what the earlier reproduction does, one request
after the other: four archive addresses and the cutout service for each star, then a second's pause. It
is timed on some stars and scaled to all.
"""

import argparse
import contextlib
import csv
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import requests

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the scripts lie one directory up, the server beside the tests

from sdss_server import SdssServer, running_server  # noqa: E402

import data  # noqa: E402
import download_sdss_data  # noqa: E402
from data import Star  # noqa: E402
from download_sdss_data import cutout_url, spectrum_url  # noqa: E402

YARDSTICK_PAUSE = 1.0  # seconds, after each star


class Download(NamedTuple):
    """What the server saw of one run of the downloader."""

    seconds: float
    requests: int
    most_connections: int
    cutouts_a_second: float  # from the first to the last
    bytes_sent: int


def make_stars(server: SdssServer, data_dir: Path, count: int) -> list[Star]:
    """Stars that the server has, and their catalogue."""
    stars = []
    for number in range(1, count + 1):
        plate, mjd, fiberID = 300 + number // 600, 52_000, 1 + number % 600
        name = str(data.encode_spec_obj_id(plate, mjd, fiberID, run2d=26))
        subclass = data.CLASS_NAMES[number % len(data.CLASS_NAMES)]
        stars.append(Star(name, subclass, plate, mjd, fiberID, ra=number / 10, dec=number / 20))
        server.add(stars[-1])
    with open(data.catalog_path(data_dir), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Star._fields[:7])
        writer.writerows(star[:7] for star in stars)
    return stars


def download(stars: list[Star], server: SdssServer, data_dir: Path, *options: str) -> Download:
    """One run of the downloader, all that it prints kept back."""
    server.requests.clear()
    server.most_open_connections = 0
    sent_before = server.bytes_sent
    arguments = ["--data-dir", str(data_dir), "--sas-url", server.sas_url, "--skyserver-url", server.skyserver_url]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        download_sdss_data.main([*arguments, *options])
    seconds = time.perf_counter() - started
    times = sorted(request.time for request in server.requests if "getjpeg" in request.path)
    rate = (len(times) - 1) / (times[-1] - times[0])
    return Download(seconds, len(server.requests), server.most_open_connections, rate, server.bytes_sent - sent_before)


def download_sequentially(stars: list[Star], server: SdssServer) -> float:
    """Seconds a star of the plain script."""
    started = time.perf_counter()
    for star in stars:
        for run2d in ("26", "103", "104", download_sdss_data.BOSS_RUN2D):
            requests.get(spectrum_url(star, run2d, full=True, sas_url=server.sas_url), timeout=30)
        requests.get(cutout_url(star.ra, star.dec, skyserver_url=server.skyserver_url), timeout=30)
        time.sleep(YARDSTICK_PAUSE)
    return (time.perf_counter() - started) / len(stars)


def parse_arguments() -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add, count = parser.add_argument, data.number_between(int, 2, 10**5)
    add("--stars", type=count, default=400, help="stars to fetch")
    add("--latency", type=data.number_between(float, 0, 10), default=0.1, help="seconds before each answer")
    add("--workers", type=count, default=4, help="the downloader's")
    add("--image-rate", type=data.number_between(float, 1e-3, 1e3), default=20.0, help="the downloader's, whose own "
        "default is 1: SDSS's servers are shared, this one is not")  # fmt: skip
    add("--yardstick-stars", type=count, default=10, help="stars on which the sequential script is timed")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    options = ("--workers", str(args.workers), "--image-rate", str(args.image_rate))
    with tempfile.TemporaryDirectory() as directory, running_server() as server:
        lite_dir, full_dir = Path(directory, "lite"), Path(directory, "full")
        lite_dir.mkdir()
        full_dir.mkdir()
        stars = make_stars(server, lite_dir, args.stars)
        make_stars(server, full_dir, args.stars)
        server.delay = args.latency
        sequential = download_sequentially(stars[: args.yardstick_stars], server) * args.stars
        lite = download(stars, server, lite_dir, *options)
        server.delay = 0.0  # here only the bytes count
        full = download(stars, server, full_dir, *options, "--full")
    floor = args.stars / args.image_rate
    print(f"""
{args.stars} stars, {1000 * args.latency:.0f} ms a request, --workers {args.workers} --image-rate {args.image_rate:g}

| figure | here | yardstick | |
|---|---|---|---|
| all files | {lite.seconds:.1f} s | {sequential:.0f} s, one after the other | × {sequential / lite.seconds:.1f} |
| least time that the image rate allows | {floor:.0f} s; {args.stars:.0f} s at the default, 1 a second | | |
| requests | {lite.requests} | {5 * args.stars} | |
| most connections open | {lite.most_connections} | 1 | |
| cutouts asked for, a second | {lite.cutouts_a_second:.1f} | | |
| bytes received, lite spectra and cutouts | {lite.bytes_sent / 1e6:.0f} MB | \
{full.bytes_sent / 1e6:.0f} MB with full spectra | {1 - lite.bytes_sent / full.bytes_sent:.0%} saved |""")


if __name__ == "__main__":
    data.run_as_script(main)
