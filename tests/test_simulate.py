"""The simulated stars, judged by what an astronomer would measure on them."""

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from common import SHARED_DATA, run_script
from PIL import Image
from scipy.stats import spearmanr

import data
import simulate_sdss_data
from data import CLASS_NAMES
from simulate_sdss_data import simulate

PER_CLASS = 36


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """(directory, what the script printed)"""
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    result = run_script("simulate_sdss_data.py", directory, "--per-class", PER_CLASS, "--seed", 7)
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


@pytest.fixture(scope="module")
def directory(simulated):
    return simulated[0]


@pytest.fixture(scope="module")
def stars(directory):
    stars, left_out = data.read_catalog(data.catalog_path(directory))
    assert not left_out
    return stars


@pytest.fixture(scope="module")
def tables(directory, stars):
    """Of each star, HDU 1 of its spectrum, and the row of HDU 2."""
    return [
        (fits.getdata(data.spectrum_path(directory, star), 1), fits.getdata(data.spectrum_path(directory, star), 2)[0])
        for star in stars
    ]


@pytest.fixture(scope="module")
def catalog(directory):
    return pd.read_csv(data.catalog_path(directory), dtype={"name": str})


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def vacuum(air):
    """Morton 1991, independent of the simulator's formula."""
    return air * (1 + 2.735182e-4 + 131.4182 / air**2 + 2.76249e8 / air**4)


def mean_flux(table, low, high):
    """Mean flux of the good pixels in an interval of air wavelengths, NaN without any."""
    wavelength = 10 ** table["loglam"].astype(float)
    inside = (wavelength > vacuum(low)) & (wavelength < vacuum(high)) & (table["ivar"] > 0)
    return table["flux"][inside].mean() if inside.any() else np.nan


def test_every_star_has_its_files_and_they_can_be_read(directory, stars):
    assert [sum(star.subclass == name for star in stars) for name in CLASS_NAMES] == [PER_CLASS] * 5
    assert [star.subclass for star in stars] != sorted(star.subclass for star in stars), "rows are in random order"
    for star in stars:
        assert data.load_spectrum(directory, star).shape == (data.SPECTRUM_LENGTH,)
        assert data.load_cutout(directory, star).shape == (3, data.IMAGE_SIZE, data.IMAGE_SIZE)
        spectrum = data.read_spectrum(data.spectrum_path(directory, star), star)
        assert (spectrum.ra, spectrum.dec) == (star.ra, star.dec)
    assert len(contents(directory)) == 2 * len(stars) + 1


def test_it_says_what_it_made_and_what_to_do_next(simulated):
    directory, printed = simulated
    assert f"{5 * PER_CLASS} SIMULATED stars" in printed
    assert f"python train.py --data-dir {directory}" in printed


def test_every_file_says_that_it_is_simulated(directory, stars, catalog):
    assert all(star.simulated for star in stars)
    assert (catalog["simulated"] == 1).all()
    for star in stars[:10]:
        header = fits.getheader(data.spectrum_path(directory, star))
        assert header["SIMULATD"] is True
        assert "not an observation" in str(header["COMMENT"])
        with Image.open(data.cutout_path(directory, star)) as image:
            assert b"SIMULATED" in image.info["comment"]


def test_names_and_positions_are_those_of_sdss(stars):
    assert len({star.spectrum_id for star in stars}) == len({star.name for star in stars}) == len(stars)
    run2ds = set()
    for star in stars:
        *identifiers, run2d = data.decode_spec_obj_id(star.name)
        assert identifiers == [star.plate, star.mjd, star.fiberID]
        assert (run2d == "26" and star.plate < 1960) or (run2d == "v5_13_0" and star.plate >= 3523)
        run2ds.add(run2d)
    assert run2ds == {"26", "v5_13_0"}
    ra, dec = np.radians([(star.ra, star.dec) for star in stars]).T
    cosines = np.sin(dec[:, None]) * np.sin(dec) + np.cos(dec[:, None]) * np.cos(dec) * np.cos(ra[:, None] - ra)
    assert np.degrees(np.arccos(np.clip(cosines[~np.eye(len(ra), dtype=bool)], -1, 1))).min() > 2 / 3600


