"""Fill spectra/ and images/ of a data directory from SDSS DR16, for the stars in its objects.csv.

    python download_sdss_data.py                       all that is missing beside ./objects.csv
    python download_sdss_data.py --data-dir DIR        the same for DIR/objects.csv
    python download_sdss_data.py --dry-run --limit 10  only show what would be fetched for ten stars
    python download_sdss_data.py --full                spectra with every exposure, several times larger

Without a list of stars, let SDSS make one first, with as many stars of each class M0…M4:

    python download_sdss_data.py --query 80 --data-dir DIR                 80 of each class, of any S/N
    python download_sdss_data.py --query 80 --data-dir HIGH --min-snr 10   a set of high S/N
    python download_sdss_data.py --query 80 --data-dir LOW --max-snr 10    a set of low S/N, none of them in the other

The paper uses a set of high and one of low S/N. Where it parts them was not at hand: 10 (median a pixel) is ours.

A file that is there and valid is kept, whatever options it was fetched with; a damaged one is
fetched again. Files appear whole or not at all; after an interruption or a failure, run again.
What the last run could not get stands with its reason in download_failures.csv; when nothing is
missing there is no such file. Exit status: 0 if all files are there, 1 if not, 130 on Ctrl-C.

Sources: paths of the spectra, https://www.sdss.org/dr16/data_access/bulk/ and
https://data.sdss.org/datamodel/files/SPECTRO_REDUX/RUN2D/spectra/lite/PLATE4/spec.html; cutouts and
their limits of 64 and 2048 pixels, and the SQL search, https://skyserver.sdss.org/dr16/en/help/docs/api.aspx.
"""

import argparse
import contextlib
import csv
import html
import http.client
import io
import math
import queue
import re
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

import numpy as np
import requests
import urllib3
from filelock import FileLock, Timeout

import data
from data import CLASS_NAMES, CUTOUT_SCALE, DataError, Spectrum, Star

SAS_URL = "https://data.sdss.org/sas/dr16"
SKYSERVER_URL = "https://skyserver.sdss.org/dr16/SkyServerWS"

# DR16 holds the SDSS-I/II spectra under three run2d, and all BOSS and eBOSS spectra under one.
SDSS_RUN2D = ("26", "104", "103")
BOSS_RUN2D = "v5_13_0"

HEADERS = {
    "User-Agent": f"m-star-classification/1.0 ({requests.utils.default_user_agent()})",
    "Accept-Encoding": "identity",  # the archive's bytes as they are, and no small answer that unpacks to a huge one
}
PASSING_STATUSES = frozenset({408, 429, *range(500, 600)})  # asked again; every other refusal is for good
LONGEST_WAIT = 60  # times --backoff, of our own accord
LONGEST_RETRY_AFTER = 600  # times --backoff, if the server asks for it
LONGEST_ANSWER = 10  # times --timeout, for an answer that keeps trickling in
MAX_REDIRECTS = 5
BELIEVED_ANSWERS = 2  # a black tile or another star's file may be a passing error; a second one is the answer
# A server is given up when so many files in a row, each after all its attempts, could not be had for a passing fault.
HOPELESS_FILES = 8
CHUNK_BYTES = 2**16

# The stars of one class. SpecObj holds the best spectrum of each object; BOSS's subclasses (run2d v5_*) are names of
# templates, mostly giants. The order mixes plates and fibers in a way that is the same every time: a sample from
# the whole sky, where the first rows of the table would come from a few plates.
CATALOG_SQL = """\
SELECT TOP {count} s.specObjID AS name, s.subClass AS subclass, s.plate, s.mjd, s.fiberID, s.ra, s.dec, s.snMedian,
       p.psfMag_u AS u_mag, p.psfMag_g AS g_mag, p.psfMag_r AS r_mag, p.psfMag_i AS i_mag, p.psfMag_z AS z_mag
FROM SpecObj AS s JOIN PhotoObj AS p ON p.objID = s.bestObjID
WHERE s.class = 'STAR' AND s.subClass = '{subclass}' AND s.zWarning = 0 AND s.run2d = '26'{snr}
ORDER BY (s.plate * 7919 + s.fiberID * 104729) % 1000003, s.specObjID
"""
CATALOG_COLUMNS = (
    "name", "subclass", "plate", "mjd", "fiberID", "ra", "dec", "snMedian", "u_mag", "g_mag", "r_mag", "i_mag", "z_mag"
)  # fmt: skip

