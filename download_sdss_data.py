"""Fill spectra/ and images/ of a data directory from SDSS DR16, for the stars in its objects.csv.

    python download_sdss_data.py                       all that is missing beside ./objects.csv
    python download_sdss_data.py --dry-run --limit 10  only show what would be fetched for ten stars
    python download_sdss_data.py --data-dir DIR        for DIR/objects.csv
    python download_sdss_data.py --full                spectra with their single exposures, 5–20 times larger

A file that is there and whole is kept, whatever options it was fetched with; a damaged one is
fetched again. Run the same command again after an interruption or a failure to fetch the rest.
The last run's missing files stand, with the reason, in download_failures.csv; when none is missing
there is no such file. Exit status: 0 if all files are there, 1 if some are missing, 130 on Ctrl-C.

Sources: paths of the spectra, https://www.sdss.org/dr16/data_access/bulk/ and
https://data.sdss.org/datamodel/files/SPECTRO_REDUX/RUN2D/spectra/lite/PLATE4/spec.html; cutouts and
their limits of 64 and 2048 pixels, https://skyserver.sdss.org/dr16/en/help/docs/api.aspx.
"""

import argparse
import contextlib
import csv
import math
import queue
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

import numpy as np
import requests
import urllib3
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

import data
from data import CLASS_NAMES, DataError, Spectrum, Star

SAS_URL = "https://data.sdss.org/sas/dr16"
SKYSERVER_URL = "https://skyserver.sdss.org/dr16/SkyServerWS"
USER_AGENT = f"m-star-classification/1.0 ({requests.utils.default_user_agent()})"

# DR16 holds the SDSS-I/II spectra under three run2d, and all BOSS and eBOSS spectra under one.
SDSS_RUN2D = ("26", "104", "103")
BOSS_RUN2D = "v5_13_0"
FIRST_PLATE_NOT_ONLY_26 = 1960  # lower plates are all run2d 26
FIRST_BOSS_PLATE = 3523

MIN_CUTOUT_SIZE = 64  # the service clips smaller ones in silence, like those above data.MAX_CUTOUT_SIZE

PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})  # any other but 200 is an answer for good
LONGEST_WAIT = 60  # times --backoff, however long a Retry-After asks for
LONGEST_BODY = 10  # times --timeout, for a body that keeps trickling in
MAX_REDIRECTS = 5
CHUNK_BYTES = 2**16

FAILURES_FILE = "download_failures.csv"
FAILURE_COLUMNS = ("name", "subclass", "plate", "mjd", "fiberID", "file", "url", "reason")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    title, examples, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--data-dir DIR] [options]",
        description=title,
        epilog=f"examples:\n{examples}\n\nA valid file that is there is kept, whatever options it was fetched with.",
        formatter_class=type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("."), metavar="DIR", help="holds objects.csv, gets spectra/ and images/")
    add("--workers", type=_number(int, 1, 64), default=4, metavar="N", help="connections to each of the two servers")
    add("--image-rate", type=_number(float, 1e-3, 1e3), default=1.0, metavar="R", help="most cutouts asked for a second")
    add("--limit", type=_number(int, 1, 10**9), metavar="N", help="only the first N stars of the catalogue")
    add("--dry-run", action="store_true", help="print what would be fetched, write nothing")
    add("--full", action="store_true", help="full spectra (all exposures) in place of lite ones")
    sizes = (MIN_CUTOUT_SIZE, data.MAX_CUTOUT_SIZE)
    add("--image-size", type=_number(int, *sizes), default=data.IMAGE_SIZE, metavar="N", help="pixels a side of a cutout")
    add("--image-scale", type=_number(float, 1e-3, 1e3), default=0.2, metavar="S", help="arcsec a pixel of a cutout")
    add("--retries", type=_number(int, 0, 100), default=5, metavar="N", help="further attempts after a passing fault")
    backoff = f"wait before the first retry, doubled at each further one up to {LONGEST_WAIT} times"
    add("--backoff", type=_number(float, 0, 600), default=1.0, metavar="SECONDS", help=backoff)
    timeout = f"longest silence of a server; a whole file may take {LONGEST_BODY} times that"
    add("--timeout", type=_number(float, 0.1, 3600), default=30.0, metavar="SECONDS", help=timeout)
    add("--sas-url", type=_http_url, default=SAS_URL, metavar="URL", help="archive of the spectra, or its mirror")
    add("--skyserver-url", type=_http_url, default=SKYSERVER_URL, metavar="URL", help="cutout service, or its mirror")
    return parser.parse_args(argv)


