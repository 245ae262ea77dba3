"""Catalogues and files as chance makes them: every one is read right or refused, and none ends in a crash.

    MUTANTS=10000 python -m pytest tests/test_mutants.py       as many mutants of each file in place of 300

Neither SDSS's FITS files nor JPEG files carry a checksum: a flipped bit that leaves a possible flux or a possible
picture cannot be seen. What the tests ask is that nothing else comes through: the grid of wavelengths, the number of
pixels and the star's identity are right in every spectrum that is accepted, and few values differ in it.
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sdss_server
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
from data import DataError, Star

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
MUTANTS = int(os.environ.get("MUTANTS", "300"))
MOST_CHANGES = 20  # to a mutant
STAR = Star("a", "M0", 300, 52000, 7, 150.0, 1.0)


# The catalogue and its numbers


@given(st.integers(1, 2**14 - 1), st.integers(0, 2**14 - 1), st.integers(1, 2**12 - 1), st.integers(0, 2**14 - 1))
def test_a_spec_obj_id_comes_back_as_what_it_was_made_of(plate, days, fiberID, run2d):
    name = str(data.encode_spec_obj_id(plate, 50_000 + days, fiberID, run2d))
    *identity, version = data.decode_spec_obj_id(name)
    assert identity == [plate, 50_000 + days, fiberID]
    numbers = [int(number) for number in version.removeprefix("v").split("_")]
    assert run2d == (numbers[0] if run2d <= 104 else (numbers[0] - 5) * 10_000 + numbers[1] * 100 + numbers[2])


@given(st.text(max_size=25) | st.integers(-10, 2**65).map(str))
@example("307416612011534337")
@example("００１")
def test_what_decodes_is_a_spec_obj_id(name):
    decoded = data.decode_spec_obj_id(name)
    if decoded is not None:
        plate, mjd, fiberID, _ = decoded
        assert 0 < plate < 2**14 and 50_000 <= mjd < 50_000 + 2**14 and 0 < fiberID < 2**12
        value = int(name)
        assert value == data.encode_spec_obj_id(plate, mjd, fiberID, value >> 10 & 0x3FFF)


NAMES = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_ .+\-]{0,30}[A-Za-z0-9]\Z").filter(
    lambda name: not data._SPREADSHEET_NUMBER.fullmatch(name)
)
STARS = st.builds(
    Star,
    name=NAMES,
    subclass=st.sampled_from(data.CLASS_NAMES),
    plate=st.integers(1, 2**14 - 1),
    mjd=st.integers(50_000, 50_000 + 2**14 - 1),
    fiberID=st.integers(1, 2**12 - 1),
    ra=st.floats(0, 360),
    dec=st.floats(-90, 90),
    simulated=st.booleans(),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mutants") / "file"


@given(st.lists(STARS, min_size=1, max_size=8, unique_by=lambda star: star.spectrum_id), st.randoms())
def test_a_catalogue_comes_back_as_the_stars_that_were_written(path, stars, chance):
    columns = list(Star._fields)
    chance.shuffle(columns)
    rows = [[str(getattr(star, column)) for column in columns] for star in stars]
    quoted = [",".join(f'"{cell}"' if chance.random() < 0.5 else cell for cell in row) for row in [columns, *rows]]
    text = chance.choice(["", "\ufeff"]) + chance.choice(["\n", "\r\n"]).join(quoted)
    path.write_text(text, encoding="utf-8", newline="")
    assert data.read_catalog(path) == (stars, Counter())


CELLS = st.text(max_size=12) | st.sampled_from(["M0", "300", "52000", "7", "", "1e3", '"', "\0", "../x", "nan"])
TABLES = st.lists(st.lists(CELLS, max_size=8).map(",".join), max_size=5).map("\n".join)


@given(TABLES.map(lambda rows: ("name,subclass,plate,mjd,fiberID,ra,dec\n" + rows).encode()) | st.binary(max_size=200))
@example(b"\xef\xbb\xbf#Table1\nname,subclass,plate,mjd,fiberID\na,M0,1,52000,1")
@example(b"name,subclass,plate,mjd,fiberID\na,M\x1e0,1,52000,1")
def test_any_other_text_is_refused_or_gives_stars_that_can_be_named(path, content):
    path.write_bytes(content)
    for labelled in (True, False):
        try:
            stars, _ = data.read_catalog(path, labelled=labelled)
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            continue
        for star in stars:
            for file in (data.spectrum_path(Path("dir"), star), data.cutout_path(Path("dir"), star)):
                assert file.parts == ("dir", file.parts[1], *([star.subclass] if star.subclass else []), file.name)
                assert ".." not in file.parts and "\0" not in file.name and len(file.name.encode()) <= 255


# Files with flipped bits


def mutant(content: bytes, chance: random.Random) -> bytes:
    """One of the ways in which files are spoilt: some bytes changed, lost, doubled, zeroed or put elsewhere."""
    changed = bytearray(content)
    # Half of the mutants are spoilt in the headers, where few bytes mean much.
    end = len(content) if chance.random() < 0.5 else min(len(content), 8 * data.FITS_BLOCK)
    for _ in range(chance.choice([1, 1, 1, 2, 5, MOST_CHANGES])):
        place = chance.randrange(end)
        match chance.randrange(6):
            case 0 | 1:
                changed[place] ^= 1 << chance.randrange(8)
            case 2:
                changed[place] = chance.randrange(256)
            case 3:
                length = chance.choice([1, 80, 2880])
                changed[place : place + length] = bytes(len(changed[place : place + length]))
            case 4:
                length = chance.choice([1, 4, 80, 2880])
                del changed[place : place + length]
            case 5:
                length = chance.choice([1, 80, 2880])
                changed[place:place] = changed[place : place + length]
        end = min(end, len(changed))
    return bytes(changed)


def campaign(content: bytes, path: Path, check: Callable[[Path], None]) -> None:
    """`check` reads a mutant and compares it with the original; all may be refused but by a clear line."""
    accepted = 0
    for seed in range(MUTANTS):
        path.write_bytes(mutant(content, random.Random(seed)))
        try:
            check(path)
            accepted += 1
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, f"mutant {seed}"
        except Exception as error:
            raise AssertionError(f"mutant {seed}") from error
    print(f"{MUTANTS} mutants: {accepted} accepted, {MUTANTS - accepted} refused")
    assert 0 < accepted < MUTANTS  # both sides of the test are at work


@pytest.mark.filterwarnings("error")
def test_mutants_of_a_spectrum_are_refused_or_keep_their_wavelengths(path):
    content = sdss_server.make_spectrum_bytes(STAR)
    path.write_bytes(content)
    original = data.read_spectrum(path, STAR)
    pixels = np.rint(original.loglam * data.PIXELS_PER_DEX)

    def check(path: Path) -> None:
        spectrum = data.read_spectrum(path, STAR)
        x = data.prepare_spectrum(spectrum)
        assert x.shape == (data.SPECTRUM_LENGTH,) and np.isfinite(x).all()
        count = len(spectrum.loglam)  # less than all where the header's number of rows was hit
        assert len(pixels) - data.FITS_BLOCK // 32 < count <= len(pixels)
        assert np.array_equal(np.rint(spectrum.loglam * data.PIXELS_PER_DEX), pixels[:count])
        different = (spectrum.flux != original.flux[:count]) | (spectrum.ivar != original.ivar[:count])
        assert different.sum() <= MOST_CHANGES

    campaign(content, path, check)


@pytest.mark.filterwarnings("error")
def test_mutants_of_a_cutout_are_refused_or_pictures_of_the_same_size(path):
    def check(path: Path) -> None:
        pixels, _ = data.read_cutout(path, 128)
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8

    campaign(sdss_server.make_cutout_bytes(STAR.ra, STAR.dec), path, check)
