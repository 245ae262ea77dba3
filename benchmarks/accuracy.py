"""How well the network and the classical methods classify the same stars.

    python benchmarks/accuracy.py --data-dir simulated --test-dir others     score on other stars
    python benchmarks/accuracy.py --data-dir . --test-split 0.2              real stars, a fifth of them held out
    python benchmarks/accuracy.py --data-dir . --test-split 0.2 --methods "PCA + LDA" "random forest"
    python benchmarks/accuracy.py --data-dir . --test-split 0.2 --modality spectrum --methods "without added noise"

Every method gets the same prepared stars and, seed by seed, the same stratified split: it learns from
the training stars, and is scored on stars that chose nothing: those of --test-dir, or the part that
--test-split holds out. The classical methods tune themselves by 5-fold cross-validation on the
training stars; the network's validation stars choose its checkpoint. The results of each run are
written as it ends, as accuracy.json; the same command again does only what is missing there.
accuracy.md and accuracy.png show the means over the seeds.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import augmentation  # noqa: E402
import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from cache import PreparedStars, read_stars  # noqa: E402
from evaluation import Evaluation  # noqa: E402
from history import run_paths  # noqa: E402
from model import (  # noqa: E402
    IMAGE_BACKBONES,
    MODALITIES,
    FusionModel,
    SpectrumNormalisation,
    flatten_spectra,
    load_checkpoint,
    make_continuum_basis,
)


class WithoutPositions(FusionModel):
    """The position embeddings are zero, and stay so."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        torch.nn.init.zeros_(self.position_embedding).requires_grad_(False)


class WithoutCoefficients(FusionModel):
    """[CLS] gets nothing of the eigenspectra's coefficients, and never will."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        torch.nn.init.zeros_(self.coefficient_encoder.weight).requires_grad_(False)


class ClassifierBehindPooler(torch.nn.Linear):
    """The classifier (hidden_size, num_classes) behind ViLT's pooler (Linear, tanh), as in the authors' code."""

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__(hidden_size, num_classes)
        self.pooler = torch.nn.Linear(hidden_size, hidden_size)
        for linear in (self, self.pooler):
            torch.nn.init.normal_(linear.weight, std=model.INIT_STD)
            torch.nn.init.zeros_(linear.bias)

    def forward(self, cls_output: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(self.pooler(cls_output)))


build_network = FusionModel.__init__


def build_with_pooler(self: FusionModel, **arguments: Any) -> None:
    """In place of FusionModel.__init__, in training and where the checkpoint is read."""
    build_network(self, **arguments)
    self.classifier = ClassifierBehindPooler(self.classifier.in_features, self.classifier.out_features)


def keep_all_deviations(self: SpectrumNormalisation, specs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of SpectrumNormalisation.forward: spectra are no sums of eigenspectra, and have no coefficients."""
    with torch.autocast(specs.device.type, enabled=False):
        deviations = self.deviations(flatten_spectra(specs, self.continuum_basis))
        return deviations, specs.new_zeros(len(specs), model.NUM_EIGENSPECTRA)


def constant_adam(
    network: FusionModel, learning_rate: float, epochs: int, steps_per_epoch: int
) -> tuple[Optimizer, LRScheduler]:
    """In place of train.make_optimizer: no weight decay, warm-up or cosine; clipping and running mean stay."""
    optimizer = torch.optim.Adam([{"params": group} for group in train.parameter_groups(network)], lr=1e-4)
    return optimizer, LambdaLR(optimizer, lambda step: 1.0)


