"""SDSS's addresses, and catalogues that its SQL search writes."""

import csv
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sdss_server import Answer, SdssServer, make_star, options_for, written
from test_download import download, run

import download_sdss_data
import sdss_archive
from catalog import CLASS_NAMES, Star, read_catalog

# Addresses


@pytest.mark.parametrize(
    "name, plate, mjd, fiberID, lite, full",
    [
        ("307416612011534336", 273, 51957, 167, "sdss/spectro/redux/26/spectra/lite", "sdss/spectro/redux/26/spectra"),
        ("4238154523191472128", 3764, 55514, 972, "eboss/spectro/redux/v5_13_0/spectra/lite",
         "eboss/spectro/redux/v5_13_0/spectra/full"),
        ("3588350836130029568", 3187, 54821, 392, "sdss/spectro/redux/104/spectra/lite",
         "sdss/spectro/redux/104/spectra"),
        ("11258999466550599680", 10000, 57346, 1, "eboss/spectro/redux/v5_13_0/spectra/lite",
         "eboss/spectro/redux/v5_13_0/spectra/full"),
    ],
)  # fmt: skip
def test_spectrum_urls(name, plate, mjd, fiberID, lite, full):
    star = Star(name, "M0", plate, mjd, fiberID)
    end = f"{plate:04d}/spec-{plate:04d}-{mjd}-{fiberID:04d}.fits"
    assert sdss_archive.spectrum_urls(star) == (f"https://data.sdss.org/sas/dr16/{lite}/{end}",)
    assert sdss_archive.spectrum_urls(star, full=True) == (f"https://data.sdss.org/sas/dr16/{full}/{end}",)


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
    assert sdss_archive.run2d_candidates(make_star(plate=plate, name="Kapteyn")) == candidates


def test_cutout_url():
    assert sdss_archive.cutout_url(149.75677, -0.00001) == (
        "https://skyserver.sdss.org/dr16/SkyServerWS/ImgCutout/getjpeg"
        "?ra=149.7567700&dec=-0.0000100&scale=0.2&width=128&height=128&opt="
    )


# Catalogues from SDSS


