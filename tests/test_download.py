"""The downloader, run as a user starts it, against a local server that behaves like SDSS."""

import contextlib
import csv
import errno
import gzip
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sdss_server
from common import command, heed_ctrl_c, run_script
from filelock import FileLock
from sdss_server import (
    Answer,
    SdssServer,
    contents,
    cutout_request,
    failures,
    make_star,
    make_stars,
    options_for,
    other_body,
    write_catalog,
    written,
)

import download_sdss_data
from star_files import cutout_path, spectrum_path


def run(data_dir: Path, server: SdssServer, *options: object) -> subprocess.CompletedProcess[str]:
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    process = run_script("download_sdss_data.py", *options_for(data_dir, server, *options), **no_proxy)
    assert "Traceback" not in process.stderr, process.stderr
    return process


def download(data_dir: Path, server: SdssServer, *options: object, exit_status: int = 0) -> str:
    """Run the script; returns its standard output."""
    process = run(data_dir, server, *options)
    assert process.returncode == exit_status, process.stdout + process.stderr
    return process.stdout


# Which files arrive, and from where


def test_all_files_arrive_bit_for_bit_with_one_request_each(tmp_path, server):
    stars = {}
    for number, (plate, run2d, folder, subclass, name) in enumerate(
        [
            (273, 26, "26", "M1", ""),
            (3187, 104, "104", "M0", ""),
            (3764, 700, "v5_13_0", "M4", ""),  # a list from an older release names v5_7_0
            (10000, 1300, "v5_13_0", "M1", ""),
            (274, 0, "26", "M2", "Gliese 412 A"),
            (4500, 0, "v5_13_0", "M3", "LHS+2090"),
            (275, 26, "26", "", ""),  # without label: into spectra/ and images/ themselves
        ],
        start=1,
    ):
        star = make_star(number, plate, run2d, subclass, name)
        stars[star] = server.add(star, folder)
    write_catalog(tmp_path, stars)

    output = download(tmp_path, server)

    assert written(tmp_path) == contents(tmp_path, stars, server)  # and no failures file, no temporary file
    assert sorted(server.paths) == sorted([*stars.values(), *map(cutout_request, stars)])
    assert re.search(r"^M1 +2 +2 +2 +2$\n(.*\n)*^other +1 +1 +1 +1$\n^all +7 +7 +7 +7$", output, re.MULTILINE)
    assert output.splitlines()[-1] == f"All files of these stars are there. Next: python train.py --data-dir {tmp_path}"
    [agent] = {request.headers["User-Agent"] for request in server.requests}
    assert re.fullmatch(r"m-star-classification/1\.0 \(python-requests/[\d.]+\)", agent)


def test_a_catalogue_without_the_column_subclass(tmp_path, server):
    stars = {star._replace(subclass=""): path for star, path in make_stars(server, 2).items()}
    rows = [f"{star.name},{star.plate},{star.mjd},{star.fiberID},{star.ra},{star.dec}" for star in stars]
    (tmp_path / "objects.csv").write_text("\n".join(["specObjID,plate,mjd,fiberid,RA,Dec", *rows]))
    download(tmp_path, server)
    assert written(tmp_path) == contents(tmp_path, stars, server)


def test_without_a_specobjid_plates_between_the_surveys_are_tried_under_each_run2d(tmp_path, server):
    star = make_star(plate=2500, name="Wolf 359")
    path = server.add(star, "103")
    write_catalog(tmp_path, [star])
    download(tmp_path, server)
    assert [path for path in server.paths if "spectro" in path] == [
        path.replace("/103/", f"/{run2d}/") for run2d in ("26", "104", "103")
    ]


def test_full_spectra(tmp_path, server):
    stars = {make_star(1): "26", make_star(2, 3764, 1300): "v5_13_0"}
    stars = {star: server.add(star, run2d, full=True) for star, run2d in stars.items()}
    write_catalog(tmp_path, stars)
    download(tmp_path, server, "--full")
    assert written(tmp_path) == contents(tmp_path, stars, server)


