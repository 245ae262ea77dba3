"""Fill spectra/ and images/ of a data directory from SDSS, for the stars in its objects.csv.

    python download_sdss_data.py                       the missing files of the stars in ./objects.csv
    python download_sdss_data.py --data-dir DIR        the same for DIR/objects.csv
    python download_sdss_data.py --dry-run --limit 10  only show what would be fetched for ten stars
    python download_sdss_data.py --full                spectra with every exposure, several times larger

Without a list of stars, let SDSS make one first, with the same number of stars of each class M0…M4:

    python download_sdss_data.py --query 80 --data-dir DIR                 80 stars of each class, of any S/N
    python download_sdss_data.py --query 80 --data-dir HIGH --min-snr 10   a set of high S/N
    python download_sdss_data.py --query 80 --data-dir LOW --max-snr 10    a set of low S/N, none of them in the other

The paper has a set of high and one of low S/N. The limit between them, a median of 10 a pixel, is ours.

A star's valid files are kept, wherever they lie below spectra/ and images/; a damaged one is fetched
again. Files appear whole or not at all; after an interruption or a failure, run again. Files that the
last run could not get are listed with the reason in download_failures.csv; when nothing is missing
there is no such file. Exit status: 0 if all files are there, 1 if not, 130 on Ctrl-C.

Data release: DR16, or DR17 with --sas-url https://data.sdss.org/sas/dr17.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import math
import queue
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import filelock
import requests

import cli
import sdss_archive
from catalog import (
    CLASS_NAMES,
    Star,
    check_places,
    decode_spec_obj_id,
    position_conflict,
    read_catalog,
    report_left_out,
)
from cli import DataError, number_between
from sdss_archive import BadBodyError, FetchError
from star_files import FileIndex, catalog_path, cutout_path, spectrum_path
from survey_files import Cutout, Spectrum, WrongFileError, read_cutout, read_spectrum

# A server is given up for this run after so many files in a row failed with transient errors.
MAX_CONSECUTIVE_FAILURES = 8

FAILURES_FILE = "download_failures.csv"
FAILURE_COLUMNS = ("name", "subclass", "plate", "mjd", "fiberID", "file", "url", "reason")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.ScriptParser(__doc__, usage="%(prog)s [--data-dir DIR] [options]")
    add = parser.add_argument
    positive, snr = number_between(float, 1e-3, 1e3), number_between(float, 0, 1e4)
    add("--data-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory with objects.csv; spectra/ and images/ are filled")  # fmt: skip
    add("--workers", type=number_between(int, 1, 64), default=4, metavar="N", help="connections to each server")
    # No limit of the cutout service is published; SkyServer's SQL search allows 60 queries a minute.
    add("--image-rate", type=positive, default=1.0, metavar="R", help="maximum number of cutouts requested per second")
    add("--limit", type=number_between(int, 1, 10**9), metavar="N", help="only the first N stars of the catalogue")
    add("--dry-run", action="store_true", help="print what would be fetched, write nothing")
    add("--query", type=number_between(int, 1, 50_000), metavar="N",
        help="write objects.csv with N stars of each class, and its SQL to objects.sql; fetch no files")  # fmt: skip
    add("--min-snr", type=snr, metavar="X", help="with --query: median S/N of X or more")
    add("--max-snr", type=snr, metavar="X", help="with --query: median S/N below X")
    add("--full", action="store_true", help="full spectra, with every exposure, instead of lite ones")
    add("--retries", type=number_between(int, 0, 100), default=5, metavar="N", help="retries after a transient error")
    add("--timeout", type=positive, default=30.0, metavar="S", help="seconds to wait for a silent server")
    add("--sas-url", type=_http_url, default=sdss_archive.SAS_URL, metavar="URL",
        help="archive of the spectra, or a mirror of it")  # fmt: skip
    add("--skyserver-url", type=_http_url, default=sdss_archive.SKYSERVER_URL, metavar="URL",
        help="server of cutouts and queries; by default of the same release as --sas-url")  # fmt: skip
    parser.add_quiet()
    args = parser.parse_args(argv)
    for name in ("workers", "image_rate", "limit", "full") if args.query else ("min_snr", "max_snr"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {'with' if args.query else 'without'} --query")
    if args.min_snr is not None and args.max_snr is not None and args.min_snr >= args.max_snr:
        parser.error("--min-snr must lie below --max-snr")
    release = sdss_archive.release_of(args.sas_url)
    if release not in sdss_archive.BOSS_RUN2D:
        known = " or ".join(map(str.upper, sdss_archive.BOSS_RUN2D))
        parser.error(f"argument --sas-url: the release is {release.upper()}, not {known}")
    if args.skyserver_url == sdss_archive.SKYSERVER_URL:
        args.skyserver_url = args.skyserver_url.replace(sdss_archive.DEFAULT_RELEASE, release)
    return args


def _http_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment):
            return text.rstrip("/")
    raise argparse.ArgumentTypeError(f"{text!r} is not an http:// or https:// address")


# What to fetch


class File(NamedTuple):
    star: Star
    kind: str  # "spectrum" or "cutout"
    path: Path
    urls: tuple[str, ...] = ()  # tried in turn while they answer 404
    reason: str = ""  # why it could not be fetched


def read(file: File, path: Path) -> Spectrum | Cutout:
    """Raises DataError if `path` does not hold this file."""
    return read_spectrum(path, file.star) if file.kind == "spectrum" else read_cutout(path)


def is_there(file: File) -> bool:
    try:
        return bool(read(file, file.path))
    except DataError:  # absent or damaged
        return False


def find_missing(stars: list[Star], args: argparse.Namespace) -> tuple[list[File], list[File]]:
    """Spectra and cutouts that are absent or damaged; a cutout gets its address from `with_positions`."""
    index = FileIndex(args.data_dir)
    spectra: list[File] = []
    cutouts: dict[Path, File] = {}  # rows of one name share their cutout
    for star in cli.progress(stars, desc="checking files", unit="star"):
        urls = () if star.file else sdss_archive.spectrum_urls(star, args.sas_url, full=args.full)
        reason = "the catalogue names a file of your own, which is not in spectra/" if star.file else ""
        path = index.spectrum(star) or spectrum_path(args.data_dir, star)
        if not (path.exists() if star.file else is_there(File(star, "spectrum", path))):
            spectra.append(File(star, "spectrum", path, urls, reason))
        cutout = File(star, "cutout", index.cutout(star) or cutout_path(args.data_dir, star))
        if cutout.path not in cutouts and not is_there(cutout):
            cutouts[cutout.path] = cutout
    return spectra, list(cutouts.values())


def known_positions(star: Star, index: FileIndex) -> list[tuple[float, float]]:
    """In degrees: the catalogue's, then that in the star's spectrum, as far as they are known."""
    path = index.spectrum(star)
    sources: list[Star | Spectrum] = [star]
    with contextlib.suppress(DataError):  # a damaged spectrum is no reason against the cutout
        sources += [read_spectrum(path, star)] if path else []
    return [(source.ra, source.dec) for source in sources if not math.isnan(source.ra + source.dec)]


def check_shared_cutouts(stars: list[Star], args: argparse.Namespace) -> None:
    """Raise DataError if rows of one name, which share a cutout, are of two places."""
    index, count = FileIndex(args.data_dir), Counter(star.name for star in stars)
    placed = [
        (star.spectrum_id, star._replace(ra=ra, dec=dec))
        for star in stars
        if count[star.name] > 1
        for ra, dec in known_positions(star, index)[:1]
    ]
    check_places(catalog_path(args.data_dir), placed)


def with_positions(cutouts: list[File], args: argparse.Namespace) -> list[File]:
    """The cutouts with their addresses, at the catalogue's position or else at that in the star's spectrum."""
    index = FileIndex(args.data_dir)
    located = []
    for cutout in cli.progress(cutouts, desc="finding positions", unit="star"):
        positions = known_positions(cutout.star, index)
        if not positions:
            reason = "no position: no ra, dec in the catalogue, none in a spectrum"
            located.append(cutout._replace(reason=reason))
        elif conflict := position_conflict(*positions[0], *positions[-1]):
            located.append(cutout._replace(reason=conflict))
        else:
            located.append(cutout._replace(urls=(sdss_archive.cutout_url(*positions[0], args.skyserver_url),)))
    return located


def check_writable(folders: set[Path]) -> None:
    """Raise OSError if no file can be written into one of the folders, which are made where they are absent."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