def list_stars(server: SdssServer, per_class: int = 12) -> list[Star]:
    """Stars of each class with S/N 1, 2, 3, …, and others that no catalogue of ours should hold."""
    stars = []
    for number in range(5 * per_class):
        star = make_star(number + 1, plate=300 + 7 * number, subclass=CLASS_NAMES[number % 5])
        server.list_star(star, snr=1 + number // 5)
        stars.append(star)
    for number, others in enumerate(
        [{"class": "GALAXY"}, {"zWarning": 4}, {"run2d": "104"}, {"subClass": "M5"}, {"subClass": "M1III (168720)"}]
    ):
        server.list_star(make_star(number + 1, plate=1500), snr=99, **others)
    return stars


def read_rows(data_dir: Path) -> list[dict[str, str]]:
    with open(data_dir / "objects.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def asked_sql(server: SdssServer) -> list[str]:
    return [parse_qs(urlsplit(path).query)["cmd"][0] for path in server.paths if "SqlSearch" in path]


def test_a_query_writes_a_balanced_catalogue_whose_files_can_be_fetched(tmp_path, server):
    stars = {star.name: star for star in list_stars(server)}

    output = download(tmp_path, server, "--query", 4)

    rows = read_rows(tmp_path)
    for row in rows:
        server.add(stars[row["name"]])
    assert [row["subclass"] for row in rows] == [*CLASS_NAMES] * 4  # by turns
    assert len({row["name"] for row in rows}) == 20 and {row["r_mag"] for row in rows} == {"19"}
    assert all(star == stars[star.name] for star in read_catalog(tmp_path / "objects.csv")[0])
    # Not the first plates of the table, and yet the same stars every time.
    assert {row["name"] for row in rows} != set(list(stars)[:20])
    download(tmp_path / "again", server, "--query", 4)
    assert read_rows(tmp_path / "again") == rows
    sql = (tmp_path / "objects.sql").read_text()
    assert len(asked_sql(server)) == 10 and all(query in sql for query in asked_sql(server))
    assert f"python download_sdss_data.py --data-dir {tmp_path}" in output

    assert "All files of these stars are there" in download(tmp_path, server)


def test_sets_of_high_and_low_snr_part_the_stars(tmp_path, server):
    list_stars(server)
    for options, expected in [
        (["--query", 3, "--min-snr", 10], {10, 11, 12}),
        (["--query", 9, "--max-snr", 10], set(range(1, 10))),
        (["--query", 2, "--min-snr", 5, "--max-snr", 7], {5, 6}),
    ]:
        download(tmp_path / str(expected), server, *options)
        assert {float(row["snMedian"]) for row in read_rows(tmp_path / str(expected))} == expected


def test_a_query_replaces_no_catalogue(tmp_path, server):
    for name in ("objects.csv", "objects.sql"):
        mine = tmp_path / name.replace(".", "_") / name
        mine.parent.mkdir()
        mine.write_text("mine")
        process = run(mine.parent, server, "--query", 3)
        assert process.returncode == 1 and f"{mine}: exists" in process.stderr
        assert mine.read_text() == "mine" and not server.requests


def test_a_query_for_more_stars_than_there_are_says_how_many_there_are(tmp_path, server):
    list_stars(server)
    process = run(tmp_path, server, "--query", 4, "--min-snr", 10)
    assert process.returncode == 1 and "SDSS has only 3 M0 stars" in process.stderr
    assert not written(tmp_path)


ECHO = b"<html><body>Error <pre>SELECT " + b"s.column, " * 40 + b"</pre> Invalid column name 'x'</body></html>"


@pytest.mark.parametrize(
    "answer, words",
    [
        (Answer(body=b"#Table1\nerror_message\nIncorrect syntax near 'TOP'.\n"), ": Incorrect syntax near 'TOP'."),
        (Answer(body=b"<style>b {}</style><body><b>Query</b> is too&nbsp;long</body>"), ": Query is too long"),
        (Answer(400, b"<h2>Only one SELECT</h2> is allowed"), "HTTP 400 Bad Request (Only one SELECT is allowed)"),
        (Answer(body=ECHO), "Invalid column name 'x'"),
        (Answer(400, ECHO), "Invalid column name 'x'"),
        (Answer(body=b"No objects have been found"), "SDSS refuses the query: No objects have been found"),
        (Answer(), "(an empty answer)"),
    ],
)
def test_sdss_message_is_shown_when_it_refuses_a_query(tmp_path, server, capsys, answer, words):
    server.script = lambda path, attempt: lambda right: answer
    list_stars(server, 1)
    with pytest.raises(download_sdss_data.DataError) as error:
        download_sdss_data.main(options_for(tmp_path, server, "--query", "2"))
    assert words in str(error.value) and "FROM SpecObj AS s" in str(error.value)  # the query, to be tried by hand
    assert len(server.requests) == 1 and not written(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: b"\xef\xbb\xbf" + body,
        lambda body: b"\r\n" + body.replace(b"\n", b"\r\n\r\n") + b"\r\n",
        lambda body: body.lower().replace(b"m", b"M"),  # classes stay M0 … M4
        lambda body: body.removeprefix(b"#Table1\n"),
    ],
    ids=["byte-order mark", "blank lines", "header in lower case", "no name of the table"],
)
def test_an_answer_in_another_form_is_read(tmp_path, server, change):
    list_stars(server)
    server.script = lambda path, attempt: lambda right: Answer(body=change(right.body))
    download_sdss_data.main(options_for(tmp_path, server, "--query", "2"))
    assert len(read_rows(tmp_path)) == 10
    assert tuple(read_rows(tmp_path)[0]) == sdss_archive.CATALOG_COLUMNS
