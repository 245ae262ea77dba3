"""Measure the downloader against a server with latency: time, requests and bytes.

    python benchmarks/download_speed.py                     400 stars, 100 ms a request: two minutes

The server is the tests' local one. The baseline is the earlier reproduction: one request after the other, four archive
addresses and the cutout service for each star, then a second's pause. It is timed on some stars and scaled to all.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # and the server beside the tests

from sdss_server import SdssServer, make_star, options_for, running_server, write_catalog

import download_sdss_data
from catalog import CLASS_NAMES, Star
from cli import ScriptParser, number_between, run_as_script
from sdss_archive import cutout_url, spectrum_urls

BASELINE_ADDRESSES = 4  # of the archive, tried for each star
BASELINE_PAUSE = 1.0  # seconds, after each star


def make_stars(server: SdssServer, count: int) -> list[Star]:
    """Stars of which the server has lite and full spectra."""
    stars = [make_star(1 + n % 600, plate=300 + n // 600, subclass=CLASS_NAMES[n % 5]) for n in range(count)]
    for star in stars:
        server.add(star)
        server.add(star, full=True)
    return stars


def download(stars: list[Star], server: SdssServer, *options: object) -> tuple[float, int]:
    """Seconds of one run of the downloader into a new directory, and bytes that the server sent."""
    server.requests.clear()
    server.most_open_connections, sent_before = 0, server.bytes_sent
    with tempfile.TemporaryDirectory() as directory:
        write_catalog(Path(directory), stars)
        started = time.perf_counter()
        download_sdss_data.main(options_for(Path(directory), server, "--quiet", *options))
        return time.perf_counter() - started, server.bytes_sent - sent_before


def download_sequentially(stars: list[Star], server: SdssServer) -> float:
    """Seconds a star of the baseline."""
    started = time.perf_counter()
    for star in stars:
        for url in BASELINE_ADDRESSES * spectrum_urls(star, server.sas_url, full=True)[:1]:
            requests.get(url, timeout=30)
        requests.get(cutout_url(star.ra, star.dec, server.skyserver_url), timeout=30)
        time.sleep(BASELINE_PAUSE)
    return (time.perf_counter() - started) / len(stars)


def parse_arguments() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add, count = parser.add_argument, number_between(int, 2, 10**5)
    add("--stars", type=count, default=400, metavar="N", help="stars to fetch")
    add("--latency", type=number_between(float, 0, 10), default=0.1, metavar="S", help="seconds before each response")
    add("--workers", type=count, default=4, metavar="N", help="--workers of the downloader")
    add("--image-rate", type=number_between(float, 1e-3, 1e3), default=20.0, metavar="R", help="--image-rate of the "
        "downloader, whose own default of 1 spares SDSS's shared servers")  # fmt: skip
    add("--baseline-stars", type=count, default=10, metavar="N", help="stars on which the baseline is timed")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    options = ("--workers", args.workers, "--image-rate", args.image_rate)
    with running_server() as server:
        stars = make_stars(server, args.stars)
        server.delay = args.latency
        sequential = download_sequentially(stars[: args.baseline_stars], server) * args.stars
        seconds, lite_bytes = download(stars, server, *options)
        requests_sent, connections = len(server.requests), server.most_open_connections
        times = sorted(request.time for request in server.requests if "getjpeg" in request.path)
        server.delay = 0.0  # here only the bytes count
        _, full_bytes = download(stars, server, *options, "--full")
    print(f"""
{args.stars} stars, {1000 * args.latency:.0f} ms a request, --workers {args.workers} --image-rate {args.image_rate:g}

| figure | here | baseline | |
|---|---|---|---|
| all files | {seconds:.1f} s | {sequential:.0f} s | × {sequential / seconds:.1f} |
| requests | {requests_sent} | {(BASELINE_ADDRESSES + 1) * args.stars} | |
| most connections open | {connections} | 1 | |
| cutouts a second | {(len(times) - 1) / (times[-1] - times[0]):.1f} | | |
| bytes received, lite spectra and cutouts | {lite_bytes / 1e6:.1f} MB | {full_bytes / 1e6:.1f} MB with full spectra | \
{1 - lite_bytes / full_bytes:.0%} saved |""")


if __name__ == "__main__":
    run_as_script(main)
