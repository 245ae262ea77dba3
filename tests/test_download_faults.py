"""The downloader against servers, connections and disks that fail: every file arrives, or is listed with the reason.

Most tests run the script's main() in this process, with short waits.
"""

import errno
import gzip
import multiprocessing
import os
import random
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sdss_server
from sdss_server import (
    Answer,
    Fault,
    SdssServer,
    contents,
    cutout_request,
    failures,
    make_star,
    make_stars,
    options_for,
    other_body,
    status,
    write_catalog,
    written,
)

import download_sdss_data
import sdss_archive
from catalog import CLASS_NAMES
from cli import DataError
from star_files import cutout_path, spectrum_path

RETRIES = 2
TIMEOUT = 1  # seconds
ANSWER_TIME = 2 * TIMEOUT
PAGE = other_body(b"<!DOCTYPE html><html><body>Service <b>Unavailable</b></body></html>")
BLACK = other_body(sdss_server.make_black_tile())
OTHER_STAR = other_body(sdss_server.make_spectrum_bytes(make_star(99, 266)))


@pytest.fixture
def server(monkeypatch) -> Iterator[SdssServer]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(sdss_archive, "BACKOFF_FACTOR", 0.01)
    monkeypatch.setattr(sdss_archive, "MAX_RETRY_AFTER", 0.1)
    monkeypatch.setattr(sdss_archive, "MAX_ANSWER_TIME", ANSWER_TIME / TIMEOUT)
    with sdss_server.running_server() as running:
        yield running


def download(data_dir: Path, server: SdssServer, *options: object) -> int:
    """Run main(); returns the exit status."""
    try:
        download_sdss_data.main(
            options_for(data_dir, server, "--retries", RETRIES, "--timeout", TIMEOUT, "--image-rate", 1000, *options)
        )
    except SystemExit as exit_:
        return exit_.code
    return 0


def to_a_closed_port(answer: Answer) -> Answer:
    return Answer(302, headers={"Location": "http://127.0.0.1:1/"})  # no server has port 1


# Faults that pass: answers to the first requests for a file, after which it comes

TRANSIENT: list[list[Fault]] = [
    [status(503), status(500)],
    [status(408), status(429, Retry_After="0")],
    [status(429, Retry_After="86400")],  # waits MAX_RETRY_AFTER, no longer
    [status(503, Retry_After="soon")],
    [sdss_server.reset, sdss_server.reset],
    [sdss_server.truncated, sdss_server.truncated],
    [sdss_server.short],
    [PAGE],
    [other_body(b"")],
    [BLACK],
    [OTHER_STAR],
    [sdss_server.hang(30)],
    [sdss_server.trickle(0.05)],  # never silent, and done in two hours
]


def test_transient_faults_are_outlasted(tmp_path, server):
    stars = make_stars(server, len(TRANSIENT))
    write_catalog(tmp_path, stars)
    for star, faults in zip(stars, TRANSIENT, strict=True):
        server.fail(stars[star], *faults)
        server.fail(cutout_request(star), *faults)
    assert download(tmp_path, server, "--workers", 8) == 0
    assert written(tmp_path) == contents(tmp_path, stars, server)
    for star, faults in zip(stars, TRANSIENT, strict=True):
        assert server.paths.count(stars[star]) == server.paths.count(cutout_request(star)) == len(faults) + 1


# Faults that last: the answer to every request; the reasons for a spectrum and for a cutout; the requests for each.
# A 404 is final; another file than the wanted one is believed the second time.

