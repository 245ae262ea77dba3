"""The stars' files, each decoded once: what was prepared from them is kept in two arrays on the disk.

    data directory/.cache/
        spectra.npy     (N, 3522) float32, a row a star; rows without a usable file are not written
        images.npy      (N, 3, 128, 128) uint8, likewise
        index.json      of each file: its row, its size and time of change, and what was found in it

A row counts as long as its file has the size and time that the index states, and the index as long as
both arrays and the way of preparing are those that it was written for. What does not count is decoded
again. Whoever deletes the directory loses nothing but that time.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import PIL
import torch
from filelock import FileLock, Timeout
from torch import Tensor

import data
from data import CLASS_NAMES, DataError, Star

CACHE_DIR = ".cache"
# dtype and shape of a row of each array
ROWS = {
    "spectra": (np.dtype(np.float32), (data.SPECTRUM_LENGTH,)),
    "images": (np.dtype(np.uint8), (3, data.IMAGE_SIZE, data.IMAGE_SIZE)),
}
NO_FILE = {"spectra": "no spectrum", "images": "no image"}
INDEX_FILE = "index.json"
COPIED_ROWS = 256  # at once, from the cache before to the one in the making
# The code that runs; the files may be edited meanwhile.
SOURCES = b"".join(Path(module_file).read_bytes() for module_file in (data.__file__, __file__))
FEW_FILES = 256  # so many are decoded before worker processes would have started


class Finding(NamedTuple):
    """What was found in a file when it was decoded."""

    damage: str = ""  # why it cannot be used, without the file's name; "" if it can
    final: bool = True  # False if the file could not be read: the next run tries again
    ra: float = math.nan  # degrees, as a spectrum states them
    dec: float = math.nan
    simulated: bool = False  # as the file states it


class Entry(NamedTuple):
    """A file in the index."""

    row: int  # of the array
    stamp: list[int]  # the file's, when it was decoded
    finding: Finding


class CheckedStar(NamedTuple):
    """A star of the catalogue; `missing` and `damage` say why it cannot be used ("" if it can)."""

    star: Star  # with the position in its spectrum where the catalogue has none
    missing: str = ""  # "no spectrum", "no image" or both
    damage: str = ""  # what is wrong, with the file's name


def file_stamp(file: Path | str | int) -> list[int] | None:
    """Size in bytes and time of change in ns of a path or an open file; None if there is no such file."""
    try:
        stat = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


class CachedArray:
    """Chosen rows of one of the cache's arrays, (len(rows), …); indexed like a tensor, it reads them from the disk.

    The file stays open: a cache that is deleted or made anew does not change what a run reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = open(path, "rb")  # noqa: SIM115, for as long as this object lives
        self.stamp = file_stamp(self.file.fileno())
        np.lib.format.read_magic(self.file)
        self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.file)
        self.offset = self.file.tell()
        self.rows = np.arange(self.shape[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Tensor | np.ndarray) -> Tensor:
        if file_stamp(self.file.fileno()) != self.stamp:
            raise DataError(f"{self.path}: was changed while it was read; run again, and it is made anew")
        # Mapped for one batch at a time: pages once read would count, and stay, as this process's memory.
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.ndarray(self.shape, self.dtype, mapped, self.offset)
        return torch.from_numpy(array[self.rows[np.asarray(indices)]])


class Cache(NamedTuple):
    """An opened cache."""

    entries: dict[str, Entry]  # by the file's path below the data directory
    arrays: dict[str, CachedArray]  # by name, all rows

    def knows(self, name: str, stamp: list[int]) -> bool:
        """Whether the file of this stamp is in it."""
        entry = self.entries.get(name)
        return entry is not None and entry.stamp == stamp and entry.finding.final


def open_stars(
    stars: list[Star], data_dir: Path, *, spectra: bool, images: bool, num_workers: int
) -> tuple[list[CheckedStar], dict[str, CachedArray]]:
    """Which of the stars can be used, as far as spectra and images are wanted; and those arrays, "spectra" (N, 3522)
    and "images" (N, 3, 128, 128), of the N usable stars, in their order.

    New and changed files are decoded first, in `num_workers` processes, under a progress bar.
    """
    listed = [(star, star_files(star)) for star in stars]
    stamps = {
        name: stamp for _, files in listed for name in files.values() if (stamp := file_stamp(f"{data_dir}/{name}"))
    }
    cache = up_to_date_cache(data_dir, listed, stamps, num_workers)
    kinds = [kind for kind, wanted in (("spectra", spectra), ("images", images)) if wanted]
    found = {name: cache.entries[name].finding for name in stamps}
    checked = [check_star(star, files, found, data_dir, kinds) for star, files in listed]
    usable = [files for (_, files), star in zip(listed, checked, strict=True) if not (star.missing or star.damage)]
    for kind in kinds:
        cache.arrays[kind].rows = np.array([cache.entries[files[kind]].row for files in usable], dtype=np.int64)
    return checked, {kind: cache.arrays[kind] for kind in kinds}


def star_files(star: Star) -> dict[str, str]:
    """By array, the path below the data directory of the file that the star's row is made from."""
    paths = {"spectra": data.spectrum_path(Path(), star), "images": data.cutout_path(Path(), star)}
    return {kind: path.as_posix() for kind, path in paths.items()}


def check_star(
    star: Star, files: dict[str, str], found: dict[str, Finding], data_dir: Path, kinds: list[str]
) -> CheckedStar:
    missing = [NO_FILE[kind] for kind in kinds if files[kind] not in found]
    if missing:
        return CheckedStar(star, missing=", ".join(missing))
    # A file that is not wanted still tells whether its star is simulated, and a spectrum where it is.
    simulated = any(name in found and found[name].simulated for name in files.values())
    star = star._replace(simulated=star.simulated or simulated)
    spectrum = found.get(files["spectra"], Finding())
    if not (math.isfinite(star.ra) and math.isfinite(star.dec)):
        star = star._replace(ra=spectrum.ra, dec=spectrum.dec)
    damage = [f"{data_dir / files[kind]}: {found[files[kind]].damage}" for kind in kinds if found[files[kind]].damage]
    return CheckedStar(star, damage="; ".join(damage))


class PreparedStars(NamedTuple):
    """The usable stars. Indexed, the arrays give tensors; an input the modality does not read is None."""

    stars: list[Star]
    spectra: CachedArray | Tensor | None  # (N, 3522) float32
    images: CachedArray | Tensor | None  # (N, 3, 128, 128) uint8
    targets: Tensor  # (N,) int64, indices into CLASS_NAMES


def read_stars(data_dir: Path, modality: str, num_workers: int) -> tuple[PreparedStars, dict[str, Any]]:
    """The usable stars of a data directory, after telling what is in it; and what could not be used, and why."""
    stars, left_out = data.read_catalog(data.catalog_path(data_dir))
    for reason, count in left_out.items():
        print(f"{count} row(s) of the catalogue left out: {reason}")
    checked, arrays = open_stars(
        stars, data_dir, spectra=modality != "image", images=modality != "spectrum", num_workers=num_workers
    )
    report_usable(checked)
    usable = [entry.star for entry in checked if not (entry.missing or entry.damage)]
    if not usable:
        raise DataError(
            f"{data_dir}: none of the {len(stars)} stars of its objects.csv can be used; "
            f"python download_sdss_data.py --data-dir {data_dir} fetches their files"
        )
    prepared = PreparedStars(
        stars=usable,
        spectra=arrays.get("spectra"),
        images=arrays.get("images"),
        targets=torch.tensor([CLASS_NAMES.index(star.subclass) for star in usable]),
    )
    return prepared, {
        "rows_left_out": dict(left_out),
        "stars_missing": dict(Counter(f"{entry.star.subclass}: {entry.missing}" for entry in checked if entry.missing)),
        "set_aside": [entry.damage for entry in checked if entry.damage],
    }


def report_usable(checked: list[CheckedStar]) -> None:
    """Print, per class, how many stars are used, and how many are not and why; name each damaged file."""
    states = ["damaged" if entry.damage else entry.missing or "used" for entry in checked]
    table = pd.crosstab([entry.star.subclass for entry in checked], states, margins=True, margins_name="all")
    columns = sorted(set(states), key=lambda state: (state != "used", state))
    table = table[["all", *columns]].rename(columns={"all": "listed"})
    print(table.rename_axis(index=None, columns="class").to_string())
    for entry in checked:
        if entry.damage:
            print(f"set aside: {entry.damage}")


# Opening the cache, or making it


def up_to_date_cache(
    data_dir: Path, listed: list[tuple[Star, dict[str, str]]], stamps: dict[str, list[int]], num_workers: int
) -> Cache:
    """The data directory's cache, with all files of these stamps in it."""

    def is_current(cache: Cache | None) -> bool:
        return cache is not None and all(cache.knows(name, stamp) for name, stamp in stamps.items())

    directory = data_dir / CACHE_DIR
    cache = open_cache(directory)
    if is_current(cache):
        return cache
    try:
        directory.mkdir(exist_ok=True)
        with only_one_maker(directory):
            cache = open_cache(directory)  # another run may just have made it
            if not is_current(cache):
                cache = make_cache(directory, cache, data_dir, listed, stamps, num_workers)
            return cache
    except OSError as error:
        reason = error.strerror or error
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{directory}: cannot be written ({reason}); for this run alone, the prepared stars go to {temporary}")
        # Open files outlive their names.
        return make_cache(Path(temporary), cache, data_dir, listed, stamps, num_workers)


@contextlib.contextmanager
def only_one_maker(directory: Path) -> Iterator[None]:
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("another run is reading these stars' files; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_cache(directory: Path) -> Cache | None:
    """The cache in a directory; None if there is none, or none that counts."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        arrays = {kind: CachedArray(array_path(directory, kind)) for kind in ROWS}
        if index["preparation"] != preparation() or index["arrays"] != {kind: a.stamp for kind, a in arrays.items()}:
            return None
        # What is mapped as another type would be taken for what it is not, pointers included.
        if any((array.dtype, array.shape[1:]) != ROWS[kind] for kind, array in arrays.items()):
            return None
        entries = {name: Entry(row, stamp, Finding(*found)) for name, (row, stamp, found) in index["entries"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # absent, or damaged
        return None
    return Cache(entries, arrays)


def array_path(directory: Path, kind: str) -> Path:
    return directory / f"{kind}.npy"


def preparation() -> str:
    """A fingerprint of all that turns a file into a row, so that nobody has to remember a version number."""
    constants = {name: value for name, value in vars(data).items() if name.isupper()}  # some may be patched
    settings = repr((constants, np.__version__, PIL.__version__))
    return hashlib.sha256(SOURCES + settings.encode()).hexdigest()


def make_cache(
    directory: Path,
    old: Cache | None,
    data_dir: Path,
    listed: list[tuple[Star, dict[str, str]]],
    stamps: dict[str, list[int]],
    num_workers: int,
) -> Cache:
    """Write the cache of these stars, unchanged rows from the old one, all others from their files; and open it."""
    data.remove_leftovers(array_path(directory, "*"))
    data.remove_leftovers(directory / INDEX_FILE)
    entries: dict[str, Entry] = {}
    copies: dict[str, list[tuple[int, int]]] = {kind: [] for kind in ROWS}
    to_decode: list[Task] = []
    for row, (star, files) in enumerate(listed):
        for kind, name in files.items():
            if name not in stamps:
                continue
            if old and old.knows(name, stamps[name]):
                copies[kind].append((old.entries[name].row, row))
                entries[name] = old.entries[name]._replace(row=row)
            else:
                to_decode.append(Task(kind, row, star, name))

    # Both arrays first, then the index that states their stamps: what a killed run leaves does not count.
    with contextlib.ExitStack() as stack:
        targets = {}
        for kind, (dtype, shape) in ROWS.items():
            path = stack.enter_context(data.write_atomically(array_path(directory, kind)))
            targets[kind] = Target(path, np.lib.format.open_memmap(path, "w+", dtype, (len(listed), *shape)).offset)
        for kind, rows in copies.items():
            for start in data.progress(
                range(0, len(rows), COPIED_ROWS), desc=f"keeping {kind}", unit="block", disable=not rows
            ):
                old_rows, new_rows = np.array(rows[start : start + COPIED_ROWS]).T
                for row, array in zip(new_rows, old.arrays[kind][old_rows].numpy(), strict=True):
                    targets[kind].write(row, array)
        findings = decode_files(to_decode, data_dir, targets, num_workers)
    for task, finding in zip(to_decode, findings, strict=True):
        entries[task.name] = Entry(task.row, stamps[task.name], finding)
    index = {
        "preparation": preparation(),
        "arrays": {kind: file_stamp(array_path(directory, kind)) for kind in ROWS},
        "entries": entries,
    }
    with data.write_atomically(directory / INDEX_FILE) as temporary:
        temporary.write_text(json.dumps(index), encoding="utf-8")
    cache = open_cache(directory)
    if cache is None:
        raise DataError(f"{directory}: was changed while it was made; run again")
    return cache


class Task(NamedTuple):
    """A file to decode into a row."""

    kind: str
    row: int
    star: Star
    name: str


class Target(NamedTuple):
    """An array in the making."""

    path: Path
    offset: int  # of row 0, in bytes

    def write(self, row: int, array: np.ndarray) -> None:
        # Not through a mapping: what is mapped counts as memory, and a full disk would kill the process.
        with open(self.path, "rb+", buffering=0) as file:
            file.seek(self.offset + int(row) * array.nbytes)
            file.write(array.tobytes())


def decode_files(tasks: list[Task], data_dir: Path, targets: dict[str, Target], num_workers: int) -> list[Finding]:
    decode = partial(decode_file, data_dir=data_dir, targets=targets)
    progress = partial(data.progress, desc="reading the stars' files", unit="file", total=len(tasks))
    if num_workers <= 1 or len(tasks) <= FEW_FILES:
        return [decode(task) for task in progress(tasks)]
    # Ctrl-C comes to all processes of a terminal; this one ends the others.
    with ProcessPoolExecutor(num_workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            return list(progress(pool.map(decode, tasks, chunksize=32)))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def decode_file(task: Task, data_dir: Path, targets: dict[str, Target]) -> Finding:
    path, finding = data_dir / task.name, Finding()
    try:
        if task.kind == "spectra":
            spectrum = data.read_spectrum(path, task.star)
            finding = Finding(ra=spectrum.ra, dec=spectrum.dec, simulated=spectrum.simulated)
            array = data.prepare_spectrum(spectrum)
        else:
            cutout = data.read_cutout(path)
            finding = Finding(simulated=cutout.simulated)
            array = data.prepare_cutout(cutout.pixels)
    except DataError as error:
        damage = str(error).removeprefix(f"{path}: ")
        return finding._replace(damage=damage, final=not isinstance(error, data.UnreadableError))
    dtype, shape = ROWS[task.kind]
    assert (array.dtype, array.shape) == (dtype, shape), f"prepared as {array.dtype} {array.shape}, not as ROWS says"
    targets[task.kind].write(task.row, array)
    return finding