FAILURES_FILE = "download_failures.csv"
FAILURE_COLUMNS = ("name", "subclass", "plate", "mjd", "fiberID", "file", "url", "reason")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = data.ScriptParser(__doc__, usage="%(prog)s [--data-dir DIR] [options]")
    add = parser.add_argument
    # The service clips other sizes in silence.
    size, positive = data.number_between(int, *data.CUTOUT_SIZES), data.number_between(float, 1e-3, 1e3)
    add("--data-dir", type=Path, default=Path("."), metavar="DIR", help="holds objects.csv, gets spectra/ and images/")
    add(
        "--workers",
        type=data.number_between(int, 1, 64),
        default=4,
        metavar="N",
        help="most connections to each server",
    )
    # No limit of the cutout service is published; SkyServer's SQL search allows 60 queries a minute.
    add("--image-rate", type=positive, default=1.0, metavar="R", help="most cutouts asked for in a second")
    add("--limit", type=data.number_between(int, 1, 10**9), metavar="N", help="only the first N stars of the catalogue")
    add("--dry-run", action="store_true", help="print what would be fetched, write nothing")
    add("--query", type=data.number_between(int, 1, 50_000), metavar="N",
        help="fetch no files: write objects.csv, N stars of each class, and their SQL into objects.sql")  # fmt: skip
    add("--min-snr", type=data.number_between(float, 0, 1e4), metavar="X", help="--query: median S/N of X or more")
    add("--max-snr", type=data.number_between(float, 0, 1e4), metavar="X", help="--query: median S/N below X")
    add("--full", action="store_true", help="full spectra, with every exposure, in place of lite ones")
    add("--image-size", type=size, default=data.IMAGE_SIZE, metavar="N", help="pixels a side of a cutout")
    add("--image-scale", type=positive, default=CUTOUT_SCALE, metavar="S", help="arcsec a pixel of a cutout")
    add(
        "--retries",
        type=data.number_between(int, 0, 100),
        default=5,
        metavar="N",
        help="further attempts after a passing fault",
    )
    add("--backoff", type=positive, default=1.0, metavar="S",
        help=f"seconds to the first retry, doubled at each further one up to {LONGEST_WAIT} times this")  # fmt: skip
    add("--timeout", type=positive, default=30.0, metavar="S",
        help=f"longest silence of a server in seconds; a whole answer may take {LONGEST_ANSWER}-fold")  # fmt: skip
    add("--sas-url", type=_http_url, default=SAS_URL, metavar="URL", help="archive of the spectra, or a mirror of it")
    add("--skyserver-url", type=_http_url, default=SKYSERVER_URL, metavar="URL", help="cutouts, queries, or a mirror")
    parser.add_quiet()
    args = parser.parse_args(argv)
    if args.query is None and (args.min_snr, args.max_snr) != (None, None):
        parser.error("--min-snr and --max-snr choose stars for --query")
    if args.min_snr is not None and args.max_snr is not None and args.min_snr >= args.max_snr:
        parser.error("--min-snr must lie below --max-snr")
    return args


def _http_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment):
            return text.rstrip("/")
    raise argparse.ArgumentTypeError(f"{text!r} is not an http:// or https:// address")


# What to fetch, and from where


