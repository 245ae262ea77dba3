"""SDSS's two servers: where spectra and cutouts lie, HTTP with retries and limits, and the SQL search for stars.

Sources: paths of the spectra, https://www.sdss.org/dr16/data_access/bulk/ and
https://data.sdss.org/datamodel/files/SPECTRO_REDUX/RUN2D/spectra/lite/PLATE4/spec.html; cutouts and
SQL search, https://skyserver.sdss.org/dr16/en/help/docs/api.aspx.
"""

import contextlib
import csv
import html
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests
import urllib3

from catalog import FIRST_BOSS_PLATE, FIRST_PLATE_BEYOND_26, Star, decode_spec_obj_id
from cli import DataError, printable
from survey_files import CUTOUT_SCALE, IMAGE_SIZE, MAX_FILE_BYTES

SAS_URL = "https://data.sdss.org/sas/dr16"
SKYSERVER_URL = "https://skyserver.sdss.org/dr16/SkyServerWS"
DEFAULT_RELEASE = "dr16"

# A release holds the SDSS-I/II spectra under three run2d, and all BOSS and eBOSS spectra under its own.
SDSS_RUN2D = ("26", "104", "103")
BOSS_RUN2D = {"dr16": "v5_13_0", "dr17": "v5_13_2"}

HEADERS = {
    "User-Agent": f"m-star-classification/1.0 ({requests.utils.default_user_agent()})",
    "Accept-Encoding": "identity",  # no compression: a small body could unpack to any size
}
RETRYABLE_STATUSES = frozenset({408, 429, *range(500, 600)})
BACKOFF_FACTOR = 1.0  # waits before the retries: 0, 2, 4, 8, … s
MAX_BACKOFF = 60  # seconds
MAX_RETRY_AFTER = 300  # seconds, if the server asks for a pause
MAX_ANSWER_TIME = 10  # times the timeout: a body that keeps trickling in
MAX_PAGE_BYTES = 2**16  # read of an error page
PAGE_LENGTH = 200  # characters of it that are shown
SQL_PAGE_LENGTH = 2000  # SkyServer's may repeat the query before they say anything about it
CHUNK_BYTES = 2**16

# SpecObj holds the best spectrum of each object; run2d 26 leaves out BOSS, whose subclasses are names of templates,
# mostly giants. The order mixes plates and fibers reproducibly: a sample from the whole sky, where the first rows of
# the table would come from a few plates.
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


# Addresses


def release_of(url: str) -> str:
    """The release in a server's address: "dr17" of https://data.sdss.org/sas/dr17; DR16 where it names none."""
    releases = re.findall(r"/(dr\d+)(?=/|$)", urlsplit(url).path.lower())
    return releases[-1] if releases else DEFAULT_RELEASE


def run2d_in_name(star: Star) -> str | None:
    """The run2d in the star's name, if that is the specObjID of this very spectrum."""
    decoded = decode_spec_obj_id(star.name)
    return decoded[3] if decoded and decoded[:3] == (star.plate, star.mjd, star.fiberID) else None


def run2d_candidates(star: Star, release: str = DEFAULT_RELEASE) -> tuple[str, ...]:
    """The run2d under which the release holds the spectrum: one, unless neither name nor plate settles it."""
    run2d = run2d_in_name(star)
    if run2d in SDSS_RUN2D:
        return (run2d,)
    # Another v5 in a name is of another release; this one holds all BOSS spectra under its own run2d.
    if (run2d and run2d.startswith("v")) or star.plate >= FIRST_BOSS_PLATE:
        return (BOSS_RUN2D[release],)
    return SDSS_RUN2D if star.plate >= FIRST_PLATE_BEYOND_26 else SDSS_RUN2D[:1]


def later_release(star: Star, sas_url: str) -> str | None:
    """A sentence about a star whose specObjID names a run2d after that of the archive's release; else None."""
    run2d, release = run2d_in_name(star) or "", release_of(sas_url)
    version, newest = ([int(number) for number in re.findall(r"\d+", name)] for name in (run2d, BOSS_RUN2D[release]))
    if run2d.startswith("v") and version > newest:
        return f"its specObjID names {run2d}, a release after {release.upper()}"
    return None


