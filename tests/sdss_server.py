"""A local HTTP server that behaves like SDSS's two: the archive of spectra, and SkyServer's cutouts and SQL search.

It serves real FITS and JPEG bytes under SDSS's own paths, answers queries from a database with the tables
SpecObj and PhotoObj, records what it is asked, and fails as it is told to: `server.fail("spec-0269", status(503),
status(503))` spoils the next two answers to requests whose address contains that text; `server.script` chooses a
fault, or none, for every request.
"""

import contextlib
import csv
import io
import math
import re
import socket
import sqlite3
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
from astropy.io import fits
from PIL import Image, ImageDraw

from catalog import CLASS_NAMES, Star, encode_spec_obj_id
from star_files import cutout_path, spectrum_path

SAS = "/sas/dr16"
SKYSERVER = "/dr16/SkyServerWS"


# SDSS's files


def make_spectrum_bytes(star: Star, extensions: int = 3) -> bytes:
    """A FITS file laid out as SDSS's lite ones; `extensions` > 3 adds exposures of 2048 pixels, as in the full ones."""
    random = np.random.default_rng(star.plate * 1000 + star.fiberID)
    pixels = 3840
    loglam = (np.arange(pixels) + 35_800) * 1e-4
    flux = 10 + loglam + random.normal(0, 0.5, pixels)
    columns = [
        fits.Column("flux", "E", array=flux),
        fits.Column("loglam", "E", array=loglam),
        fits.Column("ivar", "E", array=np.full(pixels, 4.0)),
        fits.Column("and_mask", "J", array=np.zeros(pixels)),
        fits.Column("or_mask", "J", array=np.zeros(pixels)),
        fits.Column("wdisp", "E", array=np.ones(pixels)),
        fits.Column("sky", "E", array=random.normal(3, 0.1, pixels)),
        fits.Column("model", "E", array=10 + loglam),
    ]
    primary = fits.PrimaryHDU()
    identity = {"PLATEID": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID}
    if math.isfinite(star.ra):
        identity |= {"PLUG_RA": star.ra, "PLUG_DEC": star.dec}
    primary.header.update({"RA": 151.5, "DEC": 0.0, **identity})  # RA, DEC: the plate's centre
    coadd = fits.BinTableHDU.from_columns(columns, name="COADD")
    row = [fits.Column("CLASS", "4A", array=["STAR"]), fits.Column("SUBCLASS", "2A", array=[star.subclass])]
    others = [fits.BinTableHDU.from_columns(row) for _ in range(2)]
    exposure = [fits.Column(column.name, column.format, array=column.array[:2048]) for column in columns]
    others += [fits.BinTableHDU.from_columns(exposure) for _ in range(extensions - 3)]
    content = io.BytesIO()
    fits.HDUList([primary, coadd, *others]).writeto(content)
    return content.getvalue()


def make_cutout_bytes(ra: float, dec: float, size: int = 128) -> bytes:
    """A JPEG of a star on a dark, noisy sky, another one at every position."""
    random = np.random.default_rng([int(ra * 1e6), int(abs(dec) * 1e6)])
    y, x = np.mgrid[:size, :size] - size / 2
    star = 200 * np.exp(-(x**2 + y**2) / (size / 16) ** 2)[..., None]
    return _jpeg(Image.fromarray((star + random.uniform(8, 30, (size, size, 3))).astype(np.uint8)))


def make_black_tile(size: int = 128) -> bytes:
    return _jpeg(Image.new("RGB", (size, size)))