def run2d_in_name(star: Star) -> str | None:
    """The run2d in the star's name, if that is the specObjID of this very spectrum."""
    decoded = data.decode_spec_obj_id(star.name)
    return decoded[3] if decoded and decoded[:3] == (star.plate, star.mjd, star.fiberID) else None


def run2d_candidates(star: Star) -> tuple[str, ...]:
    """The run2d under which DR16 holds the spectrum: one, unless neither name nor plate settles it."""
    run2d = run2d_in_name(star)
    if run2d in SDSS_RUN2D:
        return (run2d,)
    # A list made from another release names another v5; DR16 has all these spectra as v5_13_0.
    if (run2d and run2d.startswith("v5_")) or star.plate >= data.FIRST_BOSS_PLATE:
        return (BOSS_RUN2D,)
    return SDSS_RUN2D if star.plate >= data.FIRST_PLATE_BEYOND_26 else SDSS_RUN2D[:1]


def spectrum_url(star: Star, run2d: str, *, full: bool = False, sas_url: str = SAS_URL) -> str:
    if run2d == BOSS_RUN2D:
        folder = f"eboss/spectro/redux/{run2d}/spectra/{'full' if full else 'lite'}"
    else:
        folder = f"sdss/spectro/redux/{run2d}/spectra{'' if full else '/lite'}"
    return f"{sas_url}/{folder}/{star.plate:04d}/spec-{star.spectrum_id}.fits"


def cutout_url(
    ra: float,
    dec: float,
    *,
    size: int = data.IMAGE_SIZE,
    scale: float = CUTOUT_SCALE,
    skyserver_url: str = SKYSERVER_URL,
) -> str:
    query = {"ra": f"{ra:.7f}", "dec": f"{dec:.7f}", "scale": f"{scale:g}", "width": size, "height": size, "opt": ""}
    return f"{skyserver_url}/ImgCutout/getjpeg?{urlencode(query)}"


class File(NamedTuple):
    """A file to fetch. `urls` are tried in turn while they answer 404; a cutout of unknown position has none."""

    star: Star
    kind: str  # "spectrum" or "cutout"
    path: Path
    urls: tuple[str, ...]


def spectrum_file(star: Star, args: argparse.Namespace) -> File:
    urls = (spectrum_url(star, run2d, full=args.full, sas_url=args.sas_url) for run2d in run2d_candidates(star))
    return File(star, "spectrum", data.spectrum_path(args.data_dir, star), tuple(urls))


def cutout_file(star: Star, spectrum: Spectrum | None, args: argparse.Namespace) -> File:
    """The star's cutout, at the catalogue's position or else at that in its spectrum."""
    options = {"size": args.image_size, "scale": args.image_scale, "skyserver_url": args.skyserver_url}
    positions = [(source.ra, source.dec) for source in (star, spectrum) if source is not None]
    urls = [cutout_url(ra, dec, **options) for ra, dec in positions if math.isfinite(ra) and math.isfinite(dec)]
    return File(star, "cutout", data.cutout_path(args.data_dir, star), tuple(urls[:1]))


def survey_files(stars: list[Star], args: argparse.Namespace) -> tuple[set[Path], list[File]]:
    """The stars' files that are there and valid, and those to fetch."""
    there: set[Path] = set()
    missing: dict[Path, File] = {}  # by path: rows of one name and class share their cutout
    other_sizes = 0
    for star in data.progress(stars, desc="checking files", unit="star"):
        spectrum, file = None, spectrum_file(star, args)
        try:
            spectrum = data.read_spectrum(file.path, star)
            there.add(file.path)
        except DataError:
            missing[file.path] = file
        file = cutout_file(star, spectrum, args)
        try:
            other_sizes += len(data.read_cutout(file.path).pixels) != args.image_size
            there.add(file.path)
        except DataError:
            if file.path not in missing or not missing[file.path].urls:  # the first row that knows the position
                missing[file.path] = file
    if other_sizes:
        print(f"cutouts there of another size than {args.image_size} pixels, kept: {other_sizes}")
    if damaged := sum(path.exists() for path in missing):
        print(f"damaged files there, to be fetched again: {damaged}")
    return there, list(missing.values())


