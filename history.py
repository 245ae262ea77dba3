"""The files of a run: its record in training_history.json, its plots, and, while unfinished, the state to resume from.

    import pandas as pd
    runs = pd.json_normalize(pd.read_json("training_history.json").to_dict("records"))   # one row a run

The file is a list with one record a run. A record has the keys of the earlier reproduction's, so that programs for
those can read it, and further ones.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import Timeout

import distributed
from cache import PreparedStars
from catalog import CLASS_NAMES, Star, describe
from checkpoint import torch_load, torch_save
from classifier import Classifier
from cli import DataError, file_lock, remove_leftovers, write_atomically
from device import describe_device
from evaluation import Evaluation
from plots import Axes, new_figure
from preparation import SPECTRUM_LENGTH
from star_files import catalog_path
from survey_files import IMAGE_SIZE

# Identifies the state of an unfinished run. The number is raised when a resumed run would go on differently.
STATE_FORMAT = "m-star training state 9"
STATE_FILES = "last_state_{}.pth"
# By epoch. A loss is the sum of its terms; the learning rate is that of the first step.
EPOCH_METRICS = ("train_loss", "val_loss", "val_accuracy", "val_precision", "val_recall", "val_f1",
                 "train_classification_loss", "val_classification_loss", "learning_rate", "seconds")  # fmt: skip
CONTRASTIVE_METRICS = ("train_contrastive_loss", "val_contrastive_loss", "val_retrieval_accuracy")


class RunPaths(NamedTuple):
    """Where a run's files go."""

    history: Path
    training_plot: Path
    confusion_matrix: dict[str, Path]  # by part of the stars
    reliability: Path
    checkpoint: Path
    state: Path
    tensorboard: Path  # a directory

    def remove_leftovers(self) -> None:
        """Delete the partial files of a run that was killed."""
        plots = (self.training_plot, self.reliability, *self.confusion_matrix.values())
        for path in (self.checkpoint, self.state, *plots):
            remove_leftovers(path)


def run_paths(output_dir: Path, training_id: str) -> RunPaths:
    plots, checkpoints = output_dir / "plots", output_dir / "checkpoints"
    suffixes = {"validation": "", "test": "_test"}
    return RunPaths(
        history=output_dir / "training_history.json",
        training_plot=plots / f"training_plot_{training_id}.png",
        confusion_matrix={part: plots / f"confusion_matrix_{training_id}{suffixes[part]}.png" for part in suffixes},
        reliability=plots / f"reliability_{training_id}.png",
        checkpoint=checkpoints / f"best_model_{training_id}.pth",
        state=checkpoints / STATE_FILES.format(training_id),
        tensorboard=output_dir / "tensorboard" / training_id,
    )


@dataclass
class Training:
    """The progress of a run, as --resume needs it. Everything else follows from the options."""

    options: dict[str, Any]  # of the command line, as plain values
    stars: list[str]  # in order, as `identify` writes them
    record: dict
    states: dict[str, dict] = field(default_factory=dict)  # of trainer.Trainer, after the last whole epoch
    epochs_kept: int = 0  # of the record when `states` was taken

    def snapshot(self, states: dict[str, dict]) -> None:
        """Remember the state after an epoch; `save` writes it, also if the next epoch is interrupted."""
        self.states, self.epochs_kept = states, len(self.record["epoch_metrics"]["train_loss"])

    def save(self, path: Path) -> None:
        curves = {name: curve[: self.epochs_kept] for name, curve in self.record["epoch_metrics"].items()}
        contents = vars(self) | {"format": STATE_FORMAT, "record": self.record | {"epoch_metrics": curves}}
        with write_atomically(path) as temporary:
            torch_save(contents, temporary)