# Fetching


class Downloader:
    """Worker threads, each with a session of its own, that fetch files of one server."""

    def __init__(self, files: list[File], args: argparse.Namespace, rate: float) -> None:
        self.args = args
        self.files: queue.SimpleQueue[File | None] = queue.SimpleQueue()
        for file in (*files, *[None] * args.workers):  # each worker ends at a None
            self.files.put(file)
        self.results: queue.SimpleQueue[File | Exception] = queue.SimpleQueue()
        self.pacer = sdss_archive.Pacer(rate)
        self.failed_in_a_row = 0
        self.writing = threading.Lock()

    def start(self) -> None:
        # Daemons: a thread that waits for a server or for its turn does not hold up the exit on Ctrl-C.
        for _ in range(self.args.workers):
            threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        """Wait until the file that is being written is whole, and let no other begin."""
        self.writing.acquire()

    def _work(self) -> None:
        try:
            with sdss_archive.open_session(self.args.retries) as session:
                while file := self.files.get():
                    self.results.put(file._replace(reason=self._fetch(file, session)))
        except Exception as error:  # the main thread raises it
            self.results.put(error)

    def _fetch(self, file: File, session: requests.Session) -> str:
        """Fetch a file from the first of its addresses that has it; returns why that failed, or ""."""
        reason = file.reason
        for url in file.urls:
            if self.failed_in_a_row >= MAX_CONSECUTIVE_FAILURES:
                return f"not asked for: {MAX_CONSECUTIVE_FAILURES} files in a row failed at this server"
            try:
                ask = functools.partial(self._fetch_from, url, file, session)
                sdss_archive.ask_again(ask, self.args.retries)
                self.failed_in_a_row = 0
                return ""
            except FetchError as error:
                self.failed_in_a_row = self.failed_in_a_row + 1 if error.is_transient else 0
                reason = str(error)
                if error.status != 404:
                    return reason
        is_spectrum = file.kind == "spectrum" and file.urls
        return (is_spectrum and sdss_archive.later_release(file.star, self.args.sas_url)) or reason

    def _fetch_from(self, url: str, file: File, session: requests.Session) -> None:
        """Raises FetchError if no good file comes, DataError if none can be written."""
        self.pacer.wait()
        body = sdss_archive.get(session, url, self.args.timeout)
        try:
            with self.writing, cli.write_atomically(file.path) as temporary:
                temporary.write_bytes(gzip.compress(body) if file.path.suffix == ".gz" else body)
                try:
                    read(file, temporary)
                except DataError as error:
                    if words := sdss_archive.page_text(body):
                        raise BadBodyError(f"a page in place of the file ({words})", is_transient=True) from None
                    # After a semicolon stands advice to someone who has the file.
                    reason = str(error).removeprefix(f"{temporary}: ").partition("; ")[0]
                    raise BadBodyError(reason, is_transient=not isinstance(error, WrongFileError)) from None
        except OSError as error:
            raise DataError(f"{file.path}: cannot be written ({error.strerror or error})") from error