# Fetching


class FetchError(Exception):
    """Why a file was not got; `status` is the HTTP status if that is the reason, else 0; `wrong_file`: a whole file
    came, but not the one that is wanted."""

    def __init__(self, reason: str, status: int = 0, retry_after: str = "", *, wrong_file: bool = False) -> None:
        super().__init__(" ".join(reason.split())[:500])  # part of it may be the server's text
        self.status = status
        self.retry_after = retry_after
        self.wrong_file = wrong_file

    @property
    def may_pass(self) -> bool:
        return self.status in (0, *PASSING_STATUSES) and not self.wrong_file


def waiting_time(attempt: int, backoff: float, retry_after: str = "") -> float:
    """Seconds to wait after attempt 0, 1, …; `retry_after` is the header of that name: seconds, a date or nothing."""
    try:
        asked_for = urllib3.Retry().parse_retry_after(retry_after)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        asked_for = 0
    own = min(backoff * 2**attempt, backoff * LONGEST_WAIT)
    return max(own, min(asked_for, backoff * LONGEST_RETRY_AFTER))


class Pacer:
    """Lets threads pass `wait` one by one, at most `rate` a second."""

    def __init__(self, rate: float) -> None:
        self.interval = 1 / rate
        self.next_turn = 0.0
        self.lock = threading.Lock()

    def wait(self) -> None:
        with self.lock:
            turn = max(self.next_turn, time.monotonic())
            self.next_turn = turn + self.interval
        time.sleep(max(0.0, turn - time.monotonic()))


# An answer is bounded in size and time where its bytes come in, headers and chunk sizes included: `timeout` alone
# counts each silence anew, in which a server may send the next byte of its headers for ever.


class BoundedReader(io.RawIOBase):
    """What a socket receives of one answer."""

    def __init__(self, received: io.RawIOBase, seconds: float) -> None:
        self.received = received
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.bytes_left = data.MAX_FILE_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:
        if time.monotonic() > self.deadline:
            raise FetchError(f"not whole after {self.seconds:g} s")
        count = self.received.readinto(buffer)
        self.bytes_left -= count or 0
        if self.bytes_left < 0:
            reason = f"more than {data.MAX_FILE_BYTES} bytes, too many for a file of one star"
            raise FetchError(reason, wrong_file=True)
        return count

    def close(self) -> None:
        self.received.close()
        super().close()


class BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(BoundedReader(self.fp.detach(), LONGEST_ANSWER * sock.gettimeout()))


class BoundedHTTPConnection(urllib3.connection.HTTPConnection):
    response_class = BoundedResponse


class BoundedHTTPSConnection(urllib3.connection.HTTPSConnection):
    response_class = BoundedResponse


