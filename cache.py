"""The stars' files, each decoded once: their content, prepared for the network, is kept on the disk.

    data directory/.cache/
        spectra         (N, 2, 3522) float32 without header, a row per star of the catalogue
        images          (N, 3, 128, 128) uint8, likewise; rows of stars without a usable file are empty
        index.json      a digest of everything that went in, and the findings in each file

Where the digest differs (another set of stars, a file of another size or time of change, other code
that prepares them), all files are decoded again: a few minutes for 100,000 stars. Deleting the directory
does no harm, not even during a run.
"""

import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import astropy
import numpy as np
import PIL
import scipy
import torch
from torch import Tensor

import cli
import preparation
import survey_files
from catalog import CLASS_NAMES, Star, check_places, position_conflict, read_catalog, report_left_out
from cli import DataError
from star_files import FileIndex, catalog_path
from workers import parallel_map

CACHE_DIR = ".cache"
INDEX_FILE = "index.json"
ROWS = {
    "spectra": np.dtype((np.float32, (2, preparation.SPECTRUM_LENGTH))),
    "images": np.dtype((np.uint8, (3, survey_files.IMAGE_SIZE, survey_files.IMAGE_SIZE))),
}
INPUTS = {"fusion": ("spectra", "images"), "spectrum": ("spectra",), "image": ("images",)}  # by modality
MISSING = {"spectra": "no spectrum", "images": "no image"}
FEW_STARS = 128  # up to so many, one process is done before worker processes have started

StarFiles = dict[str, Path | None]  # of a star's files, "spectra" and "images"


class Finding(NamedTuple):
    """Facts about a file, besides its row."""

    damage: str = ""  # why it cannot be used, without the file's name; "" if it can
    unreadable: bool = False  # the system did not let it be read
    ra: float = math.nan  # degrees, where the spectrum was taken
    dec: float = math.nan
    simulated: bool = False
    redshift: float = 0.0  # of the spectrum
    subclass: str = ""  # as the survey's pipeline wrote it


class CheckedStar(NamedTuple):
    """A star of the catalogue, and whether it can be used."""

    star: Star  # with its spectrum's position where the catalogue has none
    state: str = "used"  # or "damaged", "misplaced", "no spectrum", "no image", "no spectrum, no image"
    problem: str = ""  # of a damaged or misplaced star, with the file's name


