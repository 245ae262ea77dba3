"""Train and evaluate the M-star classifier on paired spectra and images.

    python train.py --demo                                     simulate stars, train on them, in demo/
    python train.py                                            train on ./objects.csv, spectra/, images/
    python train.py --recipe improved                          with the changes that help; see recipe.py
    python train.py --modality spectrum --epochs 30            single choices changed
    python train.py --resume auto                              go on after Ctrl-C or a crash
    torchrun --nproc-per-node=4 train.py                       on four GPUs
    python train.py --evaluate checkpoints/best_model_ID.pth   score a checkpoint on its validation stars

The network is in model.py, its loss in loss_sic.py, every choice in recipe.py, one training step in trainer.py. This
file is a run: options, epochs, the best checkpoint, the record.
"""

from train_options import parse_arguments

if __name__ == "__main__":
    ARGUMENTS = parse_arguments(__doc__)  # before torch is imported: --help and mistakes are answered at once

import argparse
import contextlib
import math
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributed
import history
import outliers
from cache import PreparedStars, read_stars
from catalog import CLASS_NAMES, Star, count_known, describe
from checkpoint import load_checkpoint, load_image_weights, save_checkpoint
from classifier import Classifier
from cli import DataError, progress, quietly, run_as_script, write_atomically
from dataset import StarLoader, random_stream, split_stars
from device import choose_device, choose_precision, describe_device, out_of_memory_hint
from evaluation import evaluate, print_scores
from history import Paths, Training
from preparation import SPECTRUM_LENGTH
from recipe import Recipe
from simulate_sdss_data import simulate
from star_files import catalog_path
from survey_files import IMAGE_SIZE
from trainer import Trainer

STATISTICS_STARS = 4096  # enough for the mean spectrum and its scale
STATE_INTERVAL = 60.0  # seconds of training, at least, from one state on the disk to the next
PARTS = {"validation": "used for checkpoint selection: optimistic", "test": "held out"}

DEMO_STARS_PER_CLASS = 50
DEMO_SNR = (5, 60)  # brighter than the catalogue's stars, so that few of them and few epochs do


# Training