def fetch_files(files: list[File], args: argparse.Namespace, desc: str, rate: float = math.inf) -> list[File]:
    """Fetch files of one server, at most `rate` a second; returns those that failed."""
    failures: list[File] = []
    downloader = Downloader(files, args, rate)
    downloader.start()
    try:
        with cli.progress(total=len(files), desc=desc, unit="file", disable=not files) as bar:
            for _ in files:
                result = downloader.results.get()
                if isinstance(result, Exception):
                    raise result
                if result.reason:
                    failures.append(result)
                    bar.set_postfix(failed=len(failures), refresh=False)
                    if len(failures) == 1:  # long before the report at the end
                        bar.write(f"{result.path}: {result.reason}")
                bar.update()
    finally:
        downloader.stop()
    return sorted(failures)


# A catalogue from SDSS


def write_catalog(args: argparse.Namespace) -> None:
    """--query: write objects.csv, its classes in turn so that --limit takes some of each, and objects.sql."""
    queries = [sdss_archive.catalog_sql(name, args.query, args.min_snr, args.max_snr) for name in CLASS_NAMES]
    if args.dry_run:
        print("\n".join(queries))
        return
    path = catalog_path(args.data_dir)
    sql_path = path.with_suffix(".sql")
    check_writable({args.data_dir})
    with only_download_into(args.data_dir):
        for there in (path, sql_path):
            if there.exists():
                raise DataError(f"{there}: exists, and --query replaces no catalogue; give another --data-dir")
        answers = ask_for_stars(queries, args)
        with cli.write_atomically(path) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(sdss_archive.CATALOG_COLUMNS)
                csv.writer(file).writerows(row for by_class in zip(*answers, strict=True) for row in by_class)
            stars, _ = read_catalog(temporary)
        with cli.write_atomically(sql_path) as temporary:
            temporary.write_text(f"-- {args.skyserver_url}, {date.today()}\n\n" + "\n".join(queries), encoding="utf-8")
    print(f"{path}: {len(stars)} stars, {args.query} of each class; the SQL is in {sql_path}")
    other_archive = f" --sas-url {args.sas_url}" * (args.sas_url != sdss_archive.SAS_URL)
    print(f"Next: python download_sdss_data.py --data-dir {args.data_dir}{other_archive}")