class BoundedAdapter(requests.adapters.HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> urllib3.HTTPConnectionPool:
        pool = super().get_connection_with_tls_context(*args, **options)
        pool.ConnectionCls = BoundedHTTPSConnection if pool.scheme == "https" else BoundedHTTPConnection
        return pool


class Session(requests.Session):
    """Keeps its connections, bounds its answers, and is not led from https to an address without encryption."""

    def __init__(self) -> None:
        super().__init__()
        self.headers.update(HEADERS)
        self.max_redirects = MAX_REDIRECTS
        for scheme in ("http://", "https://"):
            self.mount(scheme, BoundedAdapter())

    def get_redirect_target(self, response: requests.Response) -> str | None:
        target = super().get_redirect_target(response)
        if target is not None:
            response.close()  # requests would read and unpack its body first, a small one that becomes a huge one, too
            if response.url.startswith("https:") and not urljoin(response.url, target).startswith("https:"):
                raise FetchError("redirected from https to an address without encryption", response.status_code)
        return target


def get(session: requests.Session, url: str, timeout: float, *, read_errors: bool = False) -> bytes:
    """The whole body of a GET, bounded in size and time. Raises FetchError, with an error page's words if asked to."""
    body = bytearray()
    try:
        # An error leaves the block, which closes the connection: an error page is not read unless it is asked for.
        with session.get(url, stream=True, timeout=timeout) as response:
            while response.status_code == 200 or read_errors:
                # Nothing is unpacked: we ask for the bytes as they are, and a few can unpack to more than fits.
                chunk = response.raw.read(CHUNK_BYTES, decode_content=False)
                if not chunk:
                    break
                body += chunk
            if response.status_code != 200:
                reason = f"HTTP {response.status_code} {response.reason or ''} {page_text(bytes(body))}"
                raise FetchError(reason, response.status_code, response.headers.get("Retry-After", ""))
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise FetchError(f"no answer within {timeout:g} s") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:  # the innermost says it in the fewest words
            cause = inner
        raise FetchError(f"connection failed or broken ({type(cause).__name__}: {cause})") from None
    return bytes(body)


def page_text(body: bytes) -> str:
    """What a page says, without its tags."""
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", body.decode("utf-8", errors="replace"))
    return " ".join(html.unescape(text).split())


def retry(fetch: Callable[[], Any], args: argparse.Namespace) -> Any:
    """What `fetch` returns, after further attempts if it raises a FetchError that may pass."""
    # One loop for every passing fault, in place of urllib3's retries: it covers broken and useless bodies
    # too, lets the pacer count each attempt, and does not read error pages to their end as they do.
    wrong_files = 0
    for attempt in range(args.retries + 1):
        try:
            return fetch()
        except FetchError as error:
            failure = error
        wrong_files += failure.wrong_file
        if wrong_files == BELIEVED_ANSWERS or not (failure.may_pass or failure.wrong_file):
            break
        if attempt < args.retries:
            time.sleep(waiting_time(attempt, args.backoff, failure.retry_after))
    raise failure


class Downloader:
    """Worker threads, each with a session of its own, that take files from two queues.

    Each file ends up in `results`, with the reason for its failure or None; an exception there is
    one that ends the whole run.
    """

    def __init__(self, files: list[File], args: argparse.Namespace) -> None:
        self.args = args
        self.spectra = deque(file for file in files if file.kind == "spectrum")
        self.cutouts: deque[File] = deque()
        self.waiting: dict[Path, File] = {}  # cutouts whose position comes with a spectrum, by the spectrum's path
        self.results: queue.SimpleQueue[tuple[File, str | None] | Exception] = queue.SimpleQueue()
        self.pacer = Pacer(args.image_rate)
        self.writing = threading.Lock()
        self.counting = threading.Lock()
        self.failed_in_a_row = Counter(spectrum=0, cutout=0)
        to_come = {file.path for file in self.spectra}
        for file in files:
            spectrum_path = data.spectrum_path(args.data_dir, file.star)
            if file.kind == "cutout" and not file.urls and spectrum_path in to_come:
                self.waiting[spectrum_path] = file
            elif file.kind == "cutout":
                self.cutouts.append(file)

    def start(self) -> None:
        # Daemons: a thread that waits for a server or for its turn does not hold up the exit on Ctrl-C.
        for index in range(self.args.workers):
            threading.Thread(target=self._work, args=(index == 1,), daemon=True).start()

    def stop(self) -> None:
        """Let the file that is being written become whole, and no other begin."""
        self.spectra.clear()
        self.cutouts.clear()
        self.writing.acquire()

    def _work(self, cutouts_first: bool) -> None:
        try:
            with Session() as session:
                while file := self._next(cutouts_first):
                    content, reason = self._fetch(session, file)
                    if file.path in self.waiting:
                        self.cutouts.append(cutout_file(file.star, content, self.args))
                    self.results.put((file, reason))
        except Exception as error:  # nothing is swallowed: the main thread raises it
            self.results.put(error)

    def _next(self, cutouts_first: bool) -> File | None:
        # One worker keeps to the paced cutouts while the others let the spectra flow; then all take what is left.
        for files in (self.cutouts, self.spectra) if cutouts_first else (self.spectra, self.cutouts):
            with contextlib.suppress(IndexError):
                return files.popleft()
        return None

    def _fetch(self, session: requests.Session, file: File) -> tuple[Spectrum | np.ndarray | None, str | None]:
        """Fetch a file from the first of its URLs that has it; returns (content, None) or (None, reason)."""
        reason = "no position: neither ra, dec in the catalogue nor PLUG_RA, PLUG_DEC in a spectrum"
        for url in file.urls:
            if self.failed_in_a_row[file.kind] >= HOPELESS_FILES:
                return None, f"not asked for: the server gave none of the {HOPELESS_FILES} files before"
            try:
                content = self._fetch_from(url, session, file)
                self._count(file.kind, failed=False)
                return content, None
            except FetchError as error:
                self._count(file.kind, failed=error.may_pass)
                reason = str(error)
                if error.status != 404:
                    break
        return None, reason

    def _count(self, kind: str, *, failed: bool) -> None:
        with self.counting:
            # A server that has been given up stays so, whatever comes of what others have asked for.
            if self.failed_in_a_row[kind] < HOPELESS_FILES:
                self.failed_in_a_row[kind] = self.failed_in_a_row[kind] + 1 if failed else 0

    def _fetch_from(self, url: str, session: requests.Session, file: File) -> Spectrum | np.ndarray:
        def fetch() -> Spectrum | np.ndarray:
            if file.kind == "cutout":
                self.pacer.wait()
            return self._save(get(session, url, self.args.timeout), file)

        return retry(fetch, self.args)

    def _save(self, body: bytes, file: File) -> Spectrum | np.ndarray:
        """Write and check a file. Raises FetchError if it is no good, DataError if nothing can be written."""
        try:
            # One at a time: `stop` relies on it.
            with self.writing, data.write_atomically(file.path) as temporary:
                temporary.write_bytes(body)
                try:
                    if file.kind == "spectrum":
                        return data.read_spectrum(temporary, file.star)
                    return data.read_cutout(temporary, self.args.image_size)
                except DataError as error:
                    # What follows a semicolon is advice to someone who has the file.
                    reason = str(error).removeprefix(f"{temporary}: ").partition("; ")[0]
                    raise FetchError(reason, wrong_file=isinstance(error, data.WrongFileError)) from None
        except OSError as error:
            raise DataError(f"{file.path}: cannot be written ({error.strerror or error})") from error


def fetch_files(files: list[File], args: argparse.Namespace) -> list[tuple[File, str]]:
    """Fetch the files; returns those that could not be had, with the reasons."""
    failures: list[tuple[File, str]] = []
    counts = Counter(spectrum=0, cutout=0, failed=0)
    downloader = Downloader(files, args)
    downloader.start()
    try:
        with data.progress(total=len(files), desc="fetching", unit="file", disable=not files) as progress:
            for _ in files:
                result = downloader.results.get()
                if isinstance(result, Exception):
                    raise result
                file, reason = result
                if reason:
                    failures.append((file, reason))
                    if len(failures) == 1:  # why, long before the report at the end
                        progress.write(f"{file.path}: {reason}")
                counts["failed" if reason else file.kind] += 1
                progress.set_postfix(counts, refresh=False)
                progress.update()
    finally:
        downloader.stop()
    return sorted(failures)


# A catalogue from SDSS


def catalog_sql(subclass: str, count: int, min_snr: float | None, max_snr: float | None) -> str:
    limits = [(">=", min_snr), ("<", max_snr)]
    snr = "".join(f" AND s.snMedian {sign} {limit:g}" for sign, limit in limits if limit is not None)
    return CATALOG_SQL.format(count=count, subclass=subclass, snr=snr)


def query_sdss(sql: str, session: requests.Session, args: argparse.Namespace) -> list[list[str]]:
    """The rows that answer a query. Raises DataError with SDSS's own words if it rejects the query."""
    url = f"{args.skyserver_url}/SearchTools/SqlSearch?{urlencode({'cmd': sql, 'format': 'csv'})}"
    one_line = " ".join(sql.split())

    def fetch() -> list[list[str]]:
        body = get(session, url, LONGEST_ANSWER * args.timeout, read_errors=True)
        lines = body.decode("utf-8", errors="replace").splitlines()
        if lines and lines[0].startswith("#"):  # "#Table1"
            del lines[0]
        header, *rows = csv.reader(lines) if lines else [[]]
        # A rejected query comes under status 200 too: as a page, or as a table of its own.
        if tuple(header) != CATALOG_COLUMNS:
            words = " ".join(lines[1:]) if "error_message" in header else page_text(body)
            raise DataError(f"SDSS rejected the query: {words[:2000] or '(an empty answer)'}; the query: {one_line}")
        if any(len(row) != len(CATALOG_COLUMNS) for row in rows):
            raise FetchError("an answer with a row cut short")
        return rows

    try:
        return retry(fetch, args)
    except FetchError as error:
        raise DataError(f"SDSS gives no stars: {error}; the query: {one_line}") from None


def write_catalog(args: argparse.Namespace) -> None:
    """--query: objects.csv, the classes by turns so that --limit takes some of each, and objects.sql."""
    queries = [catalog_sql(subclass, args.query, args.min_snr, args.max_snr) for subclass in CLASS_NAMES]
    if args.dry_run:
        print("\n".join(queries))
        return
    path = data.catalog_path(args.data_dir)
    sql_path = path.with_suffix(".sql")
    with only_download_into(args.data_dir):
        for there in (path, sql_path):
            if there.exists():
                raise DataError(f"{there} is there already, and --query replaces none; give another --data-dir")
        answers = []
        with Session() as session:
            for subclass, sql in zip(CLASS_NAMES, data.progress(queries, desc="asking", unit="query"), strict=True):
                answers.append(query_sdss(sql, session, args)[: args.query])
                if len(answers[-1]) < args.query:
                    raise DataError(
                        f"SDSS has only {len(answers[-1])} {subclass} stars of this S/N: ask for no more with --query"
                    )
        with data.write_atomically(path) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(CATALOG_COLUMNS)
                writer.writerows(row for by_class in zip(*answers, strict=True) for row in by_class)
            stars, left_out = data.read_catalog(temporary)
            if left_out:
                raise DataError(f"SDSS answered with stars that were not asked for: {dict(left_out)}")
        with data.write_atomically(sql_path) as temporary:
            temporary.write_text(f"-- {args.skyserver_url}, {date.today()}\n\n" + "\n".join(queries), encoding="utf-8")
    print(f"{path}: {len(stars)} stars, {args.query} of each class; the SQL is in {sql_path}")
    print(f"Next: python download_sdss_data.py --data-dir {args.data_dir}")


# The run and its report


def read_stars(args: argparse.Namespace) -> list[Star]:
    path = data.catalog_path(args.data_dir)
    stars, left_out = data.read_catalog(path)
    if any(star.simulated for star in stars):
        raise DataError(f"{path}: lists simulated stars; SDSS has no files of them")
    print(f"{path}: {len(stars)} stars" + (f", of which the first {args.limit}" if args.limit else ""))
    for reason, count in left_out.items():
        print(f"  rows left out: {count} ({reason})")
    stars = stars[: args.limit]
    at_odds = [star for star in stars if data.decode_spec_obj_id(star.name) and not run2d_in_name(star)]
    if at_odds:
        plate, mjd, fiberID, _ = data.decode_spec_obj_id(at_odds[0].name)
        print(
            f"  names that are the specObjID of another spectrum than plate, mjd, fiberID: {len(at_odds)}; the columns "
            f"are used (e.g. {at_odds[0].name} is {plate}-{mjd}-{fiberID}, they say {at_odds[0].spectrum_id})"
        )
    return stars


def print_table(stars: list[Star], there: set[Path], data_dir: Path) -> None:
    print(f"\n{'class':8}{'stars':>8}{'spectra':>10}{'cutouts':>10}{'complete':>10}")
    for name in (*CLASS_NAMES, "all"):
        members = [star for star in stars if name in (star.subclass, "all")]
        spectra = [data.spectrum_path(data_dir, star) in there for star in members]
        cutouts = [data.cutout_path(data_dir, star) in there for star in members]
        complete = sum(both == (True, True) for both in zip(spectra, cutouts, strict=True))
        print(f"{name:8}{len(members):8}{sum(spectra):10}{sum(cutouts):10}{complete:10}")


def report_failures(failures: list[tuple[File, str]], data_dir: Path) -> None:
    """Print how many files failed for which reason, and list them in the failures file."""
    # What differs from file to file stands in parentheses.
    reasons = Counter(f"{file.kind}: {reason.partition(' (')[0]}" for file, reason in failures)
    for reason, count in reasons.most_common():
        print(f"{count:6} missing, {reason}")
    path = data_dir / FAILURES_FILE
    with data.write_atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as csv_file:
        writer = csv.writer(csv_file)
        writer.writerow(FAILURE_COLUMNS)
        for file, reason in failures:
            writer.writerow([*file.star[:5], file.path.relative_to(data_dir).as_posix(), " ".join(file.urls), reason])
    print(f"Files missing: {len(failures)}, listed in {path}. Run again to try them again.")


@contextlib.contextmanager
def only_download_into(data_dir: Path) -> Iterator[None]:
    """Keep other downloads out of the directory, and clear away what a killed one left half-written."""
    try:
        with FileLock(data_dir / ".download.lock", timeout=0):
            for folder in data_dir.glob("spectra/*"):
                data.remove_leftovers(folder / "*.fits")
            for folder in data_dir.glob("images/*"):
                data.remove_leftovers(folder / "*.jpg")
            data.remove_leftovers(data_dir / FAILURES_FILE)
            yield
    except Timeout:
        raise DataError(f"another download into {data_dir} is running; wait for its end") from None


def download(args: argparse.Namespace) -> None:
    stars = read_stars(args)
    with contextlib.nullcontext() if args.dry_run else only_download_into(args.data_dir):
        there, missing = survey_files(stars, args)
        cutouts = sum(file.kind == "cutout" for file in missing)
        print(f"files there: {len(there)}; to fetch: {len(missing) - cutouts} spectra, {cutouts} cutouts")
        if cutouts > 60 * args.image_rate:
            print(f"at {args.image_rate:g} cutouts a second that takes {cutouts / args.image_rate / 60:.0f} minutes")
        if args.dry_run:
            for file in missing:
                print(f"{' or '.join(file.urls) or '(cutout at the position in the spectrum)'} -> {file.path}")
            return
        (args.data_dir / FAILURES_FILE).unlink(missing_ok=True)  # an earlier run's, true no longer
        failures = fetch_files(missing, args)
        there.update({file.path for file in missing} - {file.path for file, _ in failures})
        print_table(stars, there, args.data_dir)
        if failures:
            report_failures(failures, args.data_dir)
            sys.exit(1)
    print(
        "All files of these stars are there. Next: python train.py"
        + f" --data-dir {args.data_dir}" * (args.data_dir != Path("."))
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with data.quietly(args.quiet):
        if args.query:
            write_catalog(args)
        else:
            download(args)


if __name__ == "__main__":
    data.run_as_script(main)