# Each network is train.py with these options.
NETWORKS = {
    "FusionModel": ["--modality", "fusion"],
    "spectra only": ["--modality", "spectrum"],
    "images only": ["--modality", "image"],
    "without the SIC term": ["--modality", "fusion", "--sic-weight", "0"],
}
# Each ablation leaves one part of the recipe out, or takes the paper's form for it.
ABLATIONS = {
    "contrast with other classes only": ["--sic-negatives", "other-classes"],
    "learning rate 1e-4": ["--learning-rate", "1e-4"],
    "Adam at a constant 1e-4": patch.object(train, "make_optimizer", constant_adam),
    "in float32": ["--precision", "fp32"],
    "without position embeddings": patch.object(train, "FusionModel", WithoutPositions),
    "with a pooler": patch.object(FusionModel, "__init__", build_with_pooler),
    "with the continuum": ["--continuum-degree", "-1"],
    "without smoothing": patch.object(model, "smooth", lambda spectra: spectra),
    "without eigenspectra": patch.object(SpectrumNormalisation, "forward", keep_all_deviations),
    "without coefficients in [CLS]": patch.object(train, "FusionModel", WithoutCoefficients),
    "without image dropout": patch.object(train, "FusionModel", partial(FusionModel, image_dropout=0.0)),
    "without turned images": patch.object(train, "turn_images", lambda images, symmetries: images),
    "without blended stars": patch.object(augmentation, "MIN_SHARE", 1.0),
    "without shifted spectra": patch.object(augmentation, "MAX_SHIFT", 0),
    "without added noise": patch.object(augmentation, "MAX_EXTRA_NOISE", 0.0),
    "gradients clipped together": patch.object(train, "parameter_groups", lambda network: [list(network.parameters())]),
    "residual blocks begin at random": patch.object(model, "RANDOM_RESNET", {}),
    "without averaged weights": patch.object(train, "AVERAGE_SPAN", 0.0),
    "attention as in ViLT at the start": patch.multiple(model, ATTENTION_STD=0.02, POSITION_STD=0.02),
}
# What is no part of the network of one input, so that leaving it out there leaves out nothing.
OF_BOTH = {"contrast with other classes only", "without image dropout", "gradients clipped together"}
OF_IMAGES = {"without turned images", "residual blocks begin at random"}
OF_SPECTRA = {
    "with the continuum",
    "without smoothing",
    "without shifted spectra",
    "without added noise",
    "without eigenspectra",
    "without coefficients in [CLS]",
}
IDLE = {"fusion": set(), "spectrum": OF_BOTH | OF_IMAGES, "image": OF_BOTH | OF_SPECTRA}
FLATTENED = ", continuum removed, smoothed"  # as the network does it, but for the eigenspectra
SCORES = {"accuracy": "accuracy", "f1": "weighted F1", "f1_macro": "macro F1", "within_one_subclass": "within ± 1"}

# The classical methods


class TemplateFit(ClassifierMixin, BaseEstimator):
    """The class whose mean spectrum fits best: χ² over the pixels, with the amplitude free.

    A pixel's variance is that of the training spectra about the mean of their class; pixels count as if independent.
    With sample_weight, a spectrum counts for its weight in means and variances.
    """

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> "TemplateFit":
        self.classes_ = np.unique(y)
        templates, variances = [], []
        for k in self.classes_:
            spectra, weights = X[y == k], None if sample_weight is None else sample_weight[y == k]
            templates.append(np.average(spectra, axis=0, weights=weights))
            variances.append(np.average((spectra - templates[-1]) ** 2, axis=0, weights=weights))
        self.templates_, self.variance_ = np.stack(templates), np.mean(variances, axis=0) + 1e-6
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        weighted = self.templates_ / self.variance_
        fit = X @ weighted.T  # (N, classes): what the best amplitude of each template takes off χ²
        return self.classes_[(fit**2 / (self.templates_ * weighted).sum(axis=1)).argmax(axis=1)]


class Eigenspectra(TransformerMixin, BaseEstimator):
    """Spectra (N, 3522) → (N, NUM_EIGENSPECTRA): the coefficients of those whose sum is what the network sees."""

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> "Eigenspectra":
        self.normalisation_ = SpectrumNormalisation()
        self.normalisation_.fit(torch.from_numpy(X))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        return self.normalisation_(torch.from_numpy(X))[1].numpy()


def band_means(spectra: np.ndarray) -> np.ndarray:
    """(N, 32): the mean flux of 32 equal pieces of the window, as many as the network has spectrum tokens."""
    return np.stack([piece.mean(axis=1) for piece in np.array_split(spectra, 32, axis=1)], axis=1)


def image_colors(images: np.ndarray) -> np.ndarray:
    """(N, 3) from cutouts (N, 3, 128, 128): the star's red over green, green over blue, and brightness, as logarithms.

    Means over the central 3.2″, above the cutout's median.
    """
    background = np.median(images, axis=(2, 3))
    center = images[:, :, 56:72, 56:72].mean(axis=(2, 3), dtype=np.float64)
    red, green, blue = np.log(np.clip(center - background, 0.5, None)).T
    return np.stack([red - green, green - blue, green], axis=1)


