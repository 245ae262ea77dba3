"""The downloader, run as a user starts it, against a local server that behaves (and fails) like SDSS."""

import csv
import email.utils
import re
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import sdss_server
from common import command, heed_ctrl_c, run_script
from filelock import FileLock
from sdss_server import SdssServer, other_body, status

import data
import download_sdss_data
from data import Star

CUTOUT = "/dr16/SkyServerWS/ImgCutout/getjpeg"
REDUX = "/sas/dr16/{}/spectro/redux/{}/spectra/{}"


@pytest.fixture
def server():
    with sdss_server.running_server() as running:
        yield running


def make_star(number: int = 1, plate: int = 300, run2d: int = 26, subclass: str = "M1", name: str = "") -> Star:
    mjd, fiberID = 51_900 + number, number
    name = name or str(data.encode_spec_obj_id(plate, mjd, fiberID, run2d))
    return Star(name, subclass, plate, mjd, fiberID, 150 + number / 100, number / 50 - 5)


def make_stars(server: SdssServer, count: int) -> list[Star]:
    stars = [make_star(number, subclass=data.CLASS_NAMES[number % 5]) for number in range(1, count + 1)]
    for star in stars:
        server.add(star)
    return stars


def write_catalog(data_dir: Path, stars: list[Star], positions: bool = True) -> None:
    rows = [",".join(map(str, star[: 7 if positions else 5])) for star in stars]
    header = "name,subclass,plate,mjd,fiberID" + ",ra,dec" * positions
    data.catalog_path(data_dir).write_text("\n".join([header, *rows, ""]))


def options_for(data_dir: Path, server: SdssServer, *options: str) -> list[object]:
    urls = ["--sas-url", server.sas_url, "--skyserver-url", server.skyserver_url]
    quick = ["--image-rate", "1000", "--backoff", "0.01", "--timeout", "5"]
    return ["--data-dir", data_dir, *urls, *quick, *options]


