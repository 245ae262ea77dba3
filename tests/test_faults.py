"""The downloader against a server that fails in every way that scripts could think of, and on a disk that fails too.

    FULL_CAMPAIGN=1 python -m pytest tests/test_faults.py      1,000 stars in place of 60

Most tests run the script's main() in this process; those that kill it, in processes of their own.
"""

import contextlib
import csv
import errno
import gzip
import multiprocessing
import os
import random
import re
import resource
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sdss_server
from common import command
from sdss_server import Fault, SdssServer, other_body, status

import data
import download_sdss_data
from data import Star

FULL = bool(os.environ.get("FULL_CAMPAIGN"))
STARS = 1000 if FULL else 60
SIZE = 64  # pixels a side of the cutouts
RETRIES = 3
TIMEOUT = 1  # seconds
LONGEST_ANSWER = 3  # times that


@pytest.fixture
def server(monkeypatch) -> Iterator[SdssServer]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download_sdss_data, "LONGEST_ANSWER", LONGEST_ANSWER)
    with sdss_server.running_server() as running:
        yield running


class File(NamedTuple):
    path: Path
    request: str  # what the server is asked
    content: bytes  # what it has


def make_stars(server: SdssServer, count: int) -> list[Star]:
    stars = []
    for number in range(1, count + 1):
        plate, mjd, fiberID = 300 + number // 600, 51_900 + number // 600, number % 600 + 1
        name = str(data.encode_spec_obj_id(plate, mjd, fiberID, 26))
        subclass = data.CLASS_NAMES[number % 5]
        stars.append(Star(name, subclass, plate, mjd, fiberID, 150 + number / 100, number / 500 - 5))
        server.add_small(stars[-1], spectrum_request(stars[-1]))
    return stars


def spectrum_request(star: Star) -> str:
    return f"{sdss_server.SAS}/sdss/spectro/redux/26/spectra/lite/{star.plate:04d}/spec-{star.spectrum_id}.fits"


def files_of(data_dir: Path, star: Star, server: SdssServer) -> tuple[File, File]:
    request = spectrum_request(star)
    cutout = (
        f"{sdss_server.SKYSERVER}/ImgCutout/getjpeg?ra={star.ra:.7f}&dec={star.dec:.7f}"
        f"&scale=0.2&width={SIZE}&height={SIZE}&opt="
    )
    return (
        File(data.spectrum_path(data_dir, star), request, server.files[request]),
        File(data.cutout_path(data_dir, star), cutout, sdss_server.make_cutout_bytes(star.ra, star.dec, SIZE)),
    )


def write_catalog(data_dir: Path, stars: list[Star]) -> None:
    lines = ["name,subclass,plate,mjd,fiberID,ra,dec", *(",".join(map(str, star[:7])) for star in stars)]
    data.catalog_path(data_dir).write_text("\n".join(lines))


def arguments(data_dir: Path, server: SdssServer, *options: object) -> list[str]:
    quick = ["--image-rate", 1000, "--image-size", SIZE, "--backoff", 0.001, "--timeout", TIMEOUT]
    urls = ["--sas-url", server.sas_url, "--skyserver-url", server.skyserver_url]
    return [str(argument) for argument in ("--data-dir", data_dir, *urls, *quick, "--retries", RETRIES, *options)]


def download(data_dir: Path, server: SdssServer, *options: object) -> int:
    """Run main(); returns the exit status."""
    try:
        download_sdss_data.main(arguments(data_dir, server, *options))
    except SystemExit as exit_:
        return exit_.code
    return 0


def failures(data_dir: Path) -> dict[Path, str]:
    with open(data_dir / "download_failures.csv", newline="", encoding="utf-8") as file:
        return {data_dir / row["file"]: row["reason"] for row in csv.DictReader(file)}


def written_files(data_dir: Path) -> set[Path]:
    there = {path for path in data_dir.rglob("*") if path.is_file()}
    return there - {data.catalog_path(data_dir), data_dir / ".download.lock"}


# Faults on a third of all requests


def redirect(location: str) -> Fault:
    return status(302, Location=location)


def to_a_closed_port(answer: sdss_server.Answer) -> sdss_server.Answer:
    return redirect("http://127.0.0.1:1/")(answer)  # no server has port 1