TOO_LATE = f"not whole after {ANSWER_TIME:g} s"
WORDS = "a page in place of the file (Service Unavailable)"
BLANK = "a black tile: the star lies outside the imaging footprint, or the server drew an error"
LASTING: list[tuple[Fault, str, str, tuple[int, int]]] = [
    (status(404), "HTTP 404 Not Found (Error 404)", "HTTP 404 Not Found (Error 404)", (1, 1)),
    (status(410), "HTTP 410 Gone (Error 410)", "HTTP 410 Gone (Error 410)", (1, 1)),
    (status(429, Retry_After="0"), *["HTTP 429 Too Many Requests (Error 429)"] * 2, (3, 3)),
    (status(503), *["HTTP 503 Service Unavailable (Error 503)"] * 2, (3, 3)),
    (sdss_server.reset, *["connection failed or broken ("] * 2, (3, 3)),
    (to_a_closed_port, *["connection failed or broken (ConnectionRefusedError"] * 2, (1, 1)),
    (sdss_server.truncated, *["connection failed or broken (IncompleteRead"] * 2, (3, 3)),
    (sdss_server.short, "the file is truncated or damaged", "a damaged JPEG image", (3, 3)),
    (sdss_server.hang(30), *[f"no answer within {TIMEOUT:g} s"] * 2, (3, 3)),
    (sdss_server.trickle(0.05), TOO_LATE, TOO_LATE, (3, 3)),
    (PAGE, WORDS, WORDS, (3, 3)),
    (BLACK, "not a FITS file (it begins with", BLANK, (3, 2)),
    (other_body(sdss_server.make_error_picture()), "not a FITS file", BLANK.replace("black", "blank"), (3, 2)),
    (OTHER_STAR, "holds the spectrum of another star", "not a JPEG image", (2, 3)),
    (other_body(sdss_server.make_cutout_bytes(1, 1, 100)), "not a FITS file", "not a colour cutout of 128×128", (3, 2)),
]


def test_lasting_faults_are_listed_with_the_reason_and_no_other_file_suffers(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download_sdss_data, "MAX_CONSECUTIVE_FAILURES", 100)
    stars = make_stars(server, len(LASTING) + 3)
    write_catalog(tmp_path, stars)
    always = {}
    for star, (fault, *_) in zip(stars, LASTING, strict=False):
        always |= {stars[star]: fault, cutout_request(star): fault}
    server.script = lambda path, attempt: always.get(path)

    assert download(tmp_path, server, "--workers", 8) == 1

    reasons = failures(tmp_path)
    assert len(reasons) == 2 * len(LASTING)
    for star, (_, spectrum, cutout, requests) in zip(stars, LASTING, strict=False):
        assert reasons[spectrum_path(tmp_path, star)].startswith(spectrum)
        assert reasons[cutout_path(tmp_path, star)].startswith(cutout)
        assert (server.paths.count(stars[star]), server.paths.count(cutout_request(star))) == requests
    complete = contents(tmp_path, stars, server)
    there = written(tmp_path)
    del there[tmp_path / "download_failures.csv"]
    assert there == {path: content for path, content in complete.items() if path not in reasons}

    server.script = lambda path, attempt: None
    server.requests.clear()
    assert download(tmp_path, server) == 0
    assert written(tmp_path) == complete and len(server.requests) == 2 * len(LASTING)


def test_a_query_outlasts_transient_faults(tmp_path, server):
    for number in range(1, 21):
        server.list_star(make_star(number, subclass=CLASS_NAMES[number % 5]), snr=10)
    server.fail("SqlSearch", status(503), sdss_server.reset)
    server.fail("%27M1%27", sdss_server.truncated, sdss_server.short)
    download_sdss_data.main(options_for(tmp_path, server, "--query", "4"))
    assert len((tmp_path / "objects.csv").read_text().splitlines()) == 21
    assert len(server.requests) == 5 + 4


@pytest.mark.slow
def test_with_faults_on_a_third_of_all_requests_every_file_arrives(tmp_path, server):
    stars = make_stars(server, 300)
    write_catalog(tmp_path, stars)
    faults = [fault for row in TRANSIENT for fault in row]

    def script(path: str, attempt: int) -> Fault | None:
        chance = random.Random(f"{path} {attempt}")
        return chance.choice(faults) if attempt < RETRIES and chance.random() < 1 / 3 else None

    server.script = script
    download(tmp_path, server, "--workers", 16)  # 1 if a wrong file came twice in a row, and was believed
    complete = contents(tmp_path, stars, server)
    there = {path: content for path, content in written(tmp_path).items() if path.suffix != ".csv"}
    assert there.items() <= complete.items() and len(there) > 0.97 * len(complete)
    server.script = lambda path, attempt: None
    assert download(tmp_path, server) == 0
    assert written(tmp_path) == complete


# A server that is down


def test_a_server_that_is_down_is_given_up_soon(tmp_path, server):
    stars = make_stars(server, 40)
    write_catalog(tmp_path, stars)
    server.script = lambda path, attempt: status(503) if "spectro" in path else None

    assert download(tmp_path, server, "--workers", 2) == 1

    reasons = Counter(failures(tmp_path).values())  # the cutouts come from another server
    given_up = reasons["not asked for: 8 files in a row failed at this server"]
    assert given_up in (31, 32)  # a second worker may have begun one more
    assert reasons["HTTP 503 Service Unavailable (Error 503)"] == 40 - given_up