class CachedArray:
    """Rows of one of the cache's arrays; indexed with a slice or integers (B,), it reads a tensor (B, …) of them.

    The file stays open: a cache that is deleted or made anew does not change the rows that a run reads.
    """

    def __init__(self, path: Path) -> None:
        self.dtype = ROWS[path.name]
        self.file = open(path, "rb")  # noqa: SIM115, for as long as this object lives
        self.stamp = file_stamp(self.file.fileno())
        self.rows = np.arange(self.stamp[0] // self.dtype.itemsize)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: slice | Tensor | np.ndarray) -> Tensor:
        if file_stamp(self.file.fileno()) != self.stamp:
            raise DataError(f"{self.file.name}: was changed while it was read; run again, and it is made anew")
        if not isinstance(indices, slice):
            indices = np.asarray(indices)  # NumPy takes a tensor of one index for a number
        # Mapped for one batch at a time: pages once read would count, and stay, as this process's memory.
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        return torch.from_numpy(np.frombuffer(mapped, self.dtype)[self.rows[indices]])


class Cache(NamedTuple):
    findings: list[dict[str, Finding]]  # of each star, by array
    arrays: dict[str, CachedArray]  # a row per star


class PreparedStars(NamedTuple):
    """The usable stars. Indexing an array gives a tensor; an input that the modality does not read is None."""

    stars: list[Star]
    spectra: CachedArray | Tensor | None  # (N, 2, 3522) float32: flux / median, ivar · median²
    images: CachedArray | Tensor | None  # (N, 3, 128, 128) uint8
    targets: Tensor  # (N,) int64, indices into CLASS_NAMES


def read_stars(data_dir: Path, modality: str, num_workers: int) -> tuple[PreparedStars, dict[str, Any]]:
    """The usable stars of a data directory and, for the history, how many are not used and why; prints both.

    Without a cache of these files they are decoded first, in `num_workers` processes. Raises DataError if no
    star can be used.
    """
    stars, left_out = read_catalog(catalog_path(data_dir))
    report_left_out(left_out)
    index, kinds = FileIndex(data_dir), INPUTS[modality]
    files = {star: index.files(star) for star in stars}
    cache = up_to_date_cache(data_dir, files, num_workers)
    checked = [
        check_star(star, paths, found, kinds)
        for (star, paths), found in zip(files.items(), cache.findings, strict=True)
    ]
    check_places(catalog_path(data_dir), [(entry.star.spectrum_id, entry.star) for entry in checked])
    report_usable(checked)
    rows = np.flatnonzero([entry.state == "used" for entry in checked])
    if not rows.size:
        raise DataError(
            f"{data_dir}: none of the {len(stars)} stars of its objects.csv can be used "
            f"(the first: {checked[0].problem or checked[0].state}); "
            f"python download_sdss_data.py --data-dir {data_dir} fetches files"
            + (
                "; a network of --modality spectrum needs no images"
                * all(entry.state == MISSING["images"] for entry in checked)
            )
        )
    for array in cache.arrays.values():
        array.rows = rows
    arrays = [cache.arrays[kind] if kind in kinds else None for kind in ROWS]
    usable = [checked[row].star for row in rows]
    missing = Counter(f"{entry.star.subclass}: {entry.state}" for entry in checked if entry.state.startswith("no "))
    return PreparedStars(usable, *arrays, torch.tensor([CLASS_NAMES.index(star.subclass) for star in usable])), {
        "rows_left_out": dict(left_out),
        "stars_missing": dict(missing),
        "set_aside": [entry.problem for entry in checked if entry.problem],
    }


def check_star(star: Star, paths: StarFiles, found: dict[str, Finding], kinds: tuple[str, ...]) -> CheckedStar:
    """Check whether a network that reads these kinds of file can use the star."""
    # Files that the network does not read still give the position, and whether the star is simulated.
    star = star._replace(simulated=star.simulated or any(finding.simulated for finding in found.values()))
    spectrum = found.get("spectra", Finding())
    if math.isnan(star.ra + star.dec):
        star = star._replace(ra=spectrum.ra, dec=spectrum.dec)
    if missing := [MISSING[kind] for kind in kinds if kind not in found]:
        return CheckedStar(star, ", ".join(missing))
    if damage := [f"{paths[kind]}: {found[kind].damage}" for kind in kinds if found[kind].damage]:
        return CheckedStar(star, "damaged", "; ".join(damage))
    if conflict := position_conflict(star.ra, star.dec, spectrum.ra, spectrum.dec):
        return CheckedStar(star, "misplaced", f"{paths['spectra']}: {conflict}")
    return CheckedStar(star)


def report_usable(checked: list[CheckedStar]) -> None:
    """Print, per class, how many stars are used, and how many are not and why; name each damaged or misplaced one."""
    states = ["used", *sorted({entry.state for entry in checked} - {"used"})]
    print("  ".join(["class", "listed", *states]))
    for label in (*CLASS_NAMES, "all"):
        counts = Counter(entry.state for entry in checked if label in (entry.star.subclass, "all"))
        print(f"{label:5}  {counts.total():6}  " + "  ".join(f"{counts[state]:{len(state)}}" for state in states))
    for entry in checked:
        if entry.problem:
            print(f"set aside: {entry.problem}")


def up_to_date_cache(data_dir: Path, files: dict[Star, StarFiles], num_workers: int) -> Cache:
    """The data directory's cache, made anew if it is not of these stars and files."""
    directory, wanted = data_dir / CACHE_DIR, files_digest(files)
    if cache := open_cache(directory, wanted):
        return cache
    try:
        directory.mkdir(exist_ok=True)
        waiting = "another run is reading these stars' files; waiting for it"
        with cli.file_lock(directory / ".lock", timeout=-1, waiting=waiting):
            if cache := open_cache(directory, wanted):  # the other run's
                return cache
            for leftover in directory.glob("partial-*"):  # of a killed run
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="partial-", dir=directory) as temporary:
                cache = make_cache(Path(temporary), wanted, files, num_workers)
                for name in (*ROWS, INDEX_FILE):
                    os.replace(Path(temporary, name), directory / name)
                return cache
    except OSError as error:
        reason = error.strerror or error
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{directory}: cannot be written ({reason}); for this run alone, the prepared stars go to {temporary}")
        return make_cache(Path(temporary), wanted, files, num_workers)  # open files outlive their names


