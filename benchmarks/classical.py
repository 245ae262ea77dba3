"""Classical methods that an astronomer would try first, on spectra as they come: flux over its median.

training, test = observed_stars(Path("training")), observed_stars(Path("test"))
predictions = methods(seed=1)["random forest"].classify(training, test)    # (N,) class indices
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from template_stars import read_templates

from cache import read_stars
from catalog import CLASS_NAMES
from indices import BANDS, measure_indices
from outliers import summarise_spectra
from preparation import WAVELENGTH
from star_files import catalog_path

# Files of mean spectra in a --templates-dir; see template_stars.py.
TEMPLATES = {"kesseli": "sdss_m_templates.npz", "bochanski": "bochanski_m_templates.npz"}

TIO5_RELATION = (-10.775, 8.200)  # subclass = slope · TiO5 + constant: Reid, Hawley & Gizis 1995 (AJ 110, 1838)
MAX_INDEX = 2.0  # the indices' continuum is three pixels wide: of a faint star it may be near zero


class ObservedStars(NamedTuple):
    spectra: np.ndarray  # (N, 2, 3522): flux over its median, and its inverse variance
    magnitudes: np.ndarray  # (N, 5): u g r i z of the catalogue
    targets: np.ndarray  # (N,) class indices

    def __getitem__(self, rows: np.ndarray) -> "ObservedStars":
        return ObservedStars(*(values[rows] for values in tuple(self)))


def observed_stars(directory: Path) -> ObservedStars:
    """The usable stars of a data directory whose catalogue has magnitudes, in the order of `read_stars`."""
    prepared, _ = read_stars(directory, "fusion", num_workers=1)
    catalog = pd.read_csv(catalog_path(directory), dtype={"name": str}).set_index("name")
    magnitudes = catalog.loc[[star.name for star in prepared.stars], [f"{band}_mag" for band in "ugriz"]]
    return ObservedStars(prepared.spectra[:].numpy(), magnitudes.to_numpy(), prepared.targets.numpy())


def median_snr(spectra: np.ndarray) -> np.ndarray:
    """(N,): the median signal to noise of the good pixels of prepared spectra (N, 2, 3522)."""
    flux, ivar = spectra[:, 0], spectra[:, 1]
    return np.nanmedian(np.where(ivar > 0, flux * np.sqrt(ivar), np.nan), axis=1)


def template_files(templates_dir: Path | None) -> dict[str, Path]:
    """The files of TEMPLATES that are in the directory, by name."""
    paths = {name: templates_dir / file for name, file in TEMPLATES.items()} if templates_dir else {}
    return {name: path for name, path in paths.items() if path.exists()}


# Features of N stars


def spectra(stars: ObservedStars) -> np.ndarray:
    """(N, 2, 3522)."""
    return stars.spectra


def flux(stars: ObservedStars) -> np.ndarray:
    """(N, 3522)."""
    return stars.spectra[:, 0]


def band_means(stars: ObservedStars) -> np.ndarray:
    """(N, 32): the mean flux of 32 equal pieces of the spectrum, as many as the network has spectrum tokens."""
    return summarise_spectra(torch.from_numpy(stars.spectra)).numpy()


def spectral_indices(stars: ObservedStars) -> np.ndarray:
    """(N, 3): TiO5, CaH2 and CaH3; 1, no absorption, where one cannot be measured."""
    measured = np.array([itemgetter(*BANDS)(measure_indices(star)) for star in stars.spectra])
    return np.clip(np.nan_to_num(measured, nan=1.0), 0, MAX_INDEX)


def colours(stars: ObservedStars) -> np.ndarray:
    """(N, 4): u−g, g−r, r−i, i−z."""
    return -np.diff(stars.magnitudes, axis=1)


# The methods


class TemplateFit(ClassifierMixin, BaseEstimator):
    """The class whose template (classes, 3522) has the least χ², its amplitude free.

    A pixel counts by its inverse variance, and a bad one not at all. Without templates, they are the mean spectra of
    the training stars' classes.
    """

    def __init__(self, templates: np.ndarray | None = None) -> None:
        self.templates = templates

    def fit(self, X: np.ndarray, y: np.ndarray) -> "TemplateFit":
        """X: (N, 2, 3522), flux and inverse variance."""
        self.templates_ = self.templates
        if self.templates is None:
            self.templates_ = np.stack([X[y == k, 0].mean(axis=0) for k in range(len(CLASS_NAMES))])
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        flux, ivar = X[:, 0], X[:, 1]
        reduction = (flux * ivar @ self.templates_.T) ** 2 / (ivar @ self.templates_.T**2)  # of χ², by class
        return reduction.argmax(axis=1)


def class_templates(path: Path) -> np.ndarray:
    """(5, 3522): the published mean spectra of M0 to M4, of solar metallicity."""
    templates = read_templates(path)
    return np.stack([np.interp(np.log10(WAVELENGTH), templates.loglam, spectrum) for spectrum in templates.solar[:5]])


class Method(NamedTuple):
    features: Callable[[ObservedStars], np.ndarray]
    estimator: BaseEstimator

    def classify(self, training: ObservedStars, test: ObservedStars) -> np.ndarray:
        """Classes (N,) of the test stars, after training on the others."""
        return self.estimator.fit(self.features(training), training.targets).predict(self.features(test))


def methods(seed: int, templates_dir: Path | None = None) -> dict[str, Method]:
    """The methods by name; the fits to published templates only if `templates_dir` has them."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    tuned = partial(GridSearchCV, cv=folds, scoring="f1_weighted")
    cost = {"svc__C": [1, 10, 100]}
    svm = tuned(make_pipeline(StandardScaler(), SVC()), cost)
    pca_svm = make_pipeline(PCA(random_state=seed), StandardScaler(), SVC())
    pca_svm = tuned(pca_svm, cost | {"pca__n_components": [5, 10, 20, 40]})
    by_name = {
        "random forest": (flux, RandomForestClassifier(500, random_state=seed)),
        "SVM on principal components": (flux, pca_svm),
        "LDA on 32 band means": (band_means, LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")),
        "χ² fit to class means": (spectra, TemplateFit()),
        "LDA on TiO5, CaH2, CaH3": (spectral_indices, LinearDiscriminantAnalysis()),
        "SVM on colours": (colours, svm),
        "nearest neighbours in r magnitude": (lambda stars: stars.magnitudes[:, 2:3], KNeighborsClassifier(25)),
    }
    for name, path in template_files(templates_dir).items():
        by_name[f"χ² fit to {name.title()}'s templates"] = (spectra, TemplateFit(class_templates(path)))
    return {name: Method(*method) for name, method in by_name.items()}