def test_files_that_a_server_has_not_are_no_reason_to_give_it_up(tmp_path, server):
    stars = make_stars(server, 12)
    write_catalog(tmp_path, stars)
    *_, last = stars
    server.script = lambda path, attempt: (
        None if path in (stars[last], cutout_request(last)) else status(404) if "spectro" in path else BLACK
    )
    assert download(tmp_path, server, "--workers", 1) == 1
    assert set(Counter(failures(tmp_path).values()).values()) == {11}
    assert written(tmp_path).items() >= contents(tmp_path, {last: stars[last]}, server).items()


# Answers that are too large


def test_an_answer_without_an_end_is_cut_off(tmp_path, server, monkeypatch):
    monkeypatch.setattr(sdss_archive, "MAX_FILE_BYTES", 100_000)
    write_catalog(tmp_path, make_stars(server, 1))
    server.script = lambda path, attempt: sdss_server.endless
    assert download(tmp_path, server) == 1
    assert set(failures(tmp_path).values()) == {"more than 100000 bytes, too many for one star"}
    assert len(server.requests) == 2


def test_an_answer_is_not_unpacked_before_its_size_is_known(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    packed = gzip.compress(bytes(10**8))
    server.script = lambda path, attempt: lambda answer: Answer(200, packed, {"Content-Encoding": "gzip"})
    assert download(tmp_path, server, "--retries", 0) == 1
    assert all("larger than" in reason for reason in failures(tmp_path).values())


# Encryption


def test_a_server_must_prove_its_name(tmp_path, server, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    https = ("--timeout", 10, "--sas-url", server.sas_url.replace("http:", "https:"),
             "--skyserver-url", server.skyserver_url.replace("http:", "https:"))  # fmt: skip
    data_dir = tmp_path / "stars"
    data_dir.mkdir()
    write_catalog(data_dir, make_stars(server, 1))

    assert download(data_dir, server, "--retries", 1, *https) == 1
    assert all("certificate verify failed" in reason for reason in failures(data_dir).values())
    assert server.requests == []

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert download(data_dir, server, *https) == 0


# The end of a process, and of a disk


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path, server, kills):
    """kill -9: no half file under a final name, nothing is asked for twice, and all is there at the end."""
    stars = make_stars(server, 10 * kills)
    write_catalog(tmp_path, stars)
    complete = contents(tmp_path, stars, server)
    requests = {path: star for star, path in stars.items()}
    requests = {spectrum_path(tmp_path, star): path for path, star in requests.items()}
    requests |= {cutout_path(tmp_path, star): cutout_request(star) for star in stars}
    server.delay = 0.02
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["download_sdss_data"])  # imported once, not for each of them
    moments = random.Random(2)
    arguments = options_for(tmp_path, server, "--image-rate", 100)

    for _ in range(kills):
        there = {requests[path] for path in written(tmp_path) if path in requests}
        server.requests.clear()
        process = processes.Process(target=download_sdss_data.main, args=(arguments,))
        process.start()
        last = moments.randrange(8)  # the request after which it is killed, and how long after
        while len(server.requests) <= last and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert there.isdisjoint(server.paths)
        assert {p: c for p, c in written(tmp_path).items() if "partial" not in p.name}.items() <= complete.items()

    assert 0 < len(written(tmp_path)) < len(complete)  # they were killed in the middle
    assert download(tmp_path, server) == 0
    assert written(tmp_path) == complete


def test_a_full_disk_ends_the_run_with_one_line_and_costs_no_file(tmp_path, server, monkeypatch):
    stars = make_stars(server, 4)
    write_catalog(tmp_path, stars)
    room = iter(range(3))

    def fsync(number: int, fsync: Callable[[int], None] = os.fsync) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DataError, match=r"\.fits: cannot be written \(No space left on device\)"):
            download(tmp_path, server, "--workers", 1)
    assert len(written(tmp_path)) == 3
    assert written(tmp_path).items() <= contents(tmp_path, stars, server).items()
    assert download(tmp_path, server) == 0