def files_digest(files: dict[Star, StarFiles]) -> str:
    """A digest of the stars, their files' names and stamps, and the code and libraries that prepare them."""
    code = [Path(name).read_text(encoding="utf-8") for name in (survey_files.__file__, preparation.__file__, __file__)]
    versions = [library.__version__ for library in (astropy, np, PIL, scipy)]
    stars = [
        (star.spectrum_id, [path and (path.name, file_stamp(path)) for path in paths.values()])
        for star, paths in files.items()
    ]
    return hashlib.sha256(json.dumps([code, *versions, stars]).encode()).hexdigest()


def file_stamp(file: Path | int) -> list[int]:
    """Size in bytes and time of change in ns of a path or an open file."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def open_cache(directory: Path, wanted: str) -> Cache | None:
    """The cache of this digest; None if there is none, or it is damaged."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        arrays = {kind: CachedArray(directory / kind) for kind in ROWS}
        if index["digest"] != wanted or index["stamps"] != [array.stamp for array in arrays.values()]:
            return None
        findings = [{kind: Finding(*found) for kind, found in star.items()} for star in index["findings"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Cache(findings, arrays)


def make_cache(directory: Path, wanted: str, files: dict[Star, StarFiles], num_workers: int) -> Cache:
    """Decode all files into a cache in an empty directory, and open it."""
    for kind, dtype in ROWS.items():
        (directory / kind).touch()
        os.truncate(directory / kind, len(files) * dtype.itemsize)
    with parallel_map(num_workers if len(files) > FEW_STARS else 1) as map_stars:
        rows = map_stars(partial(decode_star, directory), range(len(files)), files.keys(), files.values())
        findings = list(cli.progress(rows, desc="reading the stars' files", unit="star", total=len(files)))
    arrays = {kind: CachedArray(directory / kind) for kind in ROWS}
    for array in arrays.values():
        os.fsync(array.file.fileno())
    # A file that could not be read is tried again by the next run.
    unreadable = any(finding.unreadable for found in findings for finding in found.values())
    index = {
        "digest": None if unreadable else wanted,
        "stamps": [array.stamp for array in arrays.values()],
        "findings": findings,
    }
    (directory / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return Cache(findings, arrays)


def decode_star(directory: Path, row: int, star: Star, paths: StarFiles) -> dict[str, Finding]:
    """Decode a star's files into its row of the arrays in `directory`; returns the findings in them."""
    found = {}
    for kind, path in paths.items():
        if path is None:
            continue
        found[kind], array = decode_file(kind, path, star)
        if array is None:
            continue
        assert np.dtype((array.dtype, array.shape)) == ROWS[kind], f"prepared as {array.dtype} {array.shape}"
        # Not through a mapping: its pages count as memory, and a full disk would kill the process.
        with open(directory / kind, "rb+") as file:
            file.seek(row * array.nbytes)
            file.write(array.tobytes())
    return found


def decode_file(kind: str, path: Path, star: Star) -> tuple[Finding, np.ndarray | None]:
    """The findings in one of a star's files, and its content prepared for the network; None if it is damaged."""
    finding = Finding()
    try:
        if kind == "images":
            cutout = survey_files.read_cutout(path)
            return Finding(simulated=cutout.simulated), preparation.prepare_cutout(cutout.pixels)
        spectrum = survey_files.read_spectrum(path, star)
        facts = ("ra", "dec", "simulated", "redshift", "subclass")
        finding = Finding(**{fact: getattr(spectrum, fact) for fact in facts})
        return finding, preparation.prepare_spectrum(spectrum)
    except DataError as error:
        damage, unreadable = str(error).removeprefix(f"{path}: "), isinstance(error, survey_files.UnreadableError)
        return finding._replace(damage=damage, unreadable=unreadable), None