def spectra_of(stars: PreparedStars) -> np.ndarray:
    """(N, 3522), in units of the median flux."""
    return stars.spectra.numpy()


def flattened_spectra_of(stars: PreparedStars) -> np.ndarray:
    """(N, 3522), what the network takes eigenspectra from."""
    return flatten_spectra(stars.spectra, make_continuum_basis()).numpy()


def bands_of(stars: PreparedStars, prepare_spectra: Callable[[PreparedStars], np.ndarray]) -> np.ndarray:
    """(N, 32)."""
    return band_means(prepare_spectra(stars))


def colors_of(stars: PreparedStars) -> np.ndarray:
    """(N, 3)."""
    return image_colors(stars.images.numpy())


def bands_and_colors_of(stars: PreparedStars, prepare_spectra: Callable[[PreparedStars], np.ndarray]) -> np.ndarray:
    """(N, 35)."""
    return np.hstack([bands_of(stars, prepare_spectra), colors_of(stars)])


class ClassicalMethod(NamedTuple):
    """What a method reads of N stars, and what it fits to that."""

    prepare: Callable[[PreparedStars], np.ndarray]  # stars → (N, features)
    estimator: GridSearchCV
    weighted: bool = False  # a training spectrum counts by its inverse variance, from the noise between close pixels