def _number(kind: type[int] | type[float], low: float, high: float):
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} from {low} to {high}")
        return value

    return number


def _http_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is not an http(s):// address")
    return text.rstrip("/")


# What to fetch, and from where


def decoded_run2d(star: Star) -> str | None:
    """The run2d in the star's name, if that is the specObjID of this very spectrum."""
    decoded = data.decode_spec_obj_id(star.name)
    return decoded[3] if decoded and decoded[:3] == (star.plate, star.mjd, star.fiberID) else None


def run2d_candidates(star: Star) -> tuple[str, ...]:
    """The run2d under which DR16 holds the spectrum: one, unless neither name nor plate settles it."""
    run2d = decoded_run2d(star)
    if run2d in SDSS_RUN2D:
        return (run2d,)
    # A list made from another release names an older or newer v5; DR16 has every such spectrum as v5_13_0.
    if (run2d and run2d.startswith("v5_")) or star.plate >= FIRST_BOSS_PLATE:
        return (BOSS_RUN2D,)
    return SDSS_RUN2D if star.plate >= FIRST_PLATE_NOT_ONLY_26 else SDSS_RUN2D[:1]


def spectrum_url(star: Star, run2d: str, *, sas_url: str = SAS_URL, full: bool = False) -> str:
    boss = run2d.startswith("v")
    survey = "eboss" if boss else "sdss"
    folder = ("full/" if boss else "") if full else "lite/"
    name = f"{star.plate:04d}/spec-{star.spectrum_id}.fits"
    return f"{sas_url}/{survey}/spectro/redux/{run2d}/spectra/{folder}{name}"


def cutout_url(
    ra: float, dec: float, *, size: int = data.IMAGE_SIZE, scale: float = 0.2, skyserver_url: str = SKYSERVER_URL
) -> str:
    position = {"ra": f"{ra:.7f}", "dec": f"{dec:.7f}"}
    query = urlencode({**position, "scale": f"{scale:g}", "width": size, "height": size, "opt": ""})
    return f"{skyserver_url}/ImgCutout/getjpeg?{query}"


class File(NamedTuple):
    """One file to fetch. `urls` are tried in turn while they answer 404; a cutout of unknown position has none."""

    star: Star
    kind: str  # "spectrum" or "cutout"
    path: Path
    urls: tuple[str, ...]


def spectrum_file(star: Star, args: argparse.Namespace) -> File:
    urls = (spectrum_url(star, run2d, sas_url=args.sas_url, full=args.full) for run2d in run2d_candidates(star))
    return File(star, "spectrum", data.spectrum_path(args.data_dir, star), tuple(urls))


def cutout_file(star: Star, spectrum: Spectrum | None, args: argparse.Namespace) -> File:
    """The star's cutout, at the catalogue's position or else at that in its spectrum."""
    options = {"size": args.image_size, "scale": args.image_scale, "skyserver_url": args.skyserver_url}
    positions = [(source.ra, source.dec) for source in (star, spectrum) if source is not None]
    urls = [cutout_url(ra, dec, **options) for ra, dec in positions if 0 <= ra <= 360 and -90 <= dec <= 90]
    return File(star, "cutout", data.cutout_path(args.data_dir, star), tuple(urls[:1]))


class Survey(NamedTuple):
    """What a data directory has and lacks of its stars' files, by path."""

    there: set[Path]
    damaged: set[Path]
    spectra: dict[Path, File]
    cutouts: dict[Path, File]
    waiting: dict[Path, File]  # cutouts whose position must come from the spectrum fetched to this path