def run(arguments: list[object]) -> subprocess.CompletedProcess[str]:
    return run_script("download_sdss_data.py", *arguments, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")


def download(data_dir: Path, server: SdssServer, *options: str, exit_status: int = 0) -> str:
    """Run the script; returns what it printed (without the progress bar)."""
    process = run(options_for(data_dir, server, *options))
    assert process.returncode == exit_status, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout


def failures(data_dir: Path) -> dict[str, dict[str, str]]:
    """download_failures.csv, by file."""
    with open(data_dir / "download_failures.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def lite_path(star: Star, survey: str = "sdss", run2d: str = "26") -> str:
    folder = REDUX.format(survey, run2d, "lite")
    return f"{folder}/{star.plate:04d}/spec-{star.plate:04d}-{star.mjd}-{star.fiberID:04d}.fits"


def cutout_query(star: Star, size: int = 128) -> str:
    return f"{CUTOUT}?ra={star.ra:.7f}&dec={star.dec:.7f}&scale=0.2&width={size}&height={size}&opt="


def assert_whole(data_dir: Path, star: Star, server: SdssServer, path: str = "") -> None:
    """Both files are, bit for bit, what the server has."""
    assert data.spectrum_path(data_dir, star).read_bytes() == server.files[path or lite_path(star)]
    assert data.cutout_path(data_dir, star).read_bytes() == sdss_server.make_cutout_bytes(star.ra, star.dec)


def written_files(data_dir: Path) -> set[str]:
    """Everything under the directory but the catalogue and the lock."""
    names = {path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*") if path.is_file()}
    return names - {"objects.csv", ".download.lock"}


# What arrives, and from where


def test_all_files_arrive_bit_for_bit_with_one_request_each(tmp_path, server):
    paths = {}
    for number, (plate, run2d, survey, folder, name) in enumerate(
        [
            (273, 26, "sdss", "26", ""),
            (3187, 104, "sdss", "104", ""),
            (3764, 700, "eboss", "v5_13_0", ""),  # a list from an older release names v5_7_0
            (10000, 1300, "eboss", "v5_13_0", ""),
            (274, 0, "sdss", "26", "Gliese 412 A"),
            (4500, 0, "eboss", "v5_13_0", "LHS+2090"),
        ],
        start=1,
    ):
        star = make_star(number, plate, run2d, data.CLASS_NAMES[number % 5], name)
        server.add(star, folder)
        paths[star] = lite_path(star, survey, folder)
    write_catalog(tmp_path, list(paths))

    output = download(tmp_path, server)

    for star, path in paths.items():
        assert_whole(tmp_path, star, server, path)
    assert sorted(server.paths) == sorted([*paths.values(), *map(cutout_query, paths)])
    assert len(written_files(tmp_path)) == 12  # no failures file, no temporary file
    assert re.search(r"^all +6 +6 +6 +6$", output, re.MULTILINE)
    assert re.search(r"^M1 +2 +2 +2 +2$", output, re.MULTILINE)
    assert output.splitlines()[-1] == f"All files of these stars are there. Next: python train.py --data-dir {tmp_path}"
    agents = {request.headers["User-Agent"] for request in server.requests}
    assert len(agents) == 1 and re.fullmatch(r"m-star-classification/1\.0 \(python-requests/[\d.]+\)", agents.pop())


def test_without_a_specobjid_plates_between_the_surveys_are_tried_under_each_run2d(tmp_path, server):
    star = make_star(plate=2500, name="Wolf 359")
    server.add(star, "103")
    write_catalog(tmp_path, [star])

    download(tmp_path, server)

    asked = [path for path in server.paths if "spectro" in path]
    assert asked == [lite_path(star, "sdss", run2d) for run2d in ("26", "104", "103")]
    assert_whole(tmp_path, star, server, asked[-1])


def test_full_spectra(tmp_path, server):
    old, boss = make_star(1), make_star(2, 3764, 1300)
    server.add(old)
    server.add(boss, "v5_13_0")
    write_catalog(tmp_path, [old, boss])

    download(tmp_path, server, "--full", "--image-size", "64")

    old_path = f"{REDUX.format('sdss', '26', '0300')}/spec-0300-51901-0001.fits"
    boss_path = f"{REDUX.format('eboss', 'v5_13_0', 'full')}/3764/spec-3764-51902-0002.fits"
    assert set(server.paths) == {old_path, boss_path, cutout_query(old, 64), cutout_query(boss, 64)}
    assert data.spectrum_path(tmp_path, old).read_bytes() == server.files[old_path]
    assert data.spectrum_path(tmp_path, boss).read_bytes() == server.files[boss_path]
    assert len(data.read_cutout(data.cutout_path(tmp_path, old)).pixels) == 64


def test_the_position_comes_from_the_spectrum_where_the_catalogue_has_none(tmp_path, server):
    stars = make_stars(server, 3)
    write_catalog(tmp_path, stars, positions=False)
    download(tmp_path, server)
    for star in stars:
        assert_whole(tmp_path, star, server)

    data.cutout_path(tmp_path, stars[0]).unlink()  # and from one that has been there before
    server.requests.clear()
    download(tmp_path, server)
    assert server.paths == [cutout_query(stars[0])]
    assert_whole(tmp_path, stars[0], server)


def test_columns_go_before_a_name_that_disagrees(tmp_path, server):
    star = make_star(7)._replace(name=make_star(8).name)
    server.add(star)
    write_catalog(tmp_path, [star, *make_stars(server, 1)])

    output = download(tmp_path, server)

    assert "names that are the specObjID of another spectrum than plate, mjd, fiberID: 1;" in output
    assert f"{star.name} is 300-51908-8, they say 0300-51907-0007" in output
    assert_whole(tmp_path, star, server)


def test_redirects_are_followed(tmp_path, server):
    [star] = make_stars(server, 1)
    server.files["/mirror/spec.fits"] = server.files[lite_path(star)]
    server.fail("/lite/", status(302, Location="/mirror/spec.fits"))
    write_catalog(tmp_path, [star])
    download(tmp_path, server)
    assert_whole(tmp_path, star, server)


# What is there already


def test_a_second_run_fetches_nothing_valid_and_everything_damaged(tmp_path, server):
    stars = make_stars(server, 4)
    write_catalog(tmp_path, stars)
    download(tmp_path, server)
    assert len(server.requests) == 8

    server.requests.clear()
    assert "files there: 8; to fetch: 0 spectra, 0 cutouts" in download(tmp_path, server)
    assert server.requests == []

    truncated = data.spectrum_path(tmp_path, stars[0])
    truncated.write_bytes(truncated.read_bytes()[:-2880])
    other_star = data.spectrum_path(tmp_path, stars[1])
    other_star.write_bytes(server.files[lite_path(stars[2])])
    page = data.cutout_path(tmp_path, stars[2])
    page.write_text("<html>503 Service Unavailable</html>")
    assert "damaged files there, to be fetched again: 3" in download(tmp_path, server)
    assert set(server.paths) == {lite_path(stars[0]), lite_path(stars[1]), cutout_query(stars[2])}
    for star in stars:
        assert_whole(tmp_path, star, server)


def test_a_damaged_file_stays_when_there_is_nothing_better(tmp_path, server):
    star = make_star()
    write_catalog(tmp_path, [star])
    for path in (data.spectrum_path(tmp_path, star), data.cutout_path(tmp_path, star)):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"damaged")
    download(tmp_path, server, exit_status=1)
    assert data.spectrum_path(tmp_path, star).read_bytes() == b"damaged"
    assert len(failures(tmp_path)) == 2


def test_a_valid_cutout_of_another_size_is_kept(tmp_path, server):
    [star] = make_stars(server, 1)
    write_catalog(tmp_path, [star])
    download(tmp_path, server, "--image-size", "200")
    server.requests.clear()
    assert "cutouts there of another size than 128 pixels, kept: 1" in download(tmp_path, server)
    assert server.requests == []


def test_leftovers_of_a_killed_run_are_cleared_away(tmp_path, server):
    stars = make_stars(server, 1)
    write_catalog(tmp_path, stars)
    leftovers = [
        tmp_path / "spectra" / "M1" / ".spec-0300-51901-0001-abc.partial.fits",
        tmp_path / "images" / "M1" / ".1_image-abc.partial.jpg",
        tmp_path / ".download_failures-abc.partial.csv",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    download(tmp_path, server)
    assert len(written_files(tmp_path)) == 2


def test_a_second_download_into_the_same_directory_is_refused(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    with FileLock(tmp_path / ".download.lock"):
        process = run(options_for(tmp_path, server))
    assert process.returncode == 1
    assert process.stderr.strip() == (
        f"download_sdss_data.py: error: another download into {tmp_path} is running; wait for its end"
    )
    assert server.requests == []


# What does not arrive


def test_what_cannot_be_had_is_listed_with_the_true_reason(tmp_path, server):
    stars = make_stars(server, 9)
    good, black, outside, page, other, size, gone, text, unplaced = stars
    unplaced_row = unplaced._replace(ra="", dec="")
    write_catalog(tmp_path, [*stars[:-1], unplaced_row])
    del server.footprint[f"{outside.ra:.5f}", f"{outside.dec:.5f}"]
    for star in (gone, unplaced):
        del server.files[lite_path(star)]
    html = other_body(b"<html><body>Service Temporarily Unavailable</body></html>")
    wrong = {
        cutout_query(black): other_body(sdss_server.make_black_tile()),
        lite_path(page): html,
        lite_path(other): other_body(server.files[lite_path(good)]),
        cutout_query(size): other_body(sdss_server.make_cutout_bytes(size.ra, size.dec, 100)),
        cutout_query(text): html,
    }
    server.script = lambda path, attempt: wrong.get(path)

    output = download(tmp_path, server, "--retries", "2", exit_status=1)

    reasons = {
        data.cutout_path(tmp_path, black): "a black tile: the star lies outside the imaging footprint",
        data.cutout_path(tmp_path, outside): "HTTP 404 Not Found",
        data.spectrum_path(tmp_path, page): "not a FITS file (it begins with b'<html><body>Service ')",
        data.spectrum_path(tmp_path, other): "holds the spectrum of another star",
        data.cutout_path(tmp_path, size): "100×100 pixels where 128×128 were asked for",
        data.spectrum_path(tmp_path, gone): "HTTP 404 Not Found",
        data.cutout_path(tmp_path, text): "not a JPEG image",
        data.spectrum_path(tmp_path, unplaced): "HTTP 404 Not Found",
        data.cutout_path(tmp_path, unplaced): "no position: neither ra, dec in the catalogue nor",
    }
    listed = failures(tmp_path)
    assert set(listed) == {path.relative_to(tmp_path).as_posix() for path in reasons}
    for path, reason in reasons.items():
        assert listed[path.relative_to(tmp_path).as_posix()]["reason"].startswith(reason)
        assert not path.exists()
    row = listed[data.spectrum_path(tmp_path, gone).relative_to(tmp_path).as_posix()]
    assert list(row) == ["name", "subclass", "plate", "mjd", "fiberID", "file", "url", "reason"]
    assert [row["name"], row["subclass"], row["plate"], row["mjd"], row["fiberID"]] == list(map(str, gone[:5]))
    assert row["url"] == server.sas_url.removesuffix("/sas/dr16") + lite_path(gone)
    assert len(written_files(tmp_path)) == 18 - 9 + 1
    assert_whole(tmp_path, good, server)

    for path in (lite_path(gone), lite_path(unplaced), cutout_query(outside)):
        assert server.paths.count(path) == 1  # a 404 is an answer for good
    for path, answer in wrong.items():  # a page may pass, a whole file that comes twice is the answer
        assert server.paths.count(path) == (3 if answer is html else 2)
    assert re.search(r"^all +9 +5 +4 +1$", output, re.MULTILINE)
    assert "     2 missing, spectrum: HTTP 404 Not Found" in output
    assert f"Files missing: 9, listed in {tmp_path / 'download_failures.csv'}." in output.splitlines()[-1]

    server.script = lambda path, attempt: None  # the archive has been mended
    make_stars(server, 9)
    download(tmp_path, server)
    for star in stars:
        assert_whole(tmp_path, star, server)
    assert not (tmp_path / "download_failures.csv").exists()


def test_an_unreachable_server_is_told(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 1))
    server.server_close()
    output = download(tmp_path, server, "--retries", "1", exit_status=1)
    assert {row["reason"] for row in failures(tmp_path).values()} == {
        "connection failed or broken (ConnectionRefusedError: [Errno 111] Connection refused)"
    }
    assert "1 missing, spectrum: connection failed or broken\n" in output


def test_a_directory_that_cannot_be_written_ends_the_run_with_one_line(tmp_path, server):
    write_catalog(tmp_path, make_stars(server, 5))
    (tmp_path / "spectra").write_text("in the way")
    process = run(options_for(tmp_path, server))
    assert process.returncode == 1
    assert re.search(r"^download_sdss_data\.py: error: .*fits: cannot be written", process.stderr, re.MULTILINE)
    assert "Traceback" not in process.stderr


# Faults that pass


def test_passing_faults_are_outlasted(tmp_path, server):
    stars = make_stars(server, 9)
    html = other_body(b"<html><body>Service Temporarily Unavailable</body></html>")
    faults = [
        [status(503), status(500), status(502), status(504), status(429)],
        [status(503, Retry_After="0")],
        [status(429, Retry_After="86400")],  # waits 60 times --backoff, no longer
        [status(503, Retry_After="soon")],
        [sdss_server.reset, sdss_server.reset],
        [sdss_server.truncated],
        [sdss_server.short],
        [html],
        [other_body(b"")],
    ]
    for star, answers in zip(stars, faults, strict=True):
        server.fail(lite_path(star), *answers)
        server.fail(cutout_query(star), *answers)
    write_catalog(tmp_path, stars)

    download(tmp_path, server)

    for star, answers in zip(stars, faults, strict=True):
        assert_whole(tmp_path, star, server)
        assert server.paths.count(lite_path(star)) == server.paths.count(cutout_query(star)) == len(answers) + 1


def test_silent_and_endlessly_slow_answers_are_given_up_and_asked_again(tmp_path, server):
    stars = make_stars(server, 2)
    server.fail(lite_path(stars[0]), sdss_server.hang(30))
    server.fail(lite_path(stars[1]), sdss_server.trickle(0.05))  # never silent, and done in two hours
    write_catalog(tmp_path, stars)
    began = time.monotonic()
    download(tmp_path, server, "--timeout", "0.3")
    assert time.monotonic() - began < 15
    for star in stars:
        assert_whole(tmp_path, star, server)
        assert server.paths.count(lite_path(star)) >= 2


def test_attempts_are_bounded(tmp_path, server):
    [star] = make_stars(server, 1)
    server.script = lambda path, attempt: status(503) if "spectro" in path else None
    write_catalog(tmp_path, [star])
    download(tmp_path, server, "--retries", "3", exit_status=1)
    assert server.paths.count(lite_path(star)) == 4
    assert [row["reason"] for row in failures(tmp_path).values()] == ["HTTP 503 Service Unavailable"]


# Manners


def test_connections_are_few_and_kept_alive(tmp_path, server):
    stars = make_stars(server, 15)
    server.delay = 0.01
    write_catalog(tmp_path, stars)
    download(tmp_path, server, "--workers", "3")
    assert len(server.requests) == 30
    assert server.connections <= 3
    assert server.most_open_connections > 1  # they do work side by side


def test_cutouts_keep_their_rate_and_do_not_hold_up_the_spectra(tmp_path, server):
    stars = make_stars(server, 8)
    server.fail(CUTOUT, status(503))  # a retry counts as well
    write_catalog(tmp_path, stars)
    download(tmp_path, server, "--image-rate", "4", "--workers", "2")
    cutouts = [request.time for request in server.requests if CUTOUT in request.path]
    spectra = [request.time for request in server.requests if "spectro" in request.path]
    assert len(cutouts) == 9 and len(spectra) == 8
    assert cutouts[-1] - cutouts[0] >= 8 / 4 - 0.2
    assert max(spectra) < cutouts[5]


def test_ctrl_c_leaves_only_whole_files_and_a_second_run_completes(tmp_path, server):
    stars = make_stars(server, 30)
    server.delay = 0.02
    server.fail(lite_path(stars[3]), sdss_server.hang(60))  # one worker is stuck when the interrupt comes
    write_catalog(tmp_path, stars)
    arguments = options_for(tmp_path, server, "--image-rate", "10", "--timeout", "30")
    process = subprocess.Popen(
        command("download_sdss_data.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    while server.count("spectro") < 15 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)

    assert time.monotonic() - began < 5
    assert process.returncode == 130 and "Traceback" not in errors
    written = written_files(tmp_path)
    assert 0 < len(written) < 60 and not any("partial" in name for name in written)
    for star in stars:
        for path, content in (
            (data.spectrum_path(tmp_path, star), server.files[lite_path(star)]),
            (data.cutout_path(tmp_path, star), sdss_server.make_cutout_bytes(star.ra, star.dec)),
        ):
            assert not path.exists() or path.read_bytes() == content

    server.requests.clear()
    download(tmp_path, server)
    assert len(server.requests) == 60 - len(written)
    for star in stars:
        assert_whole(tmp_path, star, server)


# Catalogues from SDSS


def list_stars(server: SdssServer, per_class: int = 12) -> list[Star]:
    """Stars of each class with S/N 1, 2, 3, …, and others that no catalogue of ours should hold."""
    stars = []
    for number in range(5 * per_class):
        star = make_star(number + 1, plate=300 + 7 * number, subclass=data.CLASS_NAMES[number % 5])
        server.list_star(star, snr=1 + number // 5)
        server.add(star)
        stars.append(star)
    for number, others in enumerate(
        [{"class": "GALAXY"}, {"zWarning": 4}, {"run2d": "104"}, {"subClass": "M5"}, {"subClass": "M1III (168720)"}]
    ):
        server.list_star(make_star(number + 1, plate=1500), snr=99, **others)
    return stars


def read_query(data_dir: Path) -> list[dict[str, str]]:
    with open(data_dir / "objects.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def asked_sql(server: SdssServer) -> list[str]:
    return [parse_qs(urlsplit(path).query)["cmd"][0] for path in server.paths if "SqlSearch" in path]


def test_a_query_writes_a_balanced_catalogue_whose_files_can_be_fetched(tmp_path, server):
    stars = {star.name: star for star in list_stars(server)}

    output = download(tmp_path, server, "--query", "4")

    rows = read_query(tmp_path)
    assert [row["subclass"] for row in rows] == [*data.CLASS_NAMES] * 4  # by turns
    assert len({row["name"] for row in rows}) == 20 and {row["r_mag"] for row in rows} == {"19"}
    for star in data.read_catalog(tmp_path / "objects.csv")[0]:
        assert star == stars[star.name]
    # Not the first plates of the table, and yet the same stars every time.
    assert {row["name"] for row in rows} != set(list(stars)[:20])
    download(tmp_path / "again", server, "--query", "4")
    assert read_query(tmp_path / "again") == rows
    sql = (tmp_path / "objects.sql").read_text()
    assert len(asked_sql(server)) == 10 and all(query in sql for query in asked_sql(server))
    assert f"python download_sdss_data.py --data-dir {tmp_path}" in output

    assert "All files of these stars are there" in download(tmp_path, server)


def test_sets_of_high_and_low_snr_part_the_stars(tmp_path, server):
    list_stars(server)
    high, low, both = tmp_path / "high", tmp_path / "low", tmp_path / "both"
    download(high, server, "--query", "3", "--min-snr", "10")
    download(low, server, "--query", "9", "--max-snr", "10")
    download(both, server, "--query", "2", "--min-snr", "5", "--max-snr", "7")
    assert {float(row["snMedian"]) for row in read_query(high)} == {10, 11, 12}
    assert {float(row["snMedian"]) for row in read_query(low)} == set(range(1, 10))
    assert {float(row["snMedian"]) for row in read_query(both)} == {5, 6}


def test_a_query_replaces_no_catalogue(tmp_path, server):
    for name in ("objects.csv", "objects.sql"):
        mine = tmp_path / name.replace(".", "_") / name
        mine.parent.mkdir()
        mine.write_text("mine")
        process = run(options_for(mine.parent, server, "--query", "3"))
        assert process.returncode == 1 and f"{mine} is there already" in process.stderr
        assert mine.read_text() == "mine"
    assert not server.requests


def test_a_query_for_more_stars_than_there_are_says_how_many_there_are(tmp_path, server):
    list_stars(server)
    process = run(options_for(tmp_path, server, "--query", "4", "--min-snr", "10"))
    assert process.returncode == 1 and "SDSS has only 3 M0 stars" in process.stderr
    assert not written_files(tmp_path)


@pytest.mark.parametrize(
    "answer, words",
    [
        (
            sdss_server.Answer(body=b"#Table1\nerror_message\nIncorrect syntax near 'TOP', line 1.\n"),
            "rejected the query: Incorrect syntax near 'TOP', line 1.",
        ),
        (
            sdss_server.Answer(body=b"<html><style>b {}</style><body><b>Your query</b> is too&nbsp;long</body></html>"),
            "rejected the query: Your query is too long",
        ),
        (
            sdss_server.Answer(400, b"<h2>Only one SELECT</h2> is allowed"),
            "HTTP 400 Bad Request Only one SELECT is allowed",
        ),
        (sdss_server.Answer(body=b"No objects have been found"), "rejected the query: No objects have been found"),
        (sdss_server.Answer(), "(an empty answer)"),
    ],
)
def test_a_rejected_query_is_told_in_the_words_of_sdss(tmp_path, server, answer, words):
    list_stars(server)
    server.fail("SqlSearch", lambda right: answer)
    process = run(options_for(tmp_path, server, "--query", "2"))
    assert process.returncode == 1 and words in process.stderr and "Traceback" not in process.stderr
    assert "FROM SpecObj AS s" in process.stderr  # the query, to be tried by hand
    assert len(server.requests) == 1 and not written_files(tmp_path)


def test_a_query_that_the_database_rejects_is_told(tmp_path, server):
    list_stars(server)
    server.catalog = [{name: value for name, value in row.items() if name != "zWarning"} for row in server.catalog]
    process = run(options_for(tmp_path, server, "--query", "2"))
    assert process.returncode == 1 and "rejected the query: no such column: s.zWarning" in process.stderr


def test_a_query_outlasts_passing_faults(tmp_path, server):
    list_stars(server)
    server.fail("SqlSearch", status(503), sdss_server.truncated, sdss_server.reset, sdss_server.short, status(429))
    download(tmp_path, server, "--query", "2")
    assert len(read_query(tmp_path)) == 10 and len(server.requests) == 10


def test_a_query_can_be_seen_before_it_is_asked(tmp_path, server):
    output = download(tmp_path, server, "--query", "2", "--max-snr", "7.5", "--dry-run")
    assert output.count("SELECT TOP 2") == 5 and "s.snMedian < 7.5" in output
    assert not server.requests and not written_files(tmp_path)


# Options and catalogues


def test_dry_run_with_a_limit_writes_and_asks_nothing(tmp_path, server):
    stars = make_stars(server, 5)
    write_catalog(tmp_path, stars)
    output = download(tmp_path, server, "--dry-run", "--limit", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["objects.csv"]
    assert server.requests == []
    base = server.sas_url.removesuffix("/sas/dr16")
    assert [line for line in output.splitlines() if " -> " in line] == [
        f"{base}{path} -> {destination}"
        for star in stars[:2]
        for path, destination in (
            (lite_path(star), data.spectrum_path(tmp_path, star)),
            (cutout_query(star), data.cutout_path(tmp_path, star)),
        )
    ]
    assert "to fetch: 2 spectra, 2 cutouts" in output


def test_limit_takes_the_first_stars(tmp_path, server):
    stars = make_stars(server, 4)
    write_catalog(tmp_path, [*stars, stars[0]._replace(fiberID=99, subclass="K7")])
    output = download(tmp_path, server, "--limit", "2")
    assert "rows left out: 1 (subclass K7" in output
    assert len(written_files(tmp_path)) == 4
    for star in stars[:2]:
        assert_whole(tmp_path, star, server)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers", "0"], "argument --workers: '0' is not a whole number from 1 to 64"),
        (["--workers", "two"], "argument --workers: 'two' is not a whole number"),
        (["--image-rate", "0"], "argument --image-rate: '0' is not a number from"),
        (["--image-rate", "nan"], "argument --image-rate: 'nan' is not a number"),
        (["--limit", "0"], "argument --limit: '0' is not a whole number from 1"),
        (["--image-size", "63"], "argument --image-size: '63' is not a whole number from 64 to 2048"),
        (["--image-size", "2049"], "argument --image-size: '2049' is not"),
        (["--image-scale", "-0.2"], "argument --image-scale: '-0.2' is not"),
        (["--timeout", "0"], "argument --timeout: '0' is not"),
        (["--retries", "-1"], "argument --retries: '-1' is not"),
        (["--sas-url", "ftp://data.sdss.org"], "argument --sas-url: 'ftp://data.sdss.org' is not an http://"),
        (["--skyserver-url", "skyserver.sdss.org"], "argument --skyserver-url: 'skyserver.sdss.org' is not an http://"),
        (["--min-snr", "10"], "--min-snr and --max-snr choose stars for --query"),
        (["--query", "5", "--min-snr", "10", "--max-snr", "3"], "--min-snr must lie below --max-snr"),
        (["--skyserver-url", "http://[::1"], "argument --skyserver-url: 'http://[::1' is not an http://"),
    ],
)
def test_options_are_checked_first(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        download_sdss_data.main(["--data-dir", "/nowhere", *options])
    assert exit_.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage:") and message in error


def test_the_script_names_option_and_catalogue_errors_in_one_line(tmp_path, server):
    process = run(options_for(tmp_path, server, "--workers", "0"))
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("download_sdss_data.py: error: argument --workers:")

    process = run(options_for(tmp_path, server))
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert line.startswith(f"download_sdss_data.py: error: {tmp_path / 'objects.csv'}: no such file")
    assert list(tmp_path.iterdir()) == []


def test_help_shows_defaults_and_examples():
    output = run(["--help"]).stdout
    assert "(default: 4)" in output and "(default: https://data.sdss.org/sas/dr16)" in " ".join(output.split())
    assert "python download_sdss_data.py --dry-run" in output


def test_simulated_stars_are_not_asked_for(tmp_path):
    text = "name,subclass,plate,mjd,fiberID,ra,dec,simulated\nsim-1,M0,300,51901,1,150,1,1\n"
    data.catalog_path(tmp_path).write_text(text)
    with pytest.raises(data.DataError, match="lists simulated stars"):
        download_sdss_data.main(["--data-dir", str(tmp_path)])


# The pieces


@pytest.mark.parametrize(
    "name, plate, mjd, fiberID, lite, full",
    [
        ("307416612011534336", 273, 51957, 167, "sdss/spectro/redux/26/spectra/lite", "sdss/spectro/redux/26/spectra"),
        (
            "4238154523191472128", 3764, 55514, 972,
            "eboss/spectro/redux/v5_13_0/spectra/lite", "eboss/spectro/redux/v5_13_0/spectra/full",
        ),
        (
            "3588350836130029568", 3187, 54821, 392,
            "sdss/spectro/redux/104/spectra/lite", "sdss/spectro/redux/104/spectra",
        ),
        (
            "11258999466550599680", 10000, 57346, 1,
            "eboss/spectro/redux/v5_13_0/spectra/lite", "eboss/spectro/redux/v5_13_0/spectra/full",
        ),
    ],
)  # fmt: skip
def test_spectrum_url(name, plate, mjd, fiberID, lite, full):
    star = Star(name, "M0", plate, mjd, fiberID)
    [run2d] = download_sdss_data.run2d_candidates(star)
    end = f"{plate:04d}/spec-{plate:04d}-{mjd}-{fiberID:04d}.fits"
    assert download_sdss_data.spectrum_url(star, run2d) == f"https://data.sdss.org/sas/dr16/{lite}/{end}"
    assert download_sdss_data.spectrum_url(star, run2d, full=True) == f"https://data.sdss.org/sas/dr16/{full}/{end}"


@pytest.mark.parametrize(
    "plate, candidates",
    [
        (266, ("26",)),
        (1959, ("26",)),
        (1960, ("26", "104", "103")),
        (3522, ("26", "104", "103")),
        (3523, ("v5_13_0",)),
        (12547, ("v5_13_0",)),
    ],
)
def test_run2d_of_a_star_whose_name_is_a_label(plate, candidates):
    assert download_sdss_data.run2d_candidates(make_star(plate=plate, name="Kapteyn")) == candidates


def test_cutout_url():
    assert download_sdss_data.cutout_url(149.75677, -0.00001) == (
        "https://skyserver.sdss.org/dr16/SkyServerWS/ImgCutout/getjpeg"
        "?ra=149.7567700&dec=-0.0000100&scale=0.2&width=128&height=128&opt="
    )


def test_waiting_time_doubles_heeds_retry_after_and_is_bounded():
    waiting_time = download_sdss_data.waiting_time
    assert [waiting_time(attempt, 1.0) for attempt in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert waiting_time(0, 1.0, "17") == 17
    assert waiting_time(0, 1.0, "120") == 120
    assert waiting_time(0, 1.0, "999999999") == 600
    assert 15 < waiting_time(0, 1.0, email.utils.formatdate(time.time() + 20, usegmt=True)) <= 20
    for nonsense in ("", " ", "soon", "-5", "9" * 5000, "Mon, 99 Foo 99999 99:99:99 GMT", "\x00"):
        assert 1 <= waiting_time(0, 1.0, nonsense) <= 60