def classical_methods(seed: int) -> dict[str, ClassicalMethod]:
    """By name; those on pixels and bands twice, for spectra as they are and flattened as the network does it."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    tuned = partial(GridSearchCV, cv=folds, scoring="f1_weighted", n_jobs=-1)
    pca, components = PCA(random_state=seed), {"pca__n_components": [10, 15, 20, 30, 40]}
    pca_svm = tuned(make_pipeline(pca, StandardScaler(), SVC()), components | {"svc__C": [1, 10, 100]})
    pca_lda = tuned(make_pipeline(pca, LinearDiscriminantAnalysis()), components)
    lda = tuned(LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), {})
    forest = tuned(RandomForestClassifier(500, random_state=seed), {"min_samples_leaf": [1, 3]})
    template_fit = tuned(TemplateFit(), {})
    eigenspectra_svm = tuned(make_pipeline(Eigenspectra(), SVC()), {"svc__C": [1, 10, 100]})
    eigenspectra_lda = tuned(make_pipeline(Eigenspectra(), LinearDiscriminantAnalysis()), {})
    methods = {
        "random forest on image colours": ClassicalMethod(colors_of, forest),
        "eigenspectra + SVM": ClassicalMethod(spectra_of, eigenspectra_svm),
        "eigenspectra + LDA": ClassicalMethod(spectra_of, eigenspectra_lda),
    }
    for suffix, prepare in (("", spectra_of), (FLATTENED, flattened_spectra_of)):
        bands = partial(bands_of, prepare_spectra=prepare)
        bands_and_colors = partial(bands_and_colors_of, prepare_spectra=prepare)
        on_spectra = {
            "PCA + SVM": ClassicalMethod(prepare, pca_svm),
            "PCA + LDA": ClassicalMethod(prepare, pca_lda),
            "LDA on 32 band means": ClassicalMethod(bands, lda),
            "LDA on 32 band means and image colours": ClassicalMethod(bands_and_colors, lda),
            "random forest": ClassicalMethod(prepare, forest),
            "χ² fit to class means": ClassicalMethod(prepare, template_fit),
            "χ² fit to weighted class means": ClassicalMethod(prepare, template_fit, weighted=True),
        }
        methods |= {name + suffix: method for name, method in on_spectra.items()}
    return methods


# Running


def parse_arguments() -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add, number = parser.add_argument, data.number_between
    usual = [*classical_methods(seed=0), *NETWORKS]
    add("--data-dir", type=Path, default=Path("."), help="holds objects.csv, spectra/ and images/")
    add("--test-dir", type=Path, help="such a directory of other stars, all of them to score on")
    add("--test-split", type=number(float, 0, 0.9), default=0.0, help="fraction of --data-dir to score on instead")
    add("--validation-split", type=number(float, 0.01, 0.9), default=0.2, help="fraction that chooses the checkpoint")
    add("--seeds", type=number(int, 0, 2**32 - 1), nargs="+", default=[42, 43, 44], help="of split and training")
    add("--epochs", type=number(int, 1, 10**6), default=20, help="of the networks")
    add("--image-backbone", choices=IMAGE_BACKBONES, default="resnet152", help="of the networks")
    add("--image-weights", metavar="{imagenet,none,PATH}", default="none", help="of the networks")
    add("--modality", choices=MODALITIES, default="fusion", help="what the ablations leave one part out of: "
        "FusionModel or, much quicker, the network of spectra only or of images only")  # fmt: skip
    add("--methods", nargs="+", choices=[*usual, *ABLATIONS], metavar="NAME", default=usual,
        help="some of: " + ", ".join([*usual, *ABLATIONS]))  # fmt: skip
    add("--num-workers", type=number(int, 0, 256), default=2, help="processes that read the stars' files")
    add("--output-dir", type=Path, default=Path("benchmarks/accuracy"), help="gets accuracy.json, .md and .png")
    args = parser.parse_args()
    if (args.test_dir is None) == (args.test_split == 0):
        parser.error("say which stars to score on: --test-dir DIR or --test-split FRACTION, one of the two")
    if idle := IDLE[args.modality].intersection(args.methods):
        parser.error(f"{', '.join(sorted(idle))}: nothing to leave out with --modality {args.modality}")
    return args


def select(stars: PreparedStars, indices: np.ndarray) -> PreparedStars:
    return PreparedStars(
        [stars.stars[i] for i in indices], stars.spectra[indices], stars.images[indices], stars.targets[indices]
    )


def run_classical(name: str, seed: int, parts: dict[str, PreparedStars]) -> dict[str, Evaluation]:
    """Fit on the training stars; predict the other parts."""
    method, training = classical_methods(seed)[name], parts["train"]
    weights = {}
    if method.weighted:
        weights["sample_weight"] = augmentation.inverse_variances(training.spectra).numpy()[:, 0]
    estimator = clone(method.estimator).fit(method.prepare(training), training.targets.numpy(), **weights)
    return {
        part: Evaluation(float("nan"), parts[part].targets.numpy(), estimator.predict(method.prepare(parts[part])))
        for part in ("validation", "test")
    }


def run_network(
    args: argparse.Namespace, name: str, seed: int, stars: PreparedStars, parts: dict[str, PreparedStars]
) -> tuple[str, dict[str, Evaluation]]:
    """Train by train.py itself, in a directory of its own; evaluate the checkpoint that it keeps. Returns the device's
    name, too."""
    change = (NETWORKS | ABLATIONS)[name]
    with tempfile.TemporaryDirectory() as directory:
        options = train.parse_arguments(
            [
                *("--output-dir", directory, "--seed", str(seed), "--epochs", str(args.epochs)),
                *("--state-interval", "1e6", "--modality", args.modality),
                *("--validation-split", str(args.validation_split), "--test-split", str(args.test_split)),
                *("--image-backbone", args.image_backbone, "--image-weights", args.image_weights),
                *(change if isinstance(change, list) else []),
            ]
        )
        unread = {"spectrum": {"images": None}, "image": {"spectra": None}}.get(options.modality, {})
        with contextlib.nullcontext() if isinstance(change, list) else change:
            record = train.train(options, stars._replace(**unread), {})
            device = train.choose_device(options.device)
            path = run_paths(Path(directory), record["config"]["training_id"]).checkpoint
            engine = train.Engine(
                load_checkpoint(path, device)[0], device, train.choose_precision(options.precision, device)
            )
            loaders = {
                part: train.make_loader(parts[part], np.arange(len(parts[part].stars)), batch_size=64)
                for part in ("validation", "test")
            }
            evaluations = {part: train.evaluate(engine, loader) for part, loader in loaders.items()}
            return record["config"]["device"], evaluations


def open_results(path: Path, settings: dict) -> dict:
    """What earlier commands with the same settings have done."""
    if not path.exists():
        return {"settings": settings, "runs": []}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise data.DataError(f"{path}: of another experiment ({results['settings']}); give another --output-dir")
    return results


def main() -> None:
    args = parse_arguments()
    stars, _ = read_stars(args.data_dir, "fusion", args.num_workers)
    others = None
    if args.test_dir:
        others, _ = read_stars(args.test_dir, "fusion", args.num_workers)
        others = select(others, np.arange(len(others.stars)))
    of_this_command = ("seeds", "methods", "num_workers", "output_dir")
    settings = {name: value for name, value in vars(args).items() if name not in of_this_command}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    # Another network's results are another experiment's, whatever the options.
    settings |= {"stars": data.describe(stars.stars), "network": model.CHECKPOINT_FORMAT}
    path = args.output_dir / "accuracy.json"
    results = open_results(path, settings)
    done = {(run["method"], run["seed"]) for run in results["runs"]}
    for seed in args.seeds:
        splits = train.split_stars(stars, args.validation_split, args.test_split, seed)
        parts = {part: select(stars, indices) for part, indices in splits.items()}
        parts["test"] = others or parts["test"]
        results["parts"] = {part: data.describe(chosen.stars) for part, chosen in parts.items()}
        for name in args.methods:
            if (name, seed) in done:
                continue
            started = time.perf_counter()
            if name in NETWORKS | ABLATIONS:
                device, evaluations = run_network(args, name, seed, stars, parts)
            else:
                device, evaluations = "cpu", run_classical(name, seed, parts)
            seconds = round(time.perf_counter() - started, 1)
            run = {"method": name, "seed": seed, "seconds": seconds, "device": device}
            run |= {part: evaluation.scores() for part, evaluation in evaluations.items()}
            run["test_intervals_95"] = evaluations["test"].intervals()
            results["runs"].append(run)
            with data.write_atomically(path) as temporary:
                temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{name}, seed {seed}: test F1 {run['test']['f1']:.3f}, {run['seconds']:.0f} s", flush=True)

    title = f"{args.data_dir}: "
    title += "trained on {train}, checkpoint chosen by {validation}, scored on {test}".format(**results["parts"])
    table = as_markdown(summarise(results["runs"]), title)
    with data.write_atomically(args.output_dir / "accuracy.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    draw(args.output_dir / "accuracy.png", results["runs"], title)
    print(f"\n{table}\nin {args.output_dir}: accuracy.json, accuracy.md, accuracy.png")


# The table and the figure


def summarise(runs: list[dict]) -> pd.DataFrame:
    """One row a method, best last: of each score on the test stars, its mean and standard deviation over the seeds."""
    table = pd.DataFrame(
        [
            {name: run[name] for name in ("method", "device", "seconds")}
            | {"validation F1": run["validation"]["f1"]}
            | {title: run["test"][score] for score, title in SCORES.items()}
            for run in runs
        ]
    )
    devices = table.groupby("method").device.agg(lambda names: ", ".join(sorted(set(names))))
    summary = table.drop(columns="device").groupby("method").agg(["mean", "std", "count"]).assign(device=devices)
    return summary.sort_values(("weighted F1", "mean"))


def as_markdown(summary: pd.DataFrame, title: str) -> str:
    columns = [*SCORES.values(), "validation F1"]
    lines = [f"{title}; mean ± standard deviation over the seeds.", "", ""]
    lines.append("| " + " | ".join(["method", *columns, "seeds", "seconds a run", "on"]) + " |")
    lines.append("|---" * (len(columns) + 4) + "|")
    for method, row in summary.iloc[::-1].iterrows():
        cells = [f"{row[column, 'mean']:.3f} ± {row[column, 'std']:.3f}".replace(" ± nan", "") for column in columns]
        cells += [str(int(row["seconds", "count"])), f"{row['seconds', 'mean']:.0f}", row["device"].item()]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, runs: list[dict], title: str) -> None:
    """The F1 of each run on the test stars, a point a seed; the bar is the mean."""
    means = pd.DataFrame([{"method": run["method"], "f1": run["test"]["f1"]} for run in runs]).groupby("method").f1
    order = list(means.mean().sort_values().index)
    figure = Figure(figsize=(10, 0.8 + 0.35 * len(order)), layout="constrained")
    axes = figure.subplots()
    colors = ["C0" if method in NETWORKS | ABLATIONS else "0.6" for method in order]
    axes.barh(order, means.mean()[order], color=colors, alpha=0.6)
    for row, method in enumerate(order):
        axes.plot(means.get_group(method), [row] * len(means.get_group(method)), "k.")
    axes.margins(y=0.01)
    axes.set_xlim(max(0, means.min().min() - 0.05), 1)
    # Over and under the whole figure: the names of the methods are wide.
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("weighted F1 on the stars that chose nothing (blue: networks; points: seeds)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    with data.write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150)


if __name__ == "__main__":
    data.run_as_script(main)