class LossMeter:
    """The mean loss of an epoch, without waiting for the device.

    Raises DataError once a loss that is not finite has arrived on the host, a few steps late on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.total, self.steps = torch.zeros((), device=device), 0
        self.host_total = torch.zeros((), pin_memory=device.type == "cuda")

    def add(self, loss: Tensor) -> None:
        self.total += loss
        self.steps += 1
        self.check(self.host_total)
        self.host_total.copy_(self.total, non_blocking=True)

    def mean(self) -> float:
        self.check(self.total)
        return self.total.item() / self.steps

    @staticmethod
    def check(total: Tensor) -> None:
        if not math.isfinite(total):
            raise DataError("the loss is not finite; try a smaller --learning-rate or --precision fp32")


def train_one_epoch(trainer: Trainer, loader: StarLoader, epoch: int, seed: int, description: str) -> float:
    """One pass over the training stars; returns the mean loss by star."""
    batch_size = trainer.recipe.batch_size
    order = torch.Generator().manual_seed(random_stream(seed, epoch))
    torch.manual_seed(random_stream(seed, epoch, distributed.rank() + 1))  # of the augmentation
    trainer.classifier.train()
    losses = LossMeter(trainer.device)
    batches = loader.epoch(batch_size, order)
    for batch in progress(batches, desc=description, unit="batch", total=loader.num_batches(batch_size)):
        losses.add(trainer.step(batch))
    return losses.mean()


def fit(
    trainer: Trainer, loaders: dict[str, StarLoader], training: Training, paths: Paths, contents: dict[str, Any]
) -> None:
    """Train from the epoch that `training` is at. After each epoch validate, keep the checkpoint if it is the best, and
    extend the record; from time to time write the state to resume from.

    contents: of a checkpoint, beside classifier and epoch.
    """
    record = training.record
    config, curves, final = record["config"], record["epoch_metrics"], record["final_metrics"]
    epochs = config["num_epochs"]
    if training.states:
        trainer.load_state_dict(training.states)
    state_written = time.perf_counter()
    for epoch in range(len(curves["train_loss"]) + 1, epochs + 1):
        started, now = time.perf_counter(), f"epoch {epoch}/{epochs}"
        train_loss = train_one_epoch(trainer, loaders["train"], epoch, config["random_seed"], now)
        distributed.synchronise_buffers(trainer.classifier)
        validation = evaluate(trainer.classifier, loaders["validation"], f"{now}, validating")
        scores = validation.scores()
        results = {"train_loss": train_loss, "val_loss": validation.loss}
        results |= {f"val_{name}": score for name, score in scores.items()}
        best = is_best(scores["f1"], validation.loss, curves)
        if best and distributed.rank() == 0:  # before the record says so: Ctrl-C may come at any moment
            with write_atomically(paths.checkpoint) as temporary:
                save_checkpoint(temporary, trainer.classifier, epoch=epoch, **contents)
        for name, curve in curves.items():
            curve.append(results[name])
        if best:
            final["best_epoch"] = epoch
        elapsed = time.perf_counter() - started
        record["total_training_time_seconds"] = round(record["total_training_time_seconds"] + elapsed, 1)
        if epoch < epochs and distributed.rank() == 0:
            training.snapshot(trainer.state_dict())
            if time.perf_counter() - state_written >= STATE_INTERVAL:
                training.save(paths.state)
                state_written = time.perf_counter()
        print(
            f"{epoch:3d}/{epochs}  loss {train_loss:6.3f}  val loss {validation.loss:6.3f}  "
            f"accuracy {scores['accuracy']:.3f}  precision {scores['precision']:.3f}  recall {scores['recall']:.3f}  "
            f"F1 {scores['f1']:.3f}{'*' if best else ' '}  {elapsed:5.1f} s",
            flush=True,
        )


def is_best(f1: float, loss: float, curves: dict[str, list[float]]) -> bool:
    """Whether an epoch has the highest validation F1 so far; of equal ones, the lowest validation loss."""
    before = zip(curves["val_f1"], (-loss for loss in curves["val_loss"]), strict=True)
    return (f1, -loss) > max(before, default=(-1.0, 0.0))


# A run


def begin(
    args: argparse.Namespace, training_id: str, classifier: Classifier, prepared: PreparedStars,
    splits: dict[str, np.ndarray], unused_stars: dict[str, Any],
) -> Training:  # fmt: skip
    """A new run. Its record holds all options and the values derived from them."""
    recipe, options = args.recipe, history.plain_options(args)
    held_out = np.concatenate([splits["validation"], splits["test"]])
    device = next(classifier.parameters()).device
    config = {
        "training_id": training_id,
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        **{name: value for name, value in options.items() if not name.startswith("recipe")},
        "recipe": args.recipe_name,
        **asdict(recipe),
        "device": describe_device(device),
        "precision": classifier.precision,
        "spec_length": SPECTRUM_LENGTH,
        "image_size": IMAGE_SIZE,
        "num_classes": len(CLASS_NAMES),
        "class_names": list(CLASS_NAMES),
        "model_architecture": f"FusionModel({recipe.modality}"
        + (")" if recipe.modality == "spectrum" else f", {recipe.image_backbone})"),
        "optimizer": f"AdamW, weight decay {recipe.weight_decay}, {recipe.warmup_epochs:g} epochs of warm-up, cosine, "
        f"gradients clipped at {recipe.max_gradient_norm:g}",
        "processes": distributed.world_size(),
        "csv_file": str(catalog_path(args.data_dir)),
        "image_dir": str(args.data_dir / "images"),
        "spectra_dir": str(args.data_dir / "spectra"),
        "stars": describe(prepared.stars),
        "held_out_stars": history.fingerprint([prepared.stars[i] for i in held_out]),
        "simulated_stars": sum(star.simulated for star in prepared.stars),
        "stars_by_class_and_split": {
            part: {name: int((prepared.targets[indices] == k).sum()) for k, name in enumerate(CLASS_NAMES)}
            for part, indices in splits.items()
        },
        **unused_stars,
        "versions": history.library_versions(),
        "git_commit": history.git_commit(),
    }
    record = {
        "config": config,
        "epoch_metrics": {name: [] for name in history.EPOCH_METRICS},
        "final_metrics": {},
        "total_training_time_seconds": 0.0,
    }
    return Training(options, identify(prepared), record)


def identify(prepared: PreparedStars) -> list[str]:
    """The stars as text; a resumed run must find the same."""
    return [repr(star) for star in prepared.stars]


def train(
    args: argparse.Namespace, prepared: PreparedStars, unused_stars: dict[str, Any], unfinished: Training | None = None
) -> dict:
    """A whole run on those stars, or the rest of an unfinished one: split, train; then evaluate the best checkpoint,
    record, plot. Returns the record."""
    trainer, loaders, splits = set_up(args, prepared)
    classifier = trainer.classifier
    contents = {
        # Whole stars, not rows: --evaluate must know them also in another catalogue, or after a change of this one.
        "splits": {part: [list(prepared.stars[i]) for i in indices] for part, indices in splits.items()},
        "references": outliers.fit_references(prepared, splits["train"]),
    }
    first = distributed.rank() == 0
    resumed_id = unfinished.record["config"]["training_id"] if unfinished else None
    # Of several processes, the first alone writes files, and has an ID to name them by.
    claim = history.claim_training_id(args.output_dir, resumed_id) if first else contextlib.nullcontext("")
    with claim as training_id:
        training = unfinished or begin(args, training_id, classifier, prepared, splits, unused_stars)
        record, config = training.record, training.record["config"]
        print(f"\n{config['model_architecture']}, {sum(p.numel() for p in classifier.parameters()) / 1e6:.1f} M "
              f"parameters, on {config['device']} in {config['precision']}; {config['stars']}: {len(splits['train'])} "
              f"to train, {len(splits['validation'])} to validate, {len(splits['test'])} held out\n")  # fmt: skip
        paths, stopped = history.run_paths(args.output_dir, training_id), None
        if unfinished and first:
            paths.remove_leftovers()
        try:
            fit(trainer, loaders, training, paths, contents | {"config": config})
        except (KeyboardInterrupt, DataError, OSError) as reason:
            stopped = reason
        distributed.leave()
        if not first:
            return record  # the first process finishes alone
        if stopped and training.states:
            with contextlib.suppress(OSError):  # the disk is full: an earlier state may be there
                training.save(paths.state)
        record["stopped"] = None if stopped is None else str(stopped) or "interrupted"
        # A run that was stopped is recorded with the epochs that it has done, if it has.
        if record["epoch_metrics"]["train_loss"]:
            finish(record, loaders, paths)
        if stopped is None:
            paths.state.unlink(missing_ok=True)
            return record
        if paths.state.exists():
            print(f"Resume after the last whole epoch with: python train.py --resume {paths.state}")
        raise stopped


def set_up(
    args: argparse.Namespace, prepared: PreparedStars
) -> tuple[Trainer, dict[str, StarLoader], dict[str, np.ndarray]]:
    """A run's trainer; its loaders and the indices of its stars, by part of the split."""
    device, recipe = choose_device(args.device), args.recipe
    torch.manual_seed(args.random_seed)
    splits = split_stars(prepared, args.validation_split, args.test_split, args.random_seed)
    classifier = make_classifier(recipe, choose_precision(args.precision, device), prepared, splits["train"])
    loaders = {part: StarLoader(prepared, indices, device) for part, indices in splits.items()}
    steps_per_epoch = loaders["train"].num_batches(recipe.batch_size)
    return Trainer(classifier.to(device), recipe.num_epochs, steps_per_epoch), loaders, splits