def test_spectra_have_the_format_of_lite_files(directory, stars):
    boss = 0
    for star in stars:
        path = data.spectrum_path(directory, star)
        assert path.stat().st_size % 2880 == 0
        with fits.open(path) as hdus:
            is_boss = star.plate >= 3523
            boss += is_boss
            assert [hdu.name for hdu in hdus] == ["PRIMARY", "COADD", "SPALL" if is_boss else "SPECOBJ", "SPZLINE"]
            assert "DATE" not in hdus[0].header
            assert abs(hdus[0].header["DEC"] - star.dec) < 1.5, "RA and DEC of the header are the plate's"
            table = hdus[1].data
            assert table.names == ["flux", "loglam", "ivar", "and_mask", "or_mask", "wdisp", "sky", "model"]
            assert table.dtype["flux"] == np.dtype(">f4") and table.dtype["loglam"] == np.dtype(">f4")
            pixel = np.rint(table["loglam"].astype(float) * data.PIXELS_PER_DEX)
            assert (table["loglam"] == (pixel / data.PIXELS_PER_DEX).astype(np.float32)).all()
            start, lengths = (35_545, (4580, 4620)) if is_boss else (35_800, (3820, 3850))
            assert start <= pixel[0] < start + 16 and lengths[0] <= len(pixel) <= lengths[1]
            assert pixel[0] <= data.FIRST_PIXEL and pixel[-1] >= data.FIRST_PIXEL + data.SPECTRUM_LENGTH - 1
            row = hdus[2].data[0]
            assert (row["CLASS"], row["SUBCLASS"], row["PLATE"]) == ("STAR", star.subclass, star.plate)
    assert boss == round(0.2 * len(stars))


def test_noise_agrees_with_ivar_and_with_the_stated_signal_to_noise(tables):
    deviations = []
    for table, row in tables:
        good = table["ivar"] > 0
        deviations.append(((table["flux"] - table["model"]) * np.sqrt(table["ivar"]))[good])
        assert row["SN_MEDIAN_ALL"] == pytest.approx(
            np.median((table["flux"] * np.sqrt(table["ivar"]))[good]), rel=1e-5
        )
        assert 5 * 0.95 < row["SN_MEDIAN_ALL"] < 60 * 1.05
    low, high = np.percentile(np.concatenate(deviations), (15.87, 84.13))
    assert (high - low) / 2 == pytest.approx(1, abs=0.01)
    signal_to_noise = [row["SN_MEDIAN_ALL"] for _, row in tables]
    assert min(signal_to_noise) < 8 and max(signal_to_noise) > 40


def test_the_noise_has_the_shape_of_sdss(tables):
    """More of it in the blue, at the join of the cameras and on night-sky lines than next to them."""
    spectra = [table for table, row in tables if row["RUN2D"] == "26" and row["SN_MEDIAN_ALL"] < 15]
    sigma = np.median(
        [[1 / np.sqrt(noise(table, w)) for w in (3900, 5300, 5570, 5577, 5980, 6200)] for table in spectra], 0
    )
    assert sigma[0] > 2 * sigma[1]
    assert sigma[3] > 1.3 * sigma[2]
    assert sigma[4] > 1.15 * sigma[5]


def noise(table, wavelength):
    near = np.abs(10 ** table["loglam"].astype(float) - vacuum(wavelength)) < 5
    return np.median(table["ivar"][near & (table["ivar"] > 0)]) if (near & (table["ivar"] > 0)).any() else np.nan


def test_bad_pixels_are_there_and_are_filled(directory, stars, tables):
    bad_fraction = np.array([(table["ivar"] == 0).mean() for table, _ in tables])
    assert 0.001 < np.median(bad_fraction) < 0.03 and bad_fraction.max() < 0.2
    errors = []
    for star, (table, _) in zip(stars, tables, strict=True):
        assert np.isfinite(table["flux"]).all()
        index = np.rint(table["loglam"].astype(float) * data.PIXELS_PER_DEX).astype(int) - data.FIRST_PIXEL
        bad = (table["ivar"] == 0) & (index >= 0) & (index < data.SPECTRUM_LENGTH)
        assert (table["and_mask"][table["ivar"] == 0] != 0).all()
        median = np.median(table["flux"][(table["ivar"] > 0) & (index >= 0) & (index < data.SPECTRUM_LENGTH)])
        errors += list(data.load_spectrum(directory, star)[index[bad]] - table["model"][bad] / median)
    assert np.percentile(np.abs(errors), 90) < 0.3, "the filled pixels follow the star"


def test_titanium_oxide_tells_the_subclass(tables):
    """TiO5 and its relation to spectral type, Sp = −10.775·TiO5 + 8.2 (Reid, Hawley & Gizis 1995).

    SDSS's own M0–M4 are earlier on that relation: it gives the Kesseli et al. (2017) templates, in the
    mean, 0.9 subclasses less than their class. The simulated stars must lie where SDSS's do.
    """
    subclass, types = [], []
    for table, row in tables:
        if row["SN_MEDIAN_ALL"] > 20:
            tio5 = mean_flux(table, 7126, 7135) / mean_flux(table, 7042, 7046)
            subclass.append(int(row["SUBCLASS"][1]))
            types.append(-10.775 * tio5 + 8.2)
    subclass, types = np.array(subclass)[np.isfinite(types)], np.array(types)[np.isfinite(types)]
    assert len(types) > 50
    assert np.corrcoef(subclass, types)[0, 1] > 0.93
    difference = types - subclass
    assert difference.mean() == pytest.approx(-0.9, abs=0.4)
    assert difference.std() < 0.6, "the scatter of real dwarfs about the relation is 0.5"