def test_dr17_and_stars_of_a_release_after_the_one_asked_for(tmp_path, server):
    old, boss, new = make_star(1), make_star(2, 3764, 1302), make_star(3, 3764, 1302)
    dr17 = {star: server.add(star, run2d, release="dr17") for star, run2d in ((old, "26"), (boss, "v5_13_2"))}
    dr16 = {star: server.add(star, run2d) for star, run2d in ((old, "26"), (boss, "v5_13_0"))}
    stars = {"dr17": dr17 | {new: server.add(new, "v5_13_2", release="dr17")}, "dr16": dr16}
    for release, files in stars.items():
        (tmp_path / release).mkdir()
        write_catalog(tmp_path / release, [old, boss, new])
        url = server.sas_url.replace("dr16", release)
        process = run(tmp_path / release, server, "--sas-url", url)
        assert process.returncode == (release == "dr16")
        assert written(tmp_path / release).items() >= contents(tmp_path / release, files, server).items()
    reason = "its specObjID names v5_13_2, a release after DR16"
    assert failures(tmp_path / "dr16") == {spectrum_path(tmp_path / "dr16", new): reason}


def test_the_position_comes_from_the_spectrum_where_the_catalogue_has_none(tmp_path, server):
    stars = make_stars(server, 3)
    write_catalog(tmp_path, stars, positions=False)
    download(tmp_path, server)
    assert written(tmp_path) == contents(tmp_path, stars, server)

    first = next(iter(stars))
    cutout_path(tmp_path, first).unlink()
    server.requests.clear()
    download(tmp_path, server)
    assert server.paths == [cutout_request(first)]


def test_no_cutout_is_taken_where_catalogue_and_spectrum_disagree_on_the_position(tmp_path, server):
    one, other = stars = make_stars(server, 2)
    write_catalog(tmp_path, [one._replace(ra=other.ra, dec=other.dec), other])
    download(tmp_path, server, exit_status=1)
    reason = "the catalogue places it 80″ from where its spectrum was taken"
    assert failures(tmp_path) == {cutout_path(tmp_path, one): reason}
    assert server.count("getjpeg") == len(stars) - 1


def test_columns_go_before_a_name_that_disagrees(tmp_path, server):
    star = make_star(7)._replace(name=make_star(8).name)
    stars = {star: server.add(star)} | make_stars(server, 1)
    write_catalog(tmp_path, stars)
    output = download(tmp_path, server)
    assert "names that are the specObjID of another spectrum: 1; plate, mjd and fiberID are used" in output
    assert written(tmp_path) == contents(tmp_path, stars, server)


# What is there already


def test_a_second_run_fetches_only_what_is_damaged_or_absent(tmp_path, server):
    stars = make_stars(server, 5)
    write_catalog(tmp_path, stars)
    download(tmp_path, server)
    complete = contents(tmp_path, stars, server)
    server.requests.clear()
    assert "to fetch: 0 spectra, 0 cutouts" in download(tmp_path, server)
    assert server.requests == []

    one, two, three, four, _ = stars
    spectrum_path(tmp_path, one).write_bytes(complete[spectrum_path(tmp_path, one)][:-2880])
    spectrum_path(tmp_path, two).write_bytes(complete[spectrum_path(tmp_path, three)])
    cutout_path(tmp_path, three).write_text("<html>503 Service Unavailable</html>")
    cutout_path(tmp_path, four).unlink()
    assert "damaged files there: 3" in download(tmp_path, server)
    assert set(server.paths) == {stars[one], stars[two], cutout_request(three), cutout_request(four)}
    assert written(tmp_path) == complete