def load_training(path: Path) -> Training:
    """Raises OSError for a file that is missing, damaged, or another program's."""
    state = torch_load(path)
    if not isinstance(state, dict) or state.pop("format", None) != STATE_FORMAT:
        raise OSError(
            f"{path}: no unfinished run of this version of the program (train.py writes them as "
            f"{STATE_FILES.format('ID')}); move it away, or name another with --resume FILE"
        )
    return Training(**state)


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a run depends on, as values that JSON and weights_only files hold."""
    ignored = {"evaluate", "split", "resume", "quiet", "given"}
    options = {name: value for name, value in vars(args).items() if name not in ignored}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    chosen = {one.name for one in dataclasses.fields(args.recipe)}
    return {name: value for name, value in options.items() if name not in chosen} | {"recipe": asdict(args.recipe)}


def begin(
    args: argparse.Namespace, training_id: str, classifier: Classifier, prepared: PreparedStars,
    splits: dict[str, np.ndarray], unused_stars: dict[str, Any],
) -> Training:  # fmt: skip
    """A new run. Its record holds all options and the values derived from them."""
    recipe, options = args.recipe, plain_options(args)
    held_out = np.concatenate([splits["validation"], splits["test"]])
    config = {
        "training_id": training_id,
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        **{name: value for name, value in options.items() if not name.startswith("recipe")},
        "recipe": args.recipe_name,
        **asdict(recipe),
        "device": describe_device(classifier.device),
        "precision": classifier.precision,
        "spec_length": SPECTRUM_LENGTH,
        "image_size": IMAGE_SIZE,
        "num_classes": len(CLASS_NAMES),
        "class_names": list(CLASS_NAMES),
        "model_architecture": f"FusionModel({recipe.modality}"
        + (")" if recipe.modality == "spectrum" else f", {recipe.image_backbone})"),
        "optimizer": f"AdamW, weight decay {recipe.weight_decay}, {recipe.warmup_epochs:g} epochs of warm-up (at most "
        f"a third of the run), cosine, gradients clipped at {recipe.max_gradient_norm:g}",
        "processes": distributed.world_size(),
        "csv_file": str(catalog_path(args.data_dir)),
        "image_dir": str(args.data_dir / "images"),
        "spectra_dir": str(args.data_dir / "spectra"),
        "stars": describe(prepared.stars),
        "held_out_stars": stars_digest([prepared.stars[i] for i in held_out]),
        "simulated_stars": sum(star.simulated for star in prepared.stars),
        "stars_by_class_and_split": {
            part: {name: int((prepared.targets[indices] == k).sum()) for k, name in enumerate(CLASS_NAMES)}
            for part, indices in splits.items()
        },
        **unused_stars,
        "versions": library_versions(),
        "git_commit": git_commit(),
    }
    metrics = EPOCH_METRICS + (CONTRASTIVE_METRICS if classifier.is_contrastive else ())
    record = {
        "config": config,
        "epoch_metrics": {name: [] for name in metrics},
        "final_metrics": {},
        "total_training_time_seconds": 0.0,
    }
    return Training(options, identify(prepared), record)


def identify(prepared: PreparedStars) -> list[str]:
    """The stars as text; a resumed run must find the same."""
    return [repr(star) for star in prepared.stars]


@contextlib.contextmanager
def claim_training_id(output_dir: Path, resumed: str | None = None) -> Iterator[str]:
    """Yield a run's ID, YYYYmmdd_HHMMSS, unique in this directory even among runs that start in the same second; or the
    ID that is resumed. Raises DataError if another process is running it."""
    checkpoints = output_dir / "checkpoints"
    for folder in (checkpoints, output_dir / "plots"):  # a place that cannot be written is found before the work
        folder.mkdir(parents=True, exist_ok=True)
    if resumed:
        try:
            with file_lock(checkpoints / f".{resumed}.lock", timeout=0):
                yield resumed
        except Timeout:
            raise DataError(f"the run {resumed} goes on in another process") from None
        return
    stamp, attempt = datetime.now().strftime("%Y%m%d_%H%M%S"), 1
    while True:
        training_id = stamp if attempt == 1 else f"{stamp}_{attempt}"
        lock = file_lock(checkpoints / f".{training_id}.lock", timeout=0)
        with contextlib.suppress(Timeout), lock:
            if not (checkpoints / f"best_model_{training_id}.pth").exists():
                yield training_id
                return
        attempt += 1


def stars_digest(stars: list[Star]) -> str:
    """A hash of a set of stars, whatever their order."""
    return hashlib.sha256("\n".join(sorted(star.spectrum_id for star in stars)).encode()).hexdigest()[:16]


def training_id_of(run: Any) -> str | None:
    """The ID in a record; None for an entry that another program wrote in another form."""
    config = run.get("config") if isinstance(run, dict) else None
    return config.get("training_id") if isinstance(config, dict) else None


def put_into_history(path: Path, record: dict) -> None:
    """Append a run's record, or replace the one from before the run was resumed.

    Runs that end together wait for each other. A damaged file is set aside, not lost.
    """
    with file_lock(path.with_name(f".{path.name}.lock"), timeout=-1):
        remove_leftovers(path)
        history = []
        if path.exists():
            try:
                history = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(history, list):
                    raise ValueError("not a list of runs")
            except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, no list
                aside = path.with_name(f"{path.stem}.damaged-{record['config']['training_id']}{path.suffix}")
                while aside.exists():
                    aside = aside.with_stem(f"{aside.stem}_2")
                path.rename(aside)
                history = []
                print(f"{path} is damaged ({error}); it is kept as {aside.name}, and a new one begins", file=sys.stderr)
        others = [run for run in history if training_id_of(run) != training_id_of(record)]
        with write_atomically(path) as temporary:
            text = json.dumps([*others, record], indent=2, ensure_ascii=False)
            # A path that is not UTF-8 has lone surrogates, whose escapes are JSON's, too.
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def plot_training(path: Path, record: dict) -> None:
    """Each term of the loss, and the scores, by epoch."""
    config, metrics, best = record["config"], record["epoch_metrics"], record["final_metrics"]["best_epoch"]
    terms = [term for term in ("classification", "contrastive") if f"train_{term}_loss" in metrics]
    with new_figure(path, figsize=(5 * len(terms) + 6, 4)) as figure:
        figure.suptitle(f"{config['training_id']}: {config['modality']}, {config['stars']}")
        panels = figure.subplots(1, len(terms) + 1)
        for axes, term in zip(panels, terms, strict=False):
            draw_loss(axes, metrics, term)
        draw_scores(panels[-1], metrics, config["stars_by_class_and_split"]["validation"].values())
        for axes in panels:
            axes.axvline(best, color="black", linestyle="--", linewidth=0.8, label=f"best epoch ({best})")
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")


def draw_loss(axes: Axes, metrics: dict[str, list[float]], term: str) -> None:
    for part, label in (("train", "training"), ("val", "validation")):
        curve = metrics[f"{part}_{term}_loss"]
        axes.plot(range(1, len(curve) + 1), curve, "o-", markersize=4, label=label)
    axes.set_ylabel(f"{term} loss")


def draw_scores(axes: Axes, metrics: dict[str, list[float]], stars_by_class: Collection[int]) -> None:
    # Recall weighted by class frequency is the accuracy.
    labels = {"accuracy": "accuracy, recall", "precision": "precision", "f1": "F1"}
    labels["retrieval_accuracy"] = "images that find their spectrum"
    for name, label in labels.items():
        if curve := metrics.get(f"val_{name}"):
            axes.plot(range(1, len(curve) + 1), curve, "o-", markersize=4, alpha=0.8, label=label)
    most = max(stars_by_class) / sum(stars_by_class)
    axes.axhline(most, color="gray", linestyle=":", label="accuracy of one class for all")
    axes.set(ylabel="validation score (weighted)", ylim=(0, 1.02))


def plot_confusion_matrix(path: Path, evaluation: Evaluation, title: str) -> None:
    from sklearn.metrics import ConfusionMatrixDisplay  # here: it takes a second

    with new_figure(path, figsize=(5, 4.6)) as figure:
        axes = figure.subplots()
        ConfusionMatrixDisplay.from_predictions(
            evaluation.targets, evaluation.predictions, labels=range(len(CLASS_NAMES)), display_labels=CLASS_NAMES,
            cmap="Blues", colorbar=False, ax=axes,
        )  # fmt: skip
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="predicted subclass", ylabel="catalogue subclass")


def plot_reliability(path: Path, evaluation: Evaluation, temperature: float, title: str) -> None:
    """The fraction classified right by the probability of the predicted class, before and after calibration."""
    with new_figure(path, figsize=(5, 4.6)) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfect")
        for name, divisor in (("before", 1.0), (f"after (temperature {temperature:.2f})", temperature)):
            probability, right, stars = evaluation.reliability(divisor)
            label = f"{name}: error {evaluation.calibration_error(divisor):.3f}"
            axes.plot(probability, right, "o-", alpha=0.8, label=label)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="probability of the predicted subclass", ylabel=f"fraction right (bins of {stars[0]} stars)")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def library_versions() -> dict[str, str]:
    libraries = ("torchvision", "numpy", "scikit-learn", "astropy", "matplotlib")
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return versions | {library: metadata.version(library) for library in libraries}


def git_commit() -> str | None:
    """The commit of this code, with "+changes" if its files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The surrounding repository may be another project's.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changes = git("status", "--porcelain", "-uno", "--", "*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