def survey_files(stars: list[Star], args: argparse.Namespace) -> Survey:
    survey = Survey(set(), set(), {}, {}, {})
    other_sizes = 0
    for star in tqdm(stars, desc="checking files", unit="star", leave=False):
        spectrum = None
        file = spectrum_file(star, args)
        try:
            spectrum = data.read_spectrum(file.path, star)
            survey.there.add(file.path)
        except DataError:
            survey.spectra[file.path] = file
        cutout = cutout_file(star, spectrum, args)
        try:
            other_sizes += len(data.read_cutout(cutout.path)) != args.image_size
            survey.there.add(cutout.path)
        except DataError:
            if cutout.urls or spectrum:
                survey.cutouts[cutout.path] = cutout
            else:
                survey.waiting[file.path] = cutout
    survey.damaged.update(path for path in (*survey.spectra, *survey.cutouts) if path.exists())
    survey.damaged.update(cutout.path for cutout in survey.waiting.values() if cutout.path.exists())
    if other_sizes:
        print(f"{other_sizes} cutouts that are there are not {args.image_size} pixels wide; they are kept")
    return survey


# Fetching


class FetchError(Exception):
    """A file that was not got; `status` is the HTTP status if that says why, and 0 if the answer was no good."""

    def __init__(self, reason: str, status: int = 0, retry_after: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after

    @property
    def is_permanent(self) -> bool:
        return self.status != 0 and self.status not in PASSING_STATUSES


def waiting_time(attempt: int, backoff: float, retry_after: str = "") -> float:
    """Seconds from a failed attempt (0, 1, …) to the next; `retry_after` is that header, seconds or a date."""
    try:
        asked = urllib3.Retry().parse_retry_after(retry_after) if retry_after else 0
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        asked = 0
    return min(max(backoff * 2**attempt, asked), backoff * LONGEST_WAIT)


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


def new_session() -> requests.Session:
    session = requests.Session()
    # identity: the archive's bytes as they are, and no small answer that unpacks to a huge one
    session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
    session.max_redirects = MAX_REDIRECTS
    return session


def get(session: requests.Session, url: str, timeout: float) -> bytes:
    """The whole body of a GET, bounded in size and time. Raises FetchError."""
    deadline = time.monotonic() + LONGEST_BODY * timeout
    body = bytearray()
    try:
        # Leaving the block after an error closes the connection: an error page is never read, however long.
        with session.get(url, stream=True, timeout=timeout) as response:
            if response.status_code != 200:
                reason = f"HTTP {response.status_code} {response.reason or ''}".strip()
                raise FetchError(reason[:100], response.status_code, response.headers.get("Retry-After", ""))
            # read1 gives what has come so far; iter_content would wait for a full chunk and miss the deadline.
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
                body += chunk
                if len(body) > data.MAX_FILE_BYTES:
                    raise FetchError(f"more than {data.MAX_FILE_BYTES} bytes, too many for a file of one star")
                if time.monotonic() > deadline:
                    raise FetchError(f"not whole after {LONGEST_BODY * timeout:g} s")
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise FetchError(f"no answer within {timeout:g} s") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:  # the innermost says it in the fewest words
            cause = cause.__cause__ or cause.__context__
        raise FetchError(f"connection failed or broken ({type(cause).__name__}: {cause})") from None
    return bytes(body)


class Downloader:
    """Worker threads, each with a session of its own, that take files from two queues.

    Each file ends up in `results` as (file, None) or (file, reason for its failure). An exception
    there is one that ends the whole run.
    """

    def __init__(self, survey: Survey, args: argparse.Namespace) -> None:
        self.args = args
        self.spectra, self.cutouts = deque(survey.spectra.values()), deque(survey.cutouts.values())
        self.waiting = survey.waiting
        self.results: queue.SimpleQueue[tuple[File, str | None] | BaseException] = queue.SimpleQueue()
        self.pacer = Pacer(args.image_rate)
        self.writing = threading.Lock()

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
            with new_session() as session:
                while (file := self._next(cutouts_first)) is not None:
                    self._do(session, file)
        except BaseException as error:  # nothing is swallowed: the main thread raises it
            self.results.put(error)

    def _next(self, cutouts_first: bool) -> File | None:
        # One worker keeps to the paced cutouts while the others let the spectra flow; then all take what is left.
        for files in (self.cutouts, self.spectra) if cutouts_first else (self.spectra, self.cutouts):
            with contextlib.suppress(IndexError):
                return files.popleft()
        return None

    def _do(self, session: requests.Session, file: File) -> None:
        content, reason = None, None
        try:
            content = self._fetch(session, file)
        except FetchError as error:
            reason = str(error)
        if file.path in self.waiting:
            self.cutouts.append(cutout_file(file.star, content, self.args))
        self.results.put((file, reason))

    def _fetch(self, session: requests.Session, file: File) -> Spectrum | np.ndarray:
        failure = FetchError("no position: neither ra, dec in the catalogue nor PLUG_RA, PLUG_DEC in a spectrum")
        for url in file.urls:
            try:
                return self._fetch_from(session, url, file)
            except FetchError as error:
                failure = error
                if error.status != 404:
                    break
        raise failure

    def _fetch_from(self, session: requests.Session, url: str, file: File) -> Spectrum | np.ndarray:
        # One loop for all passing faults, in place of urllib3's retries: it also covers broken and
        # useless bodies, lets the pacer count every attempt, and never reads an error page to its end.
        for attempt in range(self.args.retries + 1):
            if file.kind == "cutout":
                self.pacer.wait()
            try:
                return self._save(get(session, url, self.args.timeout), file)
            except FetchError as error:
                failure = error
                if error.is_permanent:
                    break
            if attempt < self.args.retries:
                time.sleep(waiting_time(attempt, self.args.backoff, failure.retry_after))
        raise failure

    def _save(self, body: bytes, file: File) -> Spectrum | np.ndarray:
        """Write and check the file. Raises FetchError if it is no good, DataError if nothing can be written."""
        try:
            # One at a time: `stop` relies on it, and so does astropy's handling of warnings.
            with self.writing, data.write_atomically(file.path) as temporary:
                temporary.write_bytes(body)
                try:
                    if file.kind == "spectrum":
                        return data.read_spectrum(temporary, file.star)
                    return data.read_cutout(temporary, self.args.image_size)
                except DataError as error:
                    # After a semicolon stands advice to someone who has the file.
                    raise FetchError(str(error).removeprefix(f"{temporary}: ").partition("; ")[0]) from None
        except OSError as error:
            raise DataError(f"{file.path}: cannot be written ({error.strerror or error})") from error


def fetch_files(survey: Survey, args: argparse.Namespace) -> dict[Path, tuple[str, str]]:
    """Fetch what the survey found missing and add it to `survey.there`; returns (URLs, reason) of each failure."""
    total = len(survey.spectra) + len(survey.cutouts) + len(survey.waiting)
    failures: dict[Path, tuple[str, str]] = {}
    done: Counter[str] = Counter(spectrum=0, cutout=0, failed=0)
    reasons_shown = set()
    downloader = Downloader(survey, args)
    downloader.start()
    try:
        with tqdm(total=total, desc="fetching", unit="file") as progress:
            for _ in range(total):
                result = downloader.results.get()
                if isinstance(result, BaseException):
                    raise result
                file, reason = result
                if reason is None:
                    survey.there.add(file.path)
                else:
                    failures[file.path] = " ".join(file.urls), reason
                    if (kind := kind_of_failure(file.path, reason)) not in reasons_shown:
                        reasons_shown.add(kind)
                        progress.write(f"{file.path}: {reason}")
                done[file.kind if reason is None else "failed"] += 1
                progress.update()
                progress.set_postfix(done, refresh=False)
    finally:
        downloader.stop()
    return failures


# The run and its report


def read_stars(args: argparse.Namespace) -> list[Star]:
    path = data.catalog_path(args.data_dir)
    stars, left_out = data.read_catalog(path)
    if any(star.simulated for star in stars):
        raise DataError(f"{path} lists simulated stars; SDSS has no files of them")
    print(f"{path}: {len(stars)} stars" + (f", the first {args.limit} of them" if args.limit else ""))
    for reason, count in left_out.items():
        print(f"  left out: {count} rows: {reason}")
    stars = stars[: args.limit]
    at_odds = [star for star in stars if data.decode_spec_obj_id(star.name) and decoded_run2d(star) is None]
    if at_odds:
        plate, mjd, fiberID, _ = data.decode_spec_obj_id(at_odds[0].name)
        print(
            f"  {len(at_odds)} names are the specObjID of another spectrum than plate, mjd and fiberID say; these "
            f"columns are used (e.g. {at_odds[0].name} is {plate}-{mjd}-{fiberID}, not {at_odds[0].spectrum_id})"
        )
    return stars


def print_plan(survey: Survey, args: argparse.Namespace) -> None:
    cutouts = len(survey.cutouts) + len(survey.waiting)
    print(
        f"{len(survey.there)} files are there, {len(survey.damaged)} damaged; to fetch: {len(survey.spectra)} spectra, "
        f"{cutouts} cutouts (at most {args.image_rate:g} a second: {math.ceil(cutouts / args.image_rate / 60)} min)"
    )


def kind_of_failure(path: Path, reason: str) -> str:
    """The reason without what differs from star to star, which stands in parentheses."""
    return f"{'spectrum' if path.suffix == '.fits' else 'cutout'}: {reason.partition(' (')[0]}"


def report(stars: list[Star], there: set[Path], failures: dict[Path, tuple[str, str]], args) -> bool:
    """Print the table and write the list of failures; returns whether all files are there."""
    paths = {star: (data.spectrum_path(args.data_dir, star), data.cutout_path(args.data_dir, star)) for star in stars}
    print(f"\n{'class':8}{'stars':>8}{'spectra':>10}{'cutouts':>10}{'complete':>10}")
    for name in (*CLASS_NAMES, "all"):
        found = [tuple(path in there for path in paths[star]) for star in stars if name in (star.subclass, "all")]
        spectra, cutouts = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0)
        print(f"{name:8}{len(found):8}{spectra:10}{cutouts:10}{sum(map(all, found)):10}")

    missing = [(star, path) for star in stars for path in paths[star] if path not in there]
    for kind, count in Counter(kind_of_failure(path, failures[path][1]) for _, path in missing).most_common():
        print(f"{count:6} missing, {kind}")
    if missing:
        with data.write_atomically(args.data_dir / FAILURES_FILE) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(FAILURE_COLUMNS)
                for star, path in missing:
                    writer.writerow([*star[:5], path.relative_to(args.data_dir).as_posix(), *failures[path]])
    option = "" if args.data_dir == Path(".") else f" --data-dir {args.data_dir}"
    if missing:
        print(f"{len(missing)} files are missing, see {args.data_dir / FAILURES_FILE}; run again to try them again,")
        print(f"or go on with the complete stars: python train.py{option}")
    else:
        print(f"All files are there. Next: python train.py{option}")
    return not missing


@contextlib.contextmanager
def only_download_into(data_dir: Path):
    """Keep other downloads out of the directory; clear what a killed one left half-written."""
    try:
        with FileLock(data_dir / ".download.lock", timeout=0):
            for pattern in ("spectra/*/.*.partial.fits", "images/*/.*.partial.jpg", ".download_failures-*.partial.csv"):
                for leftover in data_dir.glob(pattern):
                    leftover.unlink()
            yield
    except Timeout:
        raise DataError(f"another download into {data_dir} is running; wait for its end") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    stars = read_stars(args)
    if args.dry_run:
        survey = survey_files(stars, args)
        for file in (*survey.spectra.values(), *survey.cutouts.values(), *survey.waiting.values()):
            print(f"{' or '.join(file.urls) or 'cutout at the position in its spectrum'} -> {file.path}")
        print_plan(survey, args)
        return
    with only_download_into(args.data_dir):
        survey = survey_files(stars, args)
        print_plan(survey, args)
        (args.data_dir / FAILURES_FILE).unlink(missing_ok=True)  # of an earlier run, no longer true
        failures = fetch_files(survey, args)
        complete = report(stars, survey.there, failures, args)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    data.run_as_script(main)