def make_classifier(recipe: Recipe, precision: str, prepared: PreparedStars, training_rows: np.ndarray) -> Classifier:
    """A classifier before training: initial weights, and the standardisation of the training stars."""
    classifier = Classifier(recipe, precision)
    if recipe.modality != "spectrum" and recipe.image_weights != "none":
        load_image_weights(classifier.network.image_encoder, recipe.image_backbone, recipe.image_weights)
    if recipe.modality != "image":
        some = training_rows[:: math.ceil(len(training_rows) / STATISTICS_STARS)]
        classifier.standardise.fit(prepared.spectra[some])
    return classifier


def finish(record: dict, loaders: dict[str, StarLoader], paths: Paths) -> None:
    """Evaluate the best checkpoint, put the run into the history, draw its plots."""
    best, checkpoint = load_checkpoint(paths.checkpoint, loaders["validation"].device)
    final, config = record["final_metrics"], record["config"]
    final["best_epoch"] = checkpoint["epoch"]
    if checkpoint["epoch"] > len(record["epoch_metrics"]["train_loss"]):
        return  # a resumed run, stopped before it was where it had been stopped before: its earlier record stays
    stars = {part: f"{len(loader)} {part} stars of {config['stars']}" for part, loader in loaders.items()}
    evaluations = {part: evaluate(best, loaders[part]) for part in PARTS if len(loaders[part])}
    for part, evaluation in evaluations.items():
        key = "val" if part == "validation" else part
        final |= evaluation.final_metrics(key, f"{stars[part]}, {PARTS[part]}")
        report = evaluation.report()
        record["classification_report" if part == "validation" else "test_classification_report"] = report
        print(f"\nbest checkpoint (epoch {final['best_epoch']}) on {stars[part]} ({PARTS[part]}):\n\n{report}")
        print_scores(evaluation.scores(), final[f"final_{key}_intervals_95"])

    # The record first: it must not be lost if a plot cannot be drawn.
    history.put_into_history(paths.history, record)
    history.plot_training(paths.training_plot, record)
    for part, evaluation in evaluations.items():
        path = paths.confusion_matrix[part]
        history.plot_confusion_matrix(path, evaluation.targets, evaluation.predictions, stars[part])
    print(f"\ntrained in {record['total_training_time_seconds']:.0f} s. Open these:")
    plots = [paths.confusion_matrix[part] for part in evaluations]
    for file in (paths.history, paths.training_plot, *plots, paths.checkpoint):
        print(f"  {file}")


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """--evaluate: score a checkpoint on its validation or test stars, or on a directory new to it."""
    classifier, checkpoint = load_checkpoint(args.evaluate, choose_device(args.device))
    config = checkpoint["config"]
    parts = {part: [Star(*row) for row in rows] for part, rows in checkpoint["splits"].items()}
    prepared, _ = read_stars(args.data_dir, classifier.recipe.modality, args.num_workers)
    if args.split == "all":
        indices = np.arange(len(prepared.stars))
        if seen := count_known(prepared.stars, parts["train"] + parts["validation"]):
            print(f"note: {seen} of these stars were used for training or checkpoint selection: optimistic")
    else:
        wanted = {star.spectrum_id for star in parts[args.split]}
        if not wanted:
            raise DataError(f"{args.evaluate}: its run held out no {args.split} stars (train.py --test-split 0.1 does)")
        indices = np.flatnonzero([star.spectrum_id in wanted for star in prepared.stars])
        print(f"{len(indices)} of the {len(wanted)} {args.split} stars of the checkpoint are here")
        if not len(indices):
            raise DataError(
                f"{args.data_dir}: none of the checkpoint's {args.split} stars is here; --split all scores others"
            )
    loader = StarLoader(prepared, indices, next(classifier.parameters()).device)
    evaluation = evaluate(classifier, loader)
    print(f"\n{args.evaluate}, epoch {checkpoint['epoch']}, on {describe([prepared.stars[i] for i in indices])}")
    print(f"({args.split}; trained on {len(parts['train'])} of {config['stars']})\n")
    print(evaluation.report())
    print_scores(evaluation.scores(), evaluation.intervals())
    print(f"loss {evaluation.loss:.3f}")