# What passes: the fault, and whether a file comes that is whole, which the downloader believes the second time.
BLACK, PICTURE = sdss_server.make_black_tile(SIZE), sdss_server.make_error_picture(SIZE)
PAGE = other_body(b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>")
ANOTHER_STAR = Star("another", "M0", 266, 51_630, 99, 1.0, 1.0)
ANOTHER = other_body(sdss_server.make_small_spectrum_bytes(ANOTHER_STAR))
PASSING: list[Fault] = [
    status(429),
    status(429, Retry_After="0"),
    status(503),
    status(503, Retry_After="86400"),
    status(500),
    status(502),
    sdss_server.reset,
    sdss_server.truncated,
    sdss_server.short,
    sdss_server.cut_by_header,
    sdss_server.hang(5),
    sdss_server.trickle(0.05),
    sdss_server.endless_headers(0.05),
    sdss_server.endless_chunk_size(0.05),
    to_a_closed_port,
    other_body(b""),
    PAGE,
]
WRONG_FILES: list[Fault] = [other_body(BLACK), other_body(PICTURE), ANOTHER]
# What stays: the fault, and the reason that the list of failures must give for a spectrum and for a cutout.
LASTING: list[tuple[Fault, str, str]] = [
    (status(404), "HTTP 404 Not Found", "HTTP 404 Not Found"),
    (status(410), "HTTP 410 Gone", "HTTP 410 Gone"),
    (status(429, Retry_After="0"), "HTTP 429 Too Many Requests", "HTTP 429 Too Many Requests"),
    (status(500), "HTTP 500 Internal Server Error", "HTTP 500 Internal Server Error"),
    (status(503), "HTTP 503 Service Unavailable", "HTTP 503 Service Unavailable"),
    (sdss_server.reset, *["connection failed or broken ("] * 2),
    (to_a_closed_port, *["connection failed or broken (ConnectionRefusedError"] * 2),
    (sdss_server.truncated, *["connection failed or broken (IncompleteRead"] * 2),
    (sdss_server.short, "the file is truncated", "a damaged JPEG image"),
    (sdss_server.hang(5), *[f"no answer within {TIMEOUT} s"] * 2),
    (sdss_server.trickle(0.05), *[f"not whole after {LONGEST_ANSWER * TIMEOUT} s"] * 2),
    (sdss_server.endless_headers(0.05), *[f"not whole after {LONGEST_ANSWER * TIMEOUT} s"] * 2),
    (sdss_server.endless_chunk_size(0.05), *[f"not whole after {LONGEST_ANSWER * TIMEOUT} s"] * 2),
    (PAGE, "not a FITS file (it begins with b'<!DOCTYPE html><html", "not a JPEG image"),
    (other_body(BLACK), "not a FITS file", "a black tile: the star lies outside the imaging footprint"),
    (other_body(PICTURE), "not a FITS file", "a blank tile: the star lies outside the imaging footprint"),
    (ANOTHER, "holds the spectrum of another star ({'PLATEID': 266", "not a JPEG image"),
    (other_body(sdss_server.make_cutout_bytes(1, 1, 100)), "not a FITS file", "100×100 pixels where 64×64"),
]


def passing_faults(server: SdssServer, seed: int) -> Callable[[str, int], Fault | None]:
    """A script that spoils a third of the requests; after RETRIES faults, and after a wrong file, the right answer."""

    def script(path: str, attempt: int) -> Fault | None:
        chance = random.Random(f"{seed} {path} {attempt}")
        if attempt >= RETRIES or chance.random() > 1 / 3:
            return None
        return chance.choice([*PASSING, *WRONG_FILES] if attempt == 0 else PASSING)

    return script


def test_with_faults_on_a_third_of_all_requests_every_file_arrives_or_is_listed(tmp_path, server):
    stars = make_stars(server, STARS)
    write_catalog(tmp_path, stars)
    files = [file for star in stars for file in files_of(tmp_path, star, server)]
    spoilt = random.Random(1).sample(range(STARS), max(1, STARS // 300) * len(LASTING))
    lasting = {files[2 * star + k]: LASTING[i % len(LASTING)] for i, star in enumerate(spoilt) for k in (0, 1)}
    always = {file.request: fault for file, (fault, _, _) in lasting.items()}
    passing = passing_faults(server, seed=1)
    server.script = lambda path, attempt: always.get(path) or passing(path, attempt)

    assert download(tmp_path, server, "--workers", 16) == 1

    reasons = failures(tmp_path)
    assert set(reasons) == {file.path for file in lasting}
    for file, (_, *expected) in lasting.items():
        assert reasons[file.path].startswith(expected[file.path.suffix == ".jpg"])
    arrived = [file for file in files if file not in lasting]
    assert all(file.path.read_bytes() == file.content for file in arrived)
    assert written_files(tmp_path) == {file.path for file in arrived} | {tmp_path / "download_failures.csv"}

    server.script = lambda path, attempt: None
    server.requests.clear()
    assert download(tmp_path, server) == 0
    assert sorted(server.paths) == sorted(file.request for file in lasting)
    assert written_files(tmp_path) == {file.path for file in files}
    assert all(file.path.read_bytes() == file.content for file in files)


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path, server):
    """kill -9 at twenty random moments: what was there is not asked for again, and all is there at the end."""
    stars = make_stars(server, 80)
    write_catalog(tmp_path, stars)
    files = [file for star in stars for file in files_of(tmp_path, star, server)]
    quick = [fault for fault in PASSING if fault in (sdss_server.reset, sdss_server.truncated, sdss_server.short, PAGE)]
    server.script = lambda path, attempt: random.Random(f"{path} {attempt}").choice([*quick, *[None] * 8])
    server.delay = 0.02
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["download_sdss_data"])  # imported once, not for each of them
    moments, kills = random.Random(2), 0

    while kills < 20:
        there = {file.request for file in files if file.path.exists()}
        server.requests.clear()
        process = processes.Process(
            target=download_sdss_data.main, args=(arguments(tmp_path, server, "--image-rate", 40),)
        )
        process.start()
        last = moments.randrange(8)  # the request after which it is killed, and how long after
        while len(server.requests) <= last and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        kills += 1
        assert there.isdisjoint(server.paths)
        assert all(file.path.read_bytes() == file.content for file in files if file.path.exists())

    there = {file.request for file in files if file.path.exists()}
    assert 0 < len(there) < len(files)  # they were killed in the middle
    server.requests.clear()
    server.script = lambda path, attempt: None
    assert download(tmp_path, server) == 0
    assert there.isdisjoint(server.paths)
    assert written_files(tmp_path) == {file.path for file in files}
    assert all(file.path.read_bytes() == file.content for file in files)


# One fault at a time


def test_a_server_that_is_down_is_given_up_soon(tmp_path, server):
    stars = make_stars(server, 40)
    write_catalog(tmp_path, stars)
    server.script = lambda path, attempt: status(503) if "spectro" in path else None

    assert download(tmp_path, server, "--workers", 2) == 1

    spectra = [files_of(tmp_path, star, server)[0] for star in stars]
    reasons = failures(tmp_path)
    assert set(reasons) == {file.path for file in spectra}  # the cutouts come from another server
    asked = [file.path for file in spectra if server.count(file.request)]
    assert 8 <= len(asked) <= 9  # a second worker may have begun one more
    for file in spectra:
        waited = "not asked for: the server gave none of the 8 files before"
        assert reasons[file.path] == ("HTTP 503 Service Unavailable" if file.path in asked else waited)


def test_stars_that_a_server_has_not_are_no_reason_to_give_it_up(tmp_path, server):
    stars = make_stars(server, 12)
    write_catalog(tmp_path, stars)
    last = {file.request for file in files_of(tmp_path, stars[-1], server)}
    answers = {True: status(404), False: other_body(BLACK)}
    server.script = lambda path, attempt: None if path in last else answers["spectro" in path]

    assert download(tmp_path, server, "--workers", 1) == 1

    reasons = Counter(failures(tmp_path).values())
    assert reasons == {
        "HTTP 404 Not Found": 11,
        "a black tile: the star lies outside the imaging footprint, or the server drew an error": 11,
    }
    assert len(written_files(tmp_path)) == 3  # the last star's, and the list of failures
    assert len(server.requests) == 11 + 1 + 2 * 11 + 1  # a 404 is believed at once, a tile when it comes again


def test_an_answer_without_an_end_is_cut_off(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 100_000)
    write_catalog(tmp_path, make_stars(server, 1))
    server.script = lambda path, attempt: sdss_server.endless_body
    assert download(tmp_path, server) == 1
    assert set(failures(tmp_path).values()) == {"more than 100000 bytes, too many for a file of one star"}
    assert len(server.requests) == 4


def test_redirects_are_followed_without_their_bodies_and_not_in_circles(tmp_path, server):
    stars = make_stars(server, 2)
    write_catalog(tmp_path, stars)
    [spectrum, cutout], [circle, _] = (files_of(tmp_path, star, server) for star in stars)
    server.files["/mirror"] = spectrum.content
    server.fail(spectrum.request, sdss_server.endless_redirect("/mirror"))
    server.script = lambda path, attempt: redirect(path) if path == circle.request else None

    assert download(tmp_path, server, "--retries", 0) == 1

    assert spectrum.path.read_bytes() == spectrum.content
    [reason] = failures(tmp_path).values()
    assert reason.startswith("connection failed or broken (TooManyRedirects")
    assert server.count(circle.request) == download_sdss_data.MAX_REDIRECTS + 1


def test_nothing_is_unpacked(tmp_path, server):
    """A thousandfold of what came would be in memory before its size could be seen."""
    write_catalog(tmp_path, make_stars(server, 1))
    packed = gzip.compress(bytes(10**6))
    server.script = lambda path, attempt: lambda answer: sdss_server.Answer(200, packed, {"Content-Encoding": "gzip"})
    assert download(tmp_path, server, "--retries", 0) == 1
    image, spectrum = sorted(failures(tmp_path).values(), key=len)
    assert image == "not a JPEG image" and spectrum.startswith(r"not a FITS file (it begins with b'\x1f\x8b")


@pytest.fixture
def certificate(tmp_path_factory, server) -> Path:
    """Of the server, which speaks TLS from now on; nobody has signed it but itself."""
    directory = tmp_path_factory.mktemp("certificate")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return certificate


def https(server: SdssServer) -> list[str]:
    urls = {"--sas-url": server.sas_url, "--skyserver-url": server.skyserver_url}
    return [text for option, url in urls.items() for text in (option, url.replace("http:", "https:"))]


def test_a_server_that_cannot_prove_its_name_is_asked_for_nothing(tmp_path, server, certificate):
    write_catalog(tmp_path, make_stars(server, 1))
    assert download(tmp_path, server, "--timeout", 10, "--retries", 1, *https(server)) == 1
    assert all("certificate verify failed" in reason for reason in failures(tmp_path).values())
    assert server.requests == []


def test_one_that_can_is_not_followed_to_an_address_without_encryption(tmp_path, server, certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    [star] = make_stars(server, 1)
    write_catalog(tmp_path, [star])
    spectrum, cutout = files_of(tmp_path, star, server)
    server.fail(spectrum.request, to_a_closed_port)
    server.fail(cutout.request, redirect(cutout.request))  # to itself: that is allowed
    assert download(tmp_path, server, "--timeout", 10, *https(server)) == 1
    assert failures(tmp_path) == {spectrum.path: "redirected from https to an address without encryption"}
    assert cutout.path.read_bytes() == cutout.content


# A disk that takes nothing


def test_a_full_disk_ends_the_run_with_one_line_and_costs_no_file(tmp_path, server, monkeypatch):
    stars = make_stars(server, 4)
    write_catalog(tmp_path, stars)
    files = {file.path: file.content for star in stars for file in files_of(tmp_path, star, server)}
    room = iter(range(3))

    def fsync(number: int, fsync: Callable[[int], None] = os.fsync) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(data.DataError, match=r"cannot be written \(No space left on device\)") as error:
        download(tmp_path, server, "--workers", 1)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in written_files(tmp_path)}.items() < files.items()
    assert len(written_files(tmp_path)) == 3

    monkeypatch.undo()
    assert download(tmp_path, server) == 0
    assert {path: path.read_bytes() for path in written_files(tmp_path)} == files


def test_the_script_says_so_in_one_line(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    process = subprocess.run(
        command("download_sdss_data.py", *arguments(tmp_path, server)),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr
    last = process.stderr.splitlines()[-1]
    assert re.fullmatch(r"download_sdss_data\.py: error: .*: cannot be written \(File too large\)", last)
    assert written_files(tmp_path) == set()


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    if os.geteuid():
        directory.chmod(0o555)
        yield
        directory.chmod(0o755)
        return
    # Permissions do not stop root; a file system does.
    for options in (["--bind", directory], ["-o", "remount,ro,bind"]):
        if subprocess.run(["mount", *options, directory], capture_output=True).returncode:
            pytest.skip("root, and no right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, server):
    data_dir = tmp_path / "stars"
    data_dir.mkdir()
    write_catalog(data_dir, make_stars(server, 1))
    with read_only(data_dir), pytest.raises(OSError, match=f"(Read-only file system|Permission denied).*{data_dir}"):
        download(data_dir, server)
    assert server.requests == [] and written_files(data_dir) == set()