def make_error_picture(size: int = 128) -> bytes:
    """What some servers send in place of an error page: words on a white picture."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).text((4, 4), "Requested field\nis not available", fill="black")
    return _jpeg(image)


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


# Answers, and how they are spoilt


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None  # the connection breaks here, whatever Content-Length says
    pause: float = 0.0  # seconds between any two bytes of the body
    hang: float = 0.0  # seconds before anything is sent
    reset: bool = False  # the connection is reset in place of an answer
    endless: bool = False  # the body is sent again and again, without Content-Length


Fault = Callable[[Answer], Answer]  # makes a spoilt answer of the right one


def status(code: int, **headers: str) -> Fault:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: Answer(code, f"<html><body>Error {code}</body></html>".encode(), fields)


def other_body(body: bytes) -> Fault:
    return lambda answer: Answer(body=body)


def truncated(answer: Answer) -> Answer:
    """Fewer bytes than Content-Length promises."""
    return Answer(body=answer.body, cut_at=len(answer.body) // 2)


def short(answer: Answer) -> Answer:
    """A body cut short under a Content-Length that agrees with it."""
    return Answer(body=answer.body[: len(answer.body) // 2])


def reset(answer: Answer) -> Answer:
    return Answer(reset=True)


def endless(answer: Answer) -> Answer:
    return Answer(body=bytes(2**16), endless=True)


def hang(seconds: float) -> Fault:
    return lambda answer: Answer(body=answer.body, hang=seconds)


def trickle(pause: float) -> Fault:
    return lambda answer: Answer(body=answer.body, pause=pause)


# The server


class Request(NamedTuple):
    time: float
    path: str  # with the query
    connection: int
    headers: dict[str, str]


class SdssServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.footprint: dict[tuple[str, str], tuple[float, float]] = {}
        self.catalog: list[dict[str, object]] = []
        self.requests: list[Request] = []
        self.connections = self.open_connections = self.most_open_connections = 0
        self.bytes_sent = 0  # of bodies
        self.script: Callable[[str, int], Fault | None] = lambda path, attempt: None
        self.delay = 0.0
        self.closing = threading.Event()
        self._faults: list[tuple[str, list[Fault]]] = []
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def sas_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{SAS}"

    @property
    def skyserver_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{SKYSERVER}"

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def add(self, star: Star, run2d: str = "26", *, full: bool = False, release: str = "dr16") -> str:
        """Serve a star's spectrum under `run2d`, and the cutout at its position; returns the spectrum's path."""
        if run2d.startswith("v5_"):
            folder = f"eboss/spectro/redux/{run2d}/spectra/{'full' if full else 'lite'}"
        else:
            folder = f"sdss/spectro/redux/{run2d}/spectra{'' if full else '/lite'}"
        path = f"/sas/{release}/{folder}/{star.plate:04d}/spec-{star.spectrum_id}.fits"
        self.files[path] = make_spectrum_bytes(star, extensions=9 if full else 3)  # 9: three exposures by two cameras
        self.footprint[f"{star.ra:.5f}", f"{star.dec:.5f}"] = star.ra, star.dec
        return path

    def list_star(self, star: Star, snr: float, **others: object) -> None:
        """Let queries find a star; `others` are columns of SpecObj."""
        usual = {"class": "STAR", "subClass": star.subclass, "zWarning": 0, "run2d": "26", "snMedian": snr}
        place = {"plate": star.plate, "mjd": star.mjd, "fiberID": star.fiberID, "ra": star.ra, "dec": star.dec}
        self.catalog.append({"specObjID": int(star.name), **place, **usual, **others})

    def fail(self, part_of_path: str, *faults: Fault) -> None:
        self._faults.append((part_of_path, list(faults)))

    def count(self, part_of_path: str) -> int:
        return sum(part_of_path in path for path in self.paths)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed breaks its connections; that is what some tests are about."""

    def answer(self, path: str) -> Answer:
        with self._lock:
            attempt, self._attempts[path] = self._attempts[path], self._attempts[path] + 1
            fault = self.script(path, attempt)
            for part, faults in self._faults:
                if part in path and faults:
                    fault = faults.pop(0)
                    break
        right = self._right_answer(path)
        return fault(right) if fault else right

    def _right_answer(self, path: str) -> Answer:
        parts = urlsplit(path)
        if parts.path in self.files:
            return Answer(body=self.files[parts.path], headers={"Content-Type": "application/fits"})
        if parts.path.endswith("/SkyServerWS/ImgCutout/getjpeg"):
            query = parse_qs(parts.query)
            position = self.footprint.get(tuple(f"{float(query[name][0]):.5f}" for name in ("ra", "dec")))
            if position:
                size = min(max(int(query["width"][0]), 64), 2048)
                return Answer(body=make_cutout_bytes(*position, size), headers={"Content-Type": "image/jpeg"})
        if parts.path.endswith("/SkyServerWS/SearchTools/SqlSearch"):
            query = parse_qs(parts.query)
            assert query["format"] == ["csv"]
            return Answer(body=self._query(query["cmd"][0]).encode(), headers={"Content-Type": "text/plain"})
        return Answer(404, b"<html><body>Not Found</body></html>", {"Content-Type": "text/html"})

    def _query(self, sql: str) -> str:
        """SkyServer's CSV: "#" and the table's name, header, rows; of a rejected query, a table with its error."""
        columns = list(self.catalog[0])
        places = ", ".join("?" * len(columns))
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.execute(f"CREATE TABLE SpecObj (bestObjID, {', '.join(columns)})")
            database.execute("CREATE TABLE PhotoObj (objID, psfMag_u, psfMag_g, psfMag_r, psfMag_i, psfMag_z)")
            for number, row in enumerate(self.catalog):
                database.execute(f"INSERT INTO SpecObj VALUES ({number}, {places})", [row[name] for name in columns])
                database.execute(f"INSERT INTO PhotoObj VALUES ({number}, 22.5, 20.25, 19, 18.5, 18)")
            try:
                # T-SQL limits the rows at the beginning, SQLite at the end.
                answer = database.execute(re.sub(r"(?s)^SELECT TOP (\d+) (.*)$", r"SELECT \2 LIMIT \1", sql.strip()))
                rows = [[column[0] for column in answer.description], *answer]
            except (sqlite3.Error, sqlite3.Warning) as error:
                rows = [["error_message"], [str(error)]]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["#Table1"], *rows])
        return text.getvalue()