def differing_options(args: argparse.Namespace, unfinished: Training) -> list[str]:
    """The options on the command line that are not as in the unfinished run."""
    now, then = (
        options | options["recipe"] | {"recipe": options["recipe_name"]}
        for options in (history.plain_options(args), unfinished.options)
    )
    free = {"output_dir", "device", "num_workers"}  # the run may have moved
    compared = args.given.keys() & now.keys() - free
    return sorted(args.given[name] for name in compared if now[name] != then[name])


def resume(args: argparse.Namespace) -> tuple[argparse.Namespace, Training | None]:
    """The options of the unfinished run that --resume names, and that run.

    With "auto" it is the newest one that agrees with the options on the command line; None if there is none. Raises
    DataError where an option differs from those of the run that is named.
    """
    automatic = args.resume == "auto"
    newest_first = sorted((args.output_dir / "checkpoints").glob(history.STATE_FILES.format("*")), reverse=True)
    for path in newest_first if automatic else [Path(args.resume)]:
        unfinished = history.load_training(path)
        if not (differing := differing_options(args, unfinished)):
            break
        if not automatic:
            raise DataError(f"{path}: its run had another {differing[0]}; go on without that option")
        print(f"{path}: not resumed, its run had another {', '.join(differing)}")
    else:
        print(f"{args.output_dir / 'checkpoints'}: no unfinished run of these options; a new one begins")
        return args, None
    options = unfinished.options | {
        "recipe": Recipe(**unfinished.options["recipe"]),
        "data_dir": Path(unfinished.options["data_dir"]),
        "output_dir": path.parent.parent if path.parent.name else Path(".."),  # which may have moved
        "device": args.device,
        "num_workers": args.num_workers,
    }
    done = len(unfinished.record["epoch_metrics"]["train_loss"])
    print(f"{path}: {done} of {options['recipe'].num_epochs} epochs are done")
    return argparse.Namespace(**options), unfinished