def test_a_file_counts_wherever_it_lies(tmp_path, server):
    stars = make_stars(server, 3)
    write_catalog(tmp_path, stars)
    for number, star in enumerate(stars):
        folder = [tmp_path / "spectra", tmp_path / "spectra" / "0300", tmp_path / "spectra" / "M9" / "old"][number]
        folder.mkdir(parents=True)
        (folder / f"spec-{star.spectrum_id}.fits.gz").write_bytes(gzip.compress(server.files[stars[star]]))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{star.name}_image.jpg").write_bytes(sdss_server.make_cutout_bytes(star.ra, star.dec))
    assert "to fetch: 0 spectra, 2 cutouts" in download(tmp_path, server)
    assert server.count("spectro") == 0


def test_a_damaged_gzipped_spectrum_is_replaced_by_a_gzipped_one(tmp_path, server):
    [(star, address)] = make_stars(server, 1).items()
    write_catalog(tmp_path, [star])
    path = spectrum_path(tmp_path, star).with_suffix(".fits.gz")
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(server.files[address])[:-100])
    download(tmp_path, server)
    assert gzip.decompress(path.read_bytes()) == server.files[address]


def test_a_file_that_the_catalogue_names_is_not_fetched_and_listed_if_absent(tmp_path, server):
    places = zip("ab", make_stars(server, 2), strict=True)
    rows = [f"{name}.fits,M1,{star.ra},{star.dec}" for name, star in places]
    (tmp_path / "objects.csv").write_text("\n".join(["file,subclass,ra,dec", *rows]))
    (tmp_path / "spectra").mkdir()
    (tmp_path / "spectra" / "a.fits").write_bytes(b"of another survey")
    reason = "the catalogue names a file of your own, which is not in spectra/"
    planned = download(tmp_path, server, "--dry-run")
    assert "to fetch: 0 spectra, 2 cutouts" in planned and f"({reason}) -> {tmp_path / 'spectra/b.fits'}\n" in planned
    download(tmp_path, server, exit_status=1)
    assert failures(tmp_path) == {tmp_path / "spectra" / "b.fits": reason}
    assert server.count("spectro") == 0
    assert {path.name for path in (tmp_path / "images").rglob("*.jpg")} == {"a_image.jpg", "b_image.jpg"}


def test_a_damaged_file_stays_when_there_is_nothing_better(tmp_path, server):
    star = make_star()
    write_catalog(tmp_path, [star])
    for path in (spectrum_path(tmp_path, star), cutout_path(tmp_path, star)):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"damaged")
    download(tmp_path, server, exit_status=1)
    assert set(failures(tmp_path)) == {spectrum_path(tmp_path, star), cutout_path(tmp_path, star)}
    assert list(written(tmp_path).values()).count(b"damaged") == 2