class _Handler(BaseHTTPRequestHandler):
    server: SdssServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        server = self.server
        with server._lock:
            server.connections += 1
            server.open_connections += 1
            server.most_open_connections = max(server.most_open_connections, server.open_connections)
            self.connection_number = server.connections

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        with self.server._lock:
            self.server.open_connections -= 1

    def do_GET(self) -> None:
        now = time.monotonic()
        with self.server._lock:
            self.server.requests.append(Request(now, self.path, self.connection_number, dict(self.headers)))
        answer = self.server.answer(self.path)
        self.server.closing.wait(answer.hang + self.server.delay)
        try:
            self.send(answer)
        except OSError:  # the client has gone
            self.close_connection = True

    def send(self, answer: Answer) -> None:
        if answer.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            if not answer.endless:
                self.send_header(name, value)
        self.end_headers()
        body = answer.body[: answer.cut_at]
        with self.server._lock:
            self.server.bytes_sent += len(body)
        piece = 1 if answer.pause else len(body) or 1
        for start in range(0, len(body), piece):
            self.wfile.write(body[start : start + piece])
            self.wfile.flush()
            if self.server.closing.wait(answer.pause):
                break
        while answer.endless and not self.server.closing.is_set():
            self.wfile.write(body)
        self.close_connection |= answer.endless or answer.cut_at is not None

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@contextlib.contextmanager
def running_server() -> Iterator[SdssServer]:
    server = SdssServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


# Stars that the server has, and their downloads


def make_star(number: int = 1, plate: int = 300, run2d: int = 26, subclass: str = "M1", name: str = "") -> Star:
    mjd, fiberID = (51_900 if plate < 3523 else 56_000) + number, number
    name = name or str(encode_spec_obj_id(plate, mjd, fiberID, run2d))
    return Star(name, subclass, plate, mjd, fiberID, 150 + number / 100, number / 50 - 5)


def make_stars(server: SdssServer, count: int) -> dict[Star, str]:
    """Stars that the server has, and the paths of their spectra there."""
    stars = [make_star(number, subclass=CLASS_NAMES[number % 5]) for number in range(1, count + 1)]
    return {star: server.add(star) for star in stars}


def cutout_request(star: Star) -> str:
    position = f"ra={star.ra:.7f}&dec={star.dec:.7f}"
    return f"{SKYSERVER}/ImgCutout/getjpeg?{position}&scale=0.2&width=128&height=128&opt="


def write_catalog(data_dir: Path, stars: list[Star] | dict[Star, str], positions: bool = True) -> None:
    rows = [",".join(map(str, star[: 7 if positions else 5])) for star in stars]
    header = "name,subclass,plate,mjd,fiberID" + ",ra,dec" * positions
    (data_dir / "objects.csv").write_text("\n".join([header, *rows, ""]))


def options_for(data_dir: Path, server: SdssServer, *options: object) -> list[str]:
    urls = ["--sas-url", server.sas_url, "--skyserver-url", server.skyserver_url]
    quick = [] if "--query" in options else ["--image-rate", "1000"]
    return [str(option) for option in ("--data-dir", data_dir, *urls, "--timeout", 5, *quick, *options)]


def failures(data_dir: Path) -> dict[Path, str]:
    """The reasons in download_failures.csv."""
    with open(data_dir / "download_failures.csv", newline="", encoding="utf-8") as file:
        return {data_dir / row["file"]: row["reason"] for row in csv.DictReader(file)}


def contents(data_dir: Path, stars: dict[Star, str], server: SdssServer) -> dict[Path, bytes]:
    """The files that a complete download of these stars has."""
    spectra = {spectrum_path(data_dir, star): server.files[path] for star, path in stars.items()}
    return spectra | {cutout_path(data_dir, s): make_cutout_bytes(s.ra, s.dec) for s in stars}


def written(data_dir: Path) -> dict[Path, bytes]:
    """Everything below the directory but the catalogue and the lock."""
    paths = {path for path in data_dir.rglob("*") if path.is_file()}
    return {path: path.read_bytes() for path in paths - {data_dir / "objects.csv", data_dir / ".download.lock"}}