def ask_for_stars(queries: list[str], args: argparse.Namespace) -> list[list[list[str]]]:
    """The rows of each class."""
    answers = []
    with sdss_archive.open_session(args.retries) as session:
        for subclass, sql in zip(CLASS_NAMES, cli.progress(queries, desc="asking", unit="query"), strict=True):
            rows = sdss_archive.query_sdss(
                session, sql, skyserver_url=args.skyserver_url, timeout=args.timeout, retries=args.retries
            )
            if len(rows) < args.query:
                raise DataError(f"SDSS has only {len(rows)} {subclass} stars of this S/N: ask for no more with --query")
            answers.append(rows[: args.query])
    return answers


# The run and its report


def read_stars(args: argparse.Namespace) -> list[Star]:
    path = catalog_path(args.data_dir)
    stars, left_out = read_catalog(path, labelled=False)
    if any(star.simulated for star in stars):
        raise DataError(f"{path}: lists simulated stars; SDSS has no files of them")
    print(f"{path}: {len(stars)} stars" + (f", of which the first {args.limit}" if args.limit else ""))
    report_left_out(left_out)
    stars = stars[: args.limit]
    others = [star for star in stars if decode_spec_obj_id(star.name) and not sdss_archive.run2d_in_name(star)]
    if others:
        print(f"  names that are the specObjID of another spectrum: {len(others)}; plate, mjd and fiberID are used "
              f"(e.g. {others[0].spectrum_id} for {others[0].name})")  # fmt: skip
    return stars


def print_table(stars: list[Star], failures: list[File]) -> None:
    """How many stars of each class have their files."""
    no_spectrum = {file.star.spectrum_id for file in failures if file.kind == "spectrum"}
    no_cutout = {file.star.name for file in failures if file.kind == "cutout"}
    print(f"\nclass{'stars':>10}{'spectra':>10}{'cutouts':>10}{'complete':>10}")
    for label in (*CLASS_NAMES, "other", "all"):
        members = [star for star in stars if label in (star.class_name or "other", "all")]
        spectra = {star for star in members if star.spectrum_id not in no_spectrum}
        cutouts = {star for star in members if star.name not in no_cutout}
        if members:
            print(f"{label:5}{len(members):10}{len(spectra):10}{len(cutouts):10}{len(spectra & cutouts):10}")