def test_leftovers_of_a_killed_run_are_cleared_away(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    for name in ("spectra/M1/.spec-0300-51901-0001-abc.partial.fits", "images/.1_image-abc.partial.jpg",
                 ".download_failures-abc.partial.csv"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    download(tmp_path, server)
    assert len(written(tmp_path)) == 2


def test_a_second_download_into_the_same_directory_is_refused(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    with FileLock(tmp_path / ".download.lock"):
        process = run(tmp_path, server)
    assert process.returncode == 1 and server.requests == []
    assert process.stderr == (
        f"download_sdss_data.py: error: another download into {tmp_path} is running; wait for its end\n"
    )


# What does not arrive


def test_files_that_cannot_be_had_are_listed_and_counted(tmp_path, server):
    stars = make_stars(server, 6)
    good, gone, outside, black, unplaced, _ = stars
    write_catalog(tmp_path, [star._replace(ra="", dec="") if star is unplaced else star for star in stars])
    for star in (gone, unplaced):
        del server.files[stars[star]]
    page = Answer(404, b"<html><style>b {}</style><body><h1>Sorry</h1>RA, dec outside&nbsp;the footprint</body></html>")
    wrong = {cutout_request(outside): lambda answer: page,
             cutout_request(black): other_body(sdss_server.make_black_tile())}  # fmt: skip
    server.script = lambda path, attempt: wrong.get(path)

    output = download(tmp_path, server, exit_status=1)

    assert failures(tmp_path) == {
        spectrum_path(tmp_path, gone): "HTTP 404 Not Found (Not Found)",
        spectrum_path(tmp_path, unplaced): "HTTP 404 Not Found (Not Found)",
        cutout_path(tmp_path, unplaced): "no position: no ra, dec in the catalogue, none in a spectrum",
        cutout_path(tmp_path, outside): "HTTP 404 Not Found (Sorry RA, dec outside the footprint)",
        cutout_path(tmp_path, black): "a black tile: the star lies outside the imaging footprint, or the server drew "
        "an error",
    }
    with open(tmp_path / "download_failures.csv", newline="") as file:
        [row] = [row for row in csv.DictReader(file) if row["name"] == gone.name]
    assert row["url"].endswith(stars[gone]) and row["subclass"] == gone.subclass and int(row["plate"]) == gone.plate
    assert server.paths.count(stars[gone]) == server.paths.count(cutout_request(outside)) == 1  # a 404 is final
    assert re.search(r"^all +6 +4 +3 +2$", output, re.MULTILINE)
    assert "     2 missing, spectrum: HTTP 404 Not Found\n" in output
    assert f"Files missing: 5, listed in {tmp_path / 'download_failures.csv'}." in output.splitlines()[-1]

    server.script = lambda path, attempt: None  # SDSS has been mended
    make_stars(server, 6)
    download(tmp_path, server)
    assert written(tmp_path) == contents(tmp_path, stars, server)


def test_an_unreachable_server_is_named_so(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    server.server_close()
    output = download(tmp_path, server, "--retries", 1, exit_status=1)
    reason = f"connection failed or broken (ConnectionRefusedError: [Errno {errno.ECONNREFUSED}] Connection refused)"
    assert set(failures(tmp_path).values()) == {reason}
    assert "1 missing, spectrum: connection failed or broken\n" in output


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


@pytest.mark.parametrize("query", [False, True])
def test_a_read_only_directory_is_found_before_the_first_request(tmp_path, server, query):
    data_dir = tmp_path / "stars"
    data_dir.mkdir()
    if not query:
        write_catalog(data_dir, make_stars(server, 1))
    with read_only(data_dir):
        process = run(data_dir, server, *(["--query", "1"] if query else []))
    assert process.returncode == 1 and server.requests == []
    [line] = process.stderr.splitlines()
    assert re.search(rf"(Read-only file system|Permission denied).*{data_dir}", line)


def test_a_file_in_place_of_a_folder_is_found_before_the_first_request(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    (tmp_path / "images").write_text("in the way")
    process = run(tmp_path, server)
    assert process.returncode == 1 and server.requests == []
    assert str(tmp_path / "images") in process.stderr


# Manners


def test_connections_are_few_and_kept_alive(tmp_path, server):
    stars = make_stars(server, 15)
    server.delay = 0.01
    write_catalog(tmp_path, stars)
    download(tmp_path, server, "--workers", 3)
    assert len(server.requests) == 30
    assert 1 < server.most_open_connections <= 3  # they do work side by side
    assert server.connections <= 6  # three for each server


def test_cutouts_keep_their_rate(tmp_path, server):
    stars = make_stars(server, 8)
    write_catalog(tmp_path, stars)
    download(tmp_path, server, "--image-rate", 4)
    cutouts = [request.time for request in server.requests if "getjpeg" in request.path]
    spectra = [request.time for request in server.requests if "spectro" in request.path]
    assert cutouts[-1] - cutouts[0] >= 7 / 4 - 0.2
    assert spectra[-1] - spectra[0] < 1


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_only_whole_files_and_a_second_run_completes(tmp_path, server, signal_):
    stars = make_stars(server, 20)
    server.delay = 0.02
    server.fail(cutout_request(list(stars)[3]), sdss_server.hang(60))  # one worker is stuck when the interrupt comes
    write_catalog(tmp_path, stars)
    process = subprocess.Popen(
        command("download_sdss_data.py", *options_for(tmp_path, server, "--image-rate", 20, "--timeout", 30)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    while server.count("getjpeg") < 8 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal_)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)

    assert time.monotonic() - began < 5
    assert process.returncode == 130 and "Traceback" not in errors
    complete = contents(tmp_path, stars, server)
    there = written(tmp_path)
    assert 20 < len(there) < 40 and there.items() <= complete.items()

    server.requests.clear()
    download(tmp_path, server)
    assert len(server.requests) == 40 - len(there)
    assert written(tmp_path) == complete


# Options


def test_dry_run_with_a_limit_writes_and_asks_nothing(tmp_path, server):
    stars = make_stars(server, 5)
    write_catalog(tmp_path, stars)
    output = download(tmp_path, server, "--dry-run", "--limit", 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "objects.csv"] and server.requests == []
    base = server.sas_url.removesuffix("/sas/dr16")
    assert {line for line in output.splitlines() if " -> " in line} == {
        f"{base}{path} -> {destination}"
        for star in list(stars)[:2]
        for path, destination in (
            (stars[star], spectrum_path(tmp_path, star)), (cutout_request(star), cutout_path(tmp_path, star))
        )
    }  # fmt: skip
    assert "to fetch: 2 spectra, 2 cutouts" in output

    output = download(tmp_path, server, "--query", 2, "--max-snr", 7.5, "--dry-run")
    assert output.count("SELECT TOP 2") == 5 and "s.snMedian < 7.5" in output and server.requests == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers", "0"], "argument --workers: '0' is not a whole number from 1 to 64"),
        (["--image-rate", "nan"], "argument --image-rate: 'nan' is not a number from"),
        (["--limit", "0"], "argument --limit: '0' is not a whole number from 1"),
        (["--timeout", "0"], "argument --timeout: '0' is not"),
        (["--retries", "-1"], "argument --retries: '-1' is not"),
        (["--sas-url", "ftp://data.sdss.org"], "argument --sas-url: 'ftp://data.sdss.org' is not an http://"),
        (["--sas-url", "https://data.sdss.org/sas/dr12"], "argument --sas-url: the release is DR12, not DR16 or DR17"),
        (["--skyserver-url", "http://[::1"], "argument --skyserver-url: 'http://[::1' is not an http://"),
        (["--image-size", "128"], "unrecognized arguments: --image-size"),
        (["--min-snr", "10"], "--min-snr has no effect without --query"),
        (["--query", "5", "--min-snr", "10", "--max-snr", "3"], "--min-snr must lie below --max-snr"),
        (["--query", "5", "--full"], "--full has no effect with --query"),
        (["--query", "5", "--limit", "3"], "--limit has no effect with --query"),
        (["--query", "5", "--image-rate", "2"], "--image-rate has no effect with --query"),
    ],
)
def test_options_are_checked_first(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        download_sdss_data.main(["--data-dir", "/nowhere", *options])
    assert exit_.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage:") and message in error


def test_the_servers_are_of_one_release_by_default():
    args = download_sdss_data.parse_arguments(["--sas-url", "https://mirror.org/sas/dr17/"])
    assert args.skyserver_url == "https://skyserver.sdss.org/dr17/SkyServerWS"


@pytest.mark.parametrize("rows, message", [("", "no such file"), ("sim-1,M0,300,51901,1,1\n", "lists simulated stars")])
def test_an_unusable_catalogue_is_named_in_one_line(tmp_path, server, rows, message):
    if rows:
        (tmp_path / "objects.csv").write_text(f"name,subclass,plate,mjd,fiberID,simulated\n{rows}")
    process = run(tmp_path, server)
    [line] = process.stderr.splitlines()
    assert process.returncode == 1 and server.requests == []
    assert line.startswith(f"download_sdss_data.py: error: {tmp_path / 'objects.csv'}: {message}")
