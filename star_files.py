"""Names and places of a star's files: where they are written, and where they are found.

    data directory/
        objects.csv                                     the catalogue
        spectra/{subclass}/spec-{plate}-{mjd}-{fiberID}.fits, or spectra/{file}
        images/{subclass}/{name}_image.jpg

Scripts write there; a star of no class M0 to M4 has no {subclass}/ in its paths. A star's file is found by its
name anywhere below spectra/ and images/, as in SDSS's own archive (spectra/{plate}/...).
"""

import functools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from catalog import Star
from cli import DataError
from survey_files import UnreadableError, read_bytes

# SDSS's names of spectra: spec-PLATE-MJD-FIBER.fits; until DR7 spSpec-MJD-PLATE-FIBER.fit
_SPECTRUM_NAME = re.compile(r"sp(ec|spec)-(\d+)-(\d+)-(\d+)\.fits?(\.gz)?", re.IGNORECASE | re.ASCII)
_CUTOUT_NAME = re.compile(r"(.+)_image\.jpe?g", re.IGNORECASE)


def catalog_path(data_dir: Path) -> Path:
    return Path(data_dir) / "objects.csv"


def spectrum_path(data_dir: Path, star: Star) -> Path:
    """Where a star's spectrum is written."""
    return Path(data_dir) / "spectra" / (star.file or Path(star.class_name, f"spec-{star.spectrum_id}.fits"))


def cutout_path(data_dir: Path, star: Star) -> Path:
    """Where a star's cutout is written."""
    return Path(data_dir) / "images" / star.class_name / f"{star.name}_image.jpg"


def spectrum_numbers(name: str) -> tuple[int, int, int] | None:
    """plate, mjd, fiberID in SDSS's name of a spectrum; None for another name."""
    if not (match := _SPECTRUM_NAME.fullmatch(name)):
        return None
    first, second, fiberID = map(int, match.group(2, 3, 4))
    plate, mjd = (first, second) if match[1].lower() == "ec" else (second, first)
    return plate, mjd, fiberID


class FileIndex:
    """The stars' files below spectra/ and images/, as they were at the first look-up in each."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)

    def spectrum(self, star: Star) -> Path | None:
        """The star's spectrum, None if there is none. Raises DataError if two files for it differ."""
        if star.file:
            path = spectrum_path(self.data_dir, star)
            return path if path.is_file() else None
        return _only(self._spectra.get((star.plate, star.mjd, star.fiberID), []))

    def files(self, star: Star) -> dict[str, Path | None]:
        """The star's spectrum and cutout, by the names of their arrays in the cache; None where there is none."""
        return {"spectra": self.spectrum(star), "images": self.cutout(star)}

    def cutout(self, star: Star) -> Path | None:
        """The star's cutout, None if there is none. Raises DataError if two files for it differ."""
        return _only(self._cutouts.get(star.name, []))

    @functools.cached_property
    def _spectra(self) -> dict[tuple[int, int, int], list[str]]:
        """By plate, mjd and fiberID, as numbers: a name's leading zeros do not matter."""
        paths = defaultdict(list)
        for folder, name in _walk(self.data_dir / "spectra"):
            if numbers := spectrum_numbers(name):
                paths[numbers].append(os.path.join(folder, name))
        return dict(paths)

    @functools.cached_property
    def _cutouts(self) -> dict[str, list[str]]:
        """By the star's name, in the catalogue's Unicode form: some file systems decompose accents."""
        paths = defaultdict(list)
        for folder, name in _walk(self.data_dir / "images"):
            if match := _CUTOUT_NAME.fullmatch(name):
                paths[unicodedata.normalize("NFC", match[1])].append(os.path.join(folder, name))
        return dict(paths)


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of each file below `root`; hidden ones, such as partial files, do not count."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise UnreadableError(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from ((folder, name) for name in names if not name.startswith("."))


def _only(paths: list[str]) -> Path | None:
    """The first of the paths, None if there is none. Raises DataError if the files differ."""
    first, *others = map(Path, sorted(paths)) if paths else (None,)
    for other in others:
        if read_bytes(first) != read_bytes(other):
            raise DataError(f"{first} and {other}: two files for one star differ; delete one")
    return first