def report_failures(failures: list[File], data_dir: Path) -> None:
    """Print how many files failed for which reason, and list them in the failures file."""
    # Details that differ from file to file stand in parentheses.
    reasons = Counter(f"{file.kind}: {file.reason.partition(' (')[0]}" for file in failures)
    for reason, count in reasons.most_common():
        print(f"{count:6} missing, {reason}")
    path = data_dir / FAILURES_FILE
    with cli.write_atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as csv_file:
        writer = csv.writer(csv_file)
        writer.writerow(FAILURE_COLUMNS)
        for file in failures:
            place = file.path.relative_to(data_dir).as_posix()
            writer.writerow([*file.star[:5], place, " ".join(file.urls), file.reason])
    print(f"Files missing: {len(failures)}, listed in {path}. Run again to try them again.")


@contextlib.contextmanager
def only_download_into(data_dir: Path) -> Iterator[None]:
    """Keep other downloads out of the directory, and delete the partial files of a killed one."""
    try:
        with cli.file_lock(data_dir / ".download.lock", timeout=0):
            for pattern in ("spectra", "spectra/*", "images", "images/*"):
                for folder in data_dir.glob(pattern):
                    cli.remove_leftovers(folder / "*.*")
            for name in (FAILURES_FILE, "objects.*"):
                cli.remove_leftovers(data_dir / name)
            yield
    except filelock.Timeout:
        raise DataError(f"another download into {data_dir} is running; wait for its end") from None


def download(args: argparse.Namespace) -> None:
    stars = read_stars(args)
    with contextlib.nullcontext() if args.dry_run else only_download_into(args.data_dir):
        spectra, cutouts = find_missing(stars, args)
        print(f"to fetch: {sum(bool(file.urls) for file in spectra)} spectra, {len(cutouts)} cutouts")
        if damaged := sum(file.path.exists() for file in (*spectra, *cutouts)):
            print(f"  of these, damaged files there: {damaged}")
        if len(cutouts) > 60 * args.image_rate:
            minutes = len(cutouts) / args.image_rate / 60
            print(f"at {args.image_rate:g} cutouts a second that takes {minutes:.0f} minutes")
        if args.dry_run:
            show(spectra, cutouts, args)
            return
        check_writable({args.data_dir, *(file.path.parent for file in (*spectra, *cutouts))})
        (args.data_dir / FAILURES_FILE).unlink(missing_ok=True)  # an earlier run's, true no longer
        failures = fetch_files(spectra, args, "spectra")
        check_shared_cutouts(stars, args)
        cutouts = with_positions(cutouts, args)  # the new spectra's, too
        failures += fetch_files(cutouts, args, "cutouts", rate=args.image_rate)
        print_table(stars, failures)
        if failures:
            report_failures(failures, args.data_dir)
            sys.exit(1)
    print(
        "All files of these stars are there. Next: python train.py"
        + f" --data-dir {args.data_dir}" * (args.data_dir != Path("."))
    )


def show(spectra: list[File], cutouts: list[File], args: argparse.Namespace) -> None:
    """--dry-run: addresses and paths, or why a file cannot be fetched."""
    with_spectrum = {file.star for file in spectra if file.urls}
    for file in (*spectra, *with_positions(cutouts, args)):
        reason = "at the position in its spectrum" if file.star in with_spectrum else file.reason
        print(f"{' or '.join(file.urls) or f'({reason})'} -> {file.path}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with cli.quietly(args.quiet):
        if args.query:
            write_catalog(args)
        else:
            download(args)


if __name__ == "__main__":
    cli.run_as_script(main)