def make_demo_stars(args: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise DataError("--demo is for one process")
    if args.data_dir.exists():
        print(f"{args.data_dir} exists: its stars are used; delete it for new ones")
        return
    low, high = DEMO_SNR
    print(f"simulating {DEMO_STARS_PER_CLASS} stars of each class, of S/N {low} to {high}: brighter than SDSS's")
    simulate(args.data_dir, per_class=DEMO_STARS_PER_CLASS, seed=args.random_seed, min_snr=low, max_snr=high)


def main(args: argparse.Namespace) -> None:
    unfinished = None
    with (
        distributed.process_group(),
        quietly(args.quiet or distributed.rank() > 0),
        out_of_memory_hint("try a smaller --batch-size"),
    ):
        if args.evaluate:
            evaluate_checkpoint(args)
            return
        if args.demo:
            make_demo_stars(args)
        if args.resume:
            args, unfinished = resume(args)
        prepared, unused_stars = read_stars(args.data_dir, args.recipe.modality, args.num_workers)
        if unfinished and identify(prepared) != unfinished.stars:
            raise DataError(
                f"{args.data_dir}: its stars are no longer the {unfinished.record['config']['stars']} that the run "
                "began with; only with these can it go on"
            )
        train(args, prepared, unused_stars, unfinished)


if __name__ == "__main__":
    run_as_script(lambda: main(ARGUMENTS))