def spectrum_urls(star: Star, sas_url: str = SAS_URL, *, full: bool = False) -> tuple[str, ...]:
    """Addresses of a star's spectrum, to be tried in turn while they answer 404."""
    urls = []
    for run2d in run2d_candidates(star, release_of(sas_url)):
        if run2d in SDSS_RUN2D:
            folder = f"sdss/spectro/redux/{run2d}/spectra{'' if full else '/lite'}"
        else:
            folder = f"eboss/spectro/redux/{run2d}/spectra/{'full' if full else 'lite'}"
        urls.append(f"{sas_url}/{folder}/{star.plate:04d}/spec-{star.spectrum_id}.fits")
    return tuple(urls)


def cutout_url(ra: float, dec: float, skyserver_url: str = SKYSERVER_URL) -> str:
    """Address of the cutout of the 25.6″ field around a position in degrees (J2000)."""
    query = {"ra": f"{ra:.7f}", "dec": f"{dec:.7f}", "scale": CUTOUT_SCALE, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
    return f"{skyserver_url}/ImgCutout/getjpeg?{urlencode(query)}&opt="


# HTTP


class FetchError(Exception):
    """A file could not be fetched; the message says why, in one line. `status`: HTTP status, 0 if there was none.

    `is_transient`: a later attempt may succeed; otherwise the answer is final.
    """

    def __init__(self, reason: str, status: int = 0, *, is_transient: bool) -> None:
        super().__init__(printable(" ".join(reason.split())))  # part of it may be the server's text
        self.status = status
        self.is_transient = is_transient


class BadBodyError(FetchError):
    """The body of a response is cut off, damaged or of another file: worth a retry."""


class PoliteRetry(urllib3.Retry):
    """Heeds Retry-After up to MAX_RETRY_AFTER; one that cannot be read counts as none."""

    def parse_retry_after(self, retry_after: str) -> float:
        try:
            return min(super().parse_retry_after(retry_after), MAX_RETRY_AFTER)
        except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
            return 0


class Pacer:
    """Lets threads pass `wait` one by one, at most `rate` a second."""

    def __init__(self, rate: float) -> None:
        self.interval = 1 / rate
        self.next_turn = 0.0
        self.lock = threading.Lock()

    def wait(self) -> None:
        with self.lock:
            time.sleep(max(0.0, self.next_turn - time.monotonic()))
            self.next_turn = time.monotonic() + self.interval


def open_session(retries: int) -> requests.Session:
    """A session that retries transient failures of the connection or the server, with exponential back-off."""
    retry = PoliteRetry(
        total=retries,
        status_forcelist=RETRYABLE_STATUSES,
        backoff_factor=BACKOFF_FACTOR,
        backoff_max=MAX_BACKOFF,
        raise_on_status=False,  # the last answer is returned, whose page may say why
    )
    session = requests.Session()
    session.headers.update(HEADERS)
    for scheme in ("https://", "http://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    return session


def get(session: requests.Session, url: str, timeout: float, page_length: int = PAGE_LENGTH) -> bytes:
    """The body of a GET, limited in size and time; `timeout` is the longest silence in seconds.

    Raises BadBodyError if the body is cut off, FetchError if there is none, with up to `page_length`
    characters of an error page.
    """
    try:
        response = session.get(url, stream=True, timeout=timeout)
    except requests.RequestException as error:
        raise FetchError(_describe(error, timeout), is_transient=True) from None
    with response:
        if response.status_code == 200:
            body = _read(response, timeout, MAX_FILE_BYTES)
            if len(body) > MAX_FILE_BYTES:
                raise FetchError(f"more than {MAX_FILE_BYTES} bytes, too many for one star", is_transient=False)
            return body
        reason = f"HTTP {response.status_code} {response.reason or ''}"
        with contextlib.suppress(BadBodyError):
            if words := page_text(_read(response, timeout, MAX_PAGE_BYTES), page_length):
                reason += f" ({words})"
        is_transient = response.status_code in RETRYABLE_STATUSES
        raise FetchError(reason, response.status_code, is_transient=is_transient)


def _read(response: requests.Response, timeout: float, max_bytes: int) -> bytes:
    """The body, or its beginning if it has more than `max_bytes`."""
    seconds = MAX_ANSWER_TIME * timeout
    deadline = time.monotonic() + seconds
    body = bytearray()
    try:
        # read1 returns what has come, so that the deadline holds for a body of single bytes, too.
        while len(body) <= max_bytes and (chunk := response.raw.read1(CHUNK_BYTES, decode_content=False)):
            body += chunk
            if time.monotonic() > deadline:
                raise BadBodyError(f"not whole after {seconds:g} s", is_transient=True)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise BadBodyError(_describe(error, timeout), is_transient=True) from None
    return bytes(body)


def _describe(error: BaseException, timeout: float) -> str:
    while inner := error.__cause__ or error.__context__:  # the innermost says it in the fewest words
        error = inner
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    return f"connection failed or broken ({type(error).__name__}: {error})"


def page_text(body: bytes, length: int = PAGE_LENGTH) -> str:
    """The first words of a page, without its tags; "" if the body is no text."""
    if b"\0" in body or body.startswith(b"SIMPLE"):  # a picture, or (the beginning of) a FITS file
        return ""
    text = body[:MAX_PAGE_BYTES].decode("utf-8", errors="replace")
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text)
    text = " ".join(html.unescape(text).split())
    return text if len(text) <= length else text[:length] + "…"


def ask_again(ask: Callable[[], Any], retries: int) -> Any:
    """Call `ask`, again if it raises BadBodyError, and return its result.

    The session's own retries end with the headers of a response; these are for its body. A wrong file
    may be a passing error; if it comes twice, it is final.
    """
    for attempt in range(retries):
        try:
            return ask()
        except BadBodyError as error:
            if attempt and not error.is_transient:
                raise
        time.sleep(min(BACKOFF_FACTOR * 2**attempt, MAX_BACKOFF) if attempt else 0)  # as the session does
    return ask()


# The SQL search


def catalog_sql(subclass: str, count: int, min_snr: float | None, max_snr: float | None) -> str:
    """The query for `count` stars of a class, with min_snr <= median S/N < max_snr."""
    limits = [(">=", min_snr), ("<", max_snr)]
    snr = "".join(f" AND s.snMedian {sign} {limit:g}" for sign, limit in limits if limit is not None)
    return CATALOG_SQL.format(count=count, subclass=subclass, snr=snr)


def query_sdss(
    session: requests.Session, sql: str, *, skyserver_url: str, timeout: float, retries: int
) -> list[list[str]]:
    """The rows of CATALOG_COLUMNS that answer a query. Raises DataError with SDSS's message if it refuses the query."""
    url = f"{skyserver_url}/SearchTools/SqlSearch?{urlencode({'cmd': sql, 'format': 'csv'})}"
    one_line = " ".join(sql.split())

    def ask() -> list[list[str]]:
        # SkyServer lets a query run for up to ten minutes before it answers.
        rows = _parse_answer(get(session, url, MAX_ANSWER_TIME * timeout, SQL_PAGE_LENGTH), one_line)
        if any(len(row) != len(CATALOG_COLUMNS) for row in rows):
            raise BadBodyError("an answer with a row cut short", is_transient=True)
        return rows

    try:
        return ask_again(ask, retries)
    except FetchError as error:
        raise DataError(f"SDSS gives no stars: {error}; the query: {one_line}") from None


def _parse_answer(body: bytes, sql: str) -> list[list[str]]:
    """Rows of an answer in CSV, which begins with "#Table1" and a header. Raises DataError if it is something else."""
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # no CSV: a page
        lines = csv.reader(body.decode("utf-8-sig", errors="replace").splitlines())
        rows = [row for row in lines if any(map(str.strip, row))]
    if rows and rows[0][0].startswith("#"):
        del rows[0]
    header = [column.strip().lower() for column in rows[0]] if rows else []
    if header == [column.lower() for column in CATALOG_COLUMNS]:
        return rows[1:]
    # A refusal comes under status 200, too: as a table of its own, or as a page.
    words = " ".join(map(" ".join, rows[1:])) if "error_message" in header else page_text(body, SQL_PAGE_LENGTH)
    raise DataError(f"SDSS refuses the query: {words or '(an empty answer)'}; the query: {sql}")