def test_calcium_hydride_is_that_of_dwarfs(tables):
    """CaH2 and CaH3 (Reid, Hawley & Gizis 1995): the mean of each class within 0.06 of the SDSS templates'."""
    for numerator, expected in (
        ((6814, 6846), (0.85, 0.71, 0.65, 0.51, 0.45)),
        ((6960, 6990), (0.93, 0.87, 0.84, 0.75, 0.71)),
    ):
        for name, value in zip(CLASS_NAMES, expected, strict=True):
            indices = [
                mean_flux(table, *numerator) / mean_flux(table, 7042, 7046)
                for table, row in tables
                if row["SUBCLASS"] == name and row["SN_MEDIAN_ALL"] > 10
            ]
            assert np.nanmedian(indices) == pytest.approx(value, abs=0.06), name


def test_colours_follow_the_subclass_in_catalogue_and_image(directory, stars, catalog):
    r_i = (catalog["r_mag"] - catalog["i_mag"]).to_numpy()
    medians = [np.median(r_i[catalog["subclass"] == name]) for name in CLASS_NAMES]
    np.testing.assert_allclose(medians, (0.72, 0.86, 1.01, 1.22, 1.43), atol=0.07)  # of objects.csv, r < 19
    core = slice(data.IMAGE_SIZE // 2 - 6, data.IMAGE_SIZE // 2 + 6)
    cores = np.array([data.load_cutout(directory, star)[:, core, core].mean(axis=(1, 2)) for star in stars])
    assert spearmanr(cores[:, 0] / cores[:, 1], r_i).statistic > 0.75
    assert spearmanr(cores.sum(axis=1), -catalog["r_mag"]).statistic > 0.9, "bright stars are bright in their image"


def test_bright_stars_have_the_better_spectra(tables, catalog):
    signal_to_noise = [row["SN_MEDIAN_ALL"] for _, row in tables]
    assert spearmanr(signal_to_noise, catalog["r_mag"]).statistic < -0.8
    assert catalog["r_mag"].min() > 14.5 and catalog["r_mag"].max() < 21.5


def test_class_means_agree_with_real_templates(directory, stars):
    path = SHARED_DATA / "sdss_m_templates.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there: the SDSS templates of Kesseli et al. (2017) are not part of the project")
    templates = np.load(path)
    template_pixel = np.rint(templates["loglam"].astype(float) * data.PIXELS_PER_DEX).astype(int)
    window = np.isin(template_pixel, data.FIRST_PIXEL + np.arange(data.SPECTRUM_LENGTH))
    for name in CLASS_NAMES:
        median = np.median([data.load_spectrum(directory, star) for star in stars if star.subclass == name], axis=0)
        template = templates[f"{name}_+0.0_flux"][window]
        difference = median / np.median(median) - template / np.nanmedian(template)
        assert np.nanstd(difference) < 0.13, name


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        simulate(tmp_path / name, per_class=2, seed=seed)
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "again")
    assert not set(first) & set(contents(tmp_path / "other")) - {"objects.csv"}


def test_a_directory_with_something_in_it_is_refused_and_kept(tmp_path):
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "notes.txt").write_text("keep")
    result = run_script("simulate_sdss_data.py", directory, "--per-class", 1)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "not an empty directory" in result.stderr
    assert contents(tmp_path) == {"mine/notes.txt": b"keep"}


def test_an_empty_directory_is_filled(tmp_path):
    assert len(simulate(tmp_path, per_class=1, seed=1)) == 5
    assert data.catalog_path(tmp_path).exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--per-class", 0), "--per-class"),
        (("--seed", -1), "--seed"),
        (("--boss-fraction", 1.5), "--boss-fraction"),
        (("--min-snr", 30, "--max-snr", 10), "--min-snr 30.0 is above --max-snr 10.0"),
        (("--min-snr", "nan"), "--min-snr"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(tmp_path, options, message):
    result = run_script("simulate_sdss_data.py", tmp_path / "stars", *options)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate_sdss_data, "write_fits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "stars", per_class=1, seed=1)
    assert not list(tmp_path.iterdir())


def test_nothing_but_the_wanted_signal_to_noise_and_grid(tmp_path):
    stars = simulate(tmp_path / "stars", per_class=3, seed=2, boss_fraction=1, min_snr=40, max_snr=40)
    assert all(star.plate >= 3523 for star in stars)
    for star in stars:
        row = fits.getdata(data.spectrum_path(tmp_path / "stars", star), 2)[0]
        assert row["SN_MEDIAN_ALL"] == pytest.approx(40, rel=0.1)
