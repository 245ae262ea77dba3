"""Train and evaluate the M-star classifier on paired spectra and images.

    python train.py --demo                                     simulate stars, train on them, in demo/
    python train.py                                            train on ./objects.csv, spectra/, images/
    python train.py --recipe improved                          the improved recipe; see recipe.py
    python train.py --modality spectrum --epochs 30            single fields of the recipe changed
    python train.py --initial-checkpoint CHECKPOINT            fine-tune a trained network on other stars
    python train.py --resume auto                              resume after Ctrl-C or a crash
    torchrun --nproc-per-node=4 train.py                       on four GPUs
    python train.py --evaluate checkpoints/best_model_ID.pth   score a checkpoint on its validation stars

The network is in model.py, its loss in loss_sic.py, the hyper-parameters in recipe.py, one training step in trainer.py.
This file is a run: options, epochs, the best checkpoint, the record.
"""

from train_options import parse_arguments

if __name__ == "__main__":
    ARGUMENTS = parse_arguments(__doc__)  # before torch is imported: --help and mistakes are answered at once

import argparse
import contextlib
import math
import os
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributed
import history
import outliers
from cache import PreparedStars, read_stars
from catalog import Star, describe
from checkpoint import describe_training, load_checkpoint, load_image_weights, note_known_stars, save_checkpoint
from classifier import Classifier
from cli import DataError, progress, quietly, run_as_script, write_atomically
from dataset import StarLoader, random_stream, split_stars
from device import choose_device, choose_precision, is_out_of_memory, out_of_memory_hint
from evaluation import Evaluation, evaluate, fit_temperature, print_calibration, print_scores
from history import RunPaths, Training
from recipe import Recipe
from simulate_sdss_data import simulate
from trainer import Trainer

STATISTICS_STARS = 4096  # enough for the mean spectrum and its scale
STATE_INTERVAL = 60.0  # minimum seconds between two states written to the disk
EPOCH_LINE = (
    "{epoch:3d}/{epochs}  loss {train_loss:6.3f}  val loss {val_loss:6.3f}  accuracy {val_accuracy:.3f}  "
    "precision {val_precision:.3f}  recall {val_recall:.3f}  F1 {val_f1:.3f}{mark}  {seconds:5.1f} s"
)
PARTS = {"validation": "used for checkpoint selection: optimistic", "test": "held out"}
# Fields of the recipe that an initial checkpoint fixes: its network, and the preparation of its inputs
FIXED_BY_CHECKPOINT = ("modality", "image_backbone", "image_weights", "num_layers", "smoothing", "continuum_degree")

DEMO_STARS_PER_CLASS = 50
DEMO_SNR = (5, 60)  # brighter than the catalogue's stars, so that few stars and few epochs suffice


# Training


class LossMeter:
    """The mean of each term of the loss over an epoch, without waiting for the device.

    Raises DataError once a loss that is not finite has arrived on the host: a few steps late on a GPU; of several
    processes, at the end of the epoch, in all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.total, self.steps = torch.zeros(2, device=device), 0
        self.host_total = torch.zeros(2, pin_memory=device.type == "cuda")

    def add(self, losses: Tensor) -> None:
        self.total += losses
        self.steps += 1
        if distributed.world_size() == 1:
            self.check(self.host_total)
        self.host_total.copy_(self.total, non_blocking=True)

    def means(self) -> list[float]:
        self.check(self.total)
        return (self.total / self.steps).tolist()

    @staticmethod
    def check(total: Tensor) -> None:
        if not total.isfinite().all():
            raise DataError("the loss is not finite; try a smaller --learning-rate or --precision fp32")


def train_one_epoch(trainer: Trainer, loader: StarLoader, epoch: int, seed: int, description: str) -> list[float]:
    """One pass over the training stars; returns the mean classification and contrastive loss by star."""
    batch_size = trainer.recipe.batch_size
    order = torch.Generator().manual_seed(random_stream(seed, epoch))
    torch.manual_seed(random_stream(seed, epoch, distributed.rank() + 1))  # of the augmentation
    trainer.classifier.train()
    losses = LossMeter(trainer.device)
    batches = loader.epoch(batch_size, order)
    for batch in progress(batches, desc=description, unit="batch", total=loader.num_batches(batch_size)):
        losses.add(trainer.step(batch))
    return losses.means()


def train_and_validate(
    trainer: Trainer, loaders: dict[str, StarLoader], epoch: int, config: dict[str, Any]
) -> tuple[dict[str, Any], Evaluation]:
    """One epoch; returns its metrics by their names in history.py, and the evaluation of the validation stars."""
    now, learning_rate = f"epoch {epoch}/{config['num_epochs']}", trainer.learning_rate
    train_losses = train_one_epoch(trainer, loaders["train"], epoch, config["random_seed"], now)
    distributed.synchronise_buffers(trainer.classifier)
    validation = evaluate(trainer.classifier, loaders["validation"], f"{now}, validating")
    metrics = {"learning_rate": learning_rate, "val_retrieval_accuracy": validation.retrieval_accuracy}
    metrics |= {f"val_{name}": score for name, score in validation.scores().items()}
    for part, losses in (("train", train_losses), ("val", validation.losses)):
        metrics |= {f"{part}_loss": sum(losses)}
        metrics |= dict(zip((f"{part}_classification_loss", f"{part}_contrastive_loss"), losses, strict=True))
    return metrics, validation


def fit(
    trainer: Trainer, loaders: dict[str, StarLoader], training: Training, paths: RunPaths, contents: dict[str, Any],
    scalars: Any = None,
) -> None:  # fmt: skip
    """Train from the epoch that `training` has reached. After each epoch: validate, save the checkpoint if it is the
    best, extend the record; at most once in STATE_INTERVAL, save the state to resume from.

    contents: entries of the checkpoint beside classifier and epoch. scalars: a TensorBoard SummaryWriter, or None.
    """
    record, classifier = training.record, trainer.classifier
    config, curves, final = record["config"], record["epoch_metrics"], record["final_metrics"]
    epochs = config["num_epochs"]
    if training.states:
        trainer.load_state_dict(training.states)
    state_written = time.perf_counter()
    for epoch in range(len(curves["train_loss"]) + 1, epochs + 1):
        if config["patience"] and epoch - 1 - final.get("best_epoch", 0) >= config["patience"]:
            print(f"stopped: no better epoch since {final['best_epoch']}")
            break
        started = time.perf_counter()
        metrics, validation = train_and_validate(trainer, loaders, epoch, config)
        best = is_best(metrics["val_f1"], metrics["val_loss"], curves)
        if best:
            classifier.calibration_temperature.fill_(fit_temperature(validation.logits, validation.targets))
        if best and distributed.rank() == 0:  # before the record says so: Ctrl-C may come at any moment
            with write_atomically(paths.checkpoint) as temporary:
                save_checkpoint(temporary, classifier, epoch=epoch, **contents)
        metrics["seconds"] = round(time.perf_counter() - started, 3)
        for name, curve in curves.items():
            curve.append(metrics[name])
        if best:
            final["best_epoch"] = epoch
        record["total_training_time_seconds"] = round(record["total_training_time_seconds"] + metrics["seconds"], 1)
        if epoch < epochs and distributed.rank() == 0:
            training.snapshot(trainer.state_dict())
            if time.perf_counter() - state_written >= STATE_INTERVAL:
                training.save(paths.state)
                state_written = time.perf_counter()
        if scalars:
            for name in curves:
                scalars.add_scalar(name, metrics[name], epoch)
        print(EPOCH_LINE.format(epoch=epoch, epochs=epochs, mark="*" if best else " ", **metrics), flush=True)


def is_best(f1: float, loss: float, curves: dict[str, list[float]]) -> bool:
    """Whether an epoch has the highest validation F1 so far; of equal ones, the lowest validation loss."""
    before = zip(curves["val_f1"], (-loss for loss in curves["val_loss"]), strict=True)
    return (f1, -loss) > max(before, default=(-1.0, 0.0))


# A run


def train(
    args: argparse.Namespace, prepared: PreparedStars, unused_stars: dict[str, Any], unfinished: Training | None = None,
    weights: dict[str, Tensor] | None = None,
) -> dict:  # fmt: skip
    """A whole run on the prepared stars, or the rest of an unfinished one: split, train, evaluate the best checkpoint,
    record, plot. Returns the record. weights: a checkpoint's, to start from."""
    trainer, loaders, splits = set_up(args, prepared, weights)
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
        training = unfinished or history.begin(args, training_id, classifier, prepared, splits, unused_stars)
        record, config = training.record, training.record["config"]
        print(f"\n{config['model_architecture']}, {sum(p.numel() for p in classifier.parameters()) / 1e6:.1f} M "
              f"parameters, on {config['device']} in {config['precision']}; {config['stars']}: {len(splits['train'])} "
              f"to train, {len(splits['validation'])} to validate, {len(splits['test'])} held out\n")  # fmt: skip
        paths, stopped = history.run_paths(args.output_dir, training_id), None
        if unfinished and first:
            paths.remove_leftovers()
        writer = open_tensorboard(paths, record) if args.tensorboard and first else contextlib.nullcontext()
        try:
            with writer as scalars:
                fit(trainer, loaders, training, paths, contents | {"config": config}, scalars)
        except (KeyboardInterrupt, DataError, OSError, RuntimeError) as reason:
            if isinstance(reason, RuntimeError) and not is_out_of_memory(reason):
                raise
            stopped = reason.with_traceback(None)  # its frames hold the memory of the step that failed
        distributed.leave(failed=stopped is not None)
        if not first:
            if isinstance(stopped, OSError | RuntimeError):  # of this process alone; torchrun ends the others
                raise stopped
            return record  # the first process finishes alone
        if stopped and training.states:
            with contextlib.suppress(OSError):  # the disk is full: an earlier state may be there
                training.save(paths.state)
        record["stopped"] = None if stopped is None else str(stopped) or "interrupted"
        # A stopped run is recorded with the epochs that it completed, if any.
        if record["epoch_metrics"]["train_loss"]:
            finish(record, loaders, paths)
        if stopped is None:
            paths.state.unlink(missing_ok=True)
            return record
        if paths.state.exists():
            print(f"Resume after the last whole epoch with: python train.py --resume {paths.state}")
        raise stopped


def set_up(
    args: argparse.Namespace, prepared: PreparedStars, weights: dict[str, Tensor] | None = None
) -> tuple[Trainer, dict[str, StarLoader], dict[str, np.ndarray]]:
    """The trainer; by part of the split, the loaders and the indices of the stars. weights: see `make_classifier`."""
    device, recipe = choose_device(args.device), args.recipe
    torch.manual_seed(args.random_seed)
    splits = split_stars(
        prepared, args.validation_split, args.test_split, args.random_seed, all_classes=not args.initial_checkpoint
    )
    classifier = make_classifier(recipe, choose_precision(args.precision, device), prepared, splits["train"], weights)
    loaders = {part: StarLoader(prepared, indices, device) for part, indices in splits.items()}
    steps_per_epoch = loaders["train"].num_batches(recipe.batch_size)
    return Trainer(classifier.to(device), recipe.num_epochs, steps_per_epoch), loaders, splits


def make_classifier(
    recipe: Recipe, precision: str, prepared: PreparedStars, training_rows: np.ndarray,
    weights: dict[str, Tensor] | None = None,
) -> Classifier:  # fmt: skip
    """An untrained classifier, with the standardisation of the training stars; or, with `weights`, one with the weights
    and the standardisation of a checkpoint."""
    classifier = Classifier(recipe, precision)
    if weights:
        classifier.load_state_dict(weights)
        return classifier
    if recipe.modality != "spectrum" and recipe.image_weights != "none":
        load_image_weights(classifier.network.image_encoder, recipe.image_backbone, recipe.image_weights)
    if recipe.modality != "image":
        some = training_rows[:: math.ceil(len(training_rows) / STATISTICS_STARS)]
        classifier.standardise.fit(prepared.spectra[some])
    return classifier


def open_tensorboard(paths: RunPaths, record: dict) -> Any:
    """A SummaryWriter; in a resumed run, repeated epochs replace those written before."""
    from torch.utils.tensorboard import SummaryWriter  # here: it is optional

    return SummaryWriter(paths.tensorboard, purge_step=len(record["epoch_metrics"]["train_loss"]) + 1)


def finish(record: dict, loaders: dict[str, StarLoader], paths: RunPaths) -> None:
    """Evaluate the best checkpoint, put the run into the history, draw its plots."""
    best, checkpoint = load_checkpoint(paths.checkpoint, loaders["validation"].device)
    final, config, curves = record["final_metrics"], record["config"], record["epoch_metrics"]
    temperature, last_epoch = best.calibration_temperature.item(), len(curves["val_loss"])
    final["best_epoch"] = checkpoint["epoch"]
    if checkpoint["epoch"] > last_epoch:
        return  # a resumed run, stopped again before it reached its checkpoint's epoch: the earlier record stays
    final |= {"last_epoch": last_epoch, "calibration_temperature": temperature}
    final |= {f"last_{name}": curve[-1] for name, curve in curves.items() if name.startswith("val_")}
    stars = {part: f"{len(loader)} {part} stars of {config['stars']}" for part, loader in loaders.items()}
    evaluations = {part: evaluate(best, loaders[part]) for part in PARTS if len(loaders[part])}
    for part, evaluation in evaluations.items():
        key = "val" if part == "validation" else part
        final |= evaluation.final_metrics(key, f"{stars[part]}, {PARTS[part]}", temperature)
        report = evaluation.report()
        record["classification_report" if part == "validation" else "test_classification_report"] = report
        print(f"\nbest checkpoint (epoch {final['best_epoch']}) on {stars[part]} ({PARTS[part]}):\n\n{report}")
        print_scores(evaluation.scores(), final[f"final_{key}_intervals_95"])
        print_calibration(evaluation, temperature)

    # The record first: it must not be lost if a plot cannot be drawn.
    history.put_into_history(paths.history, record)
    history.plot_training(paths.training_plot, record)
    for part, evaluation in evaluations.items():
        history.plot_confusion_matrix(paths.confusion_matrix[part], evaluation, stars[part])
    part, evaluation = list(evaluations.items())[-1]  # the test stars, if there are some
    history.plot_reliability(paths.reliability, evaluation, temperature, f"{stars[part]}\n({PARTS[part]})")
    print(f"\ntrained in {record['total_training_time_seconds']:.0f} s. Open these:")
    plots = [paths.confusion_matrix[part] for part in evaluations]
    for file in (paths.history, paths.training_plot, *plots, paths.reliability, paths.checkpoint):
        print(f"  {file}")


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """--evaluate: score a checkpoint on its validation or test stars, or on all stars of another directory."""
    classifier, checkpoint = load_checkpoint(args.evaluate, choose_device(args.device))
    prepared, _ = read_stars(args.data_dir, classifier.recipe.modality, args.num_workers)
    if args.split == "all":
        indices = np.arange(len(prepared.stars))
        note_known_stars(prepared.stars, args.evaluate, checkpoint)
    else:
        wanted = {Star(*row).spectrum_id for row in checkpoint["splits"][args.split]}
        if not wanted:
            raise DataError(f"{args.evaluate}: its run held out no {args.split} stars (train.py --test-split 0.1 does)")
        indices = np.flatnonzero([star.spectrum_id in wanted for star in prepared.stars])
        print(f"{len(indices)} of the {len(wanted)} {args.split} stars of the checkpoint are here")
        if not len(indices):
            raise DataError(
                f"{args.data_dir}: none of the checkpoint's {args.split} stars is here; --split all scores others"
            )
    loader = StarLoader(prepared, indices, classifier.device)
    evaluation = evaluate(classifier, loader)
    print(f"\n{args.evaluate}, epoch {checkpoint['epoch']}, on {describe([prepared.stars[i] for i in indices])}")
    print(f"({PARTS.get(args.split, 'all stars')}; trained on {describe_training(checkpoint)})\n")
    print(evaluation.report())
    print_scores(evaluation.scores(), evaluation.intervals())
    print_calibration(evaluation, classifier.calibration_temperature.item())
    print(f"loss {sum(evaluation.losses):.3f}")


# Starting from a checkpoint, or resuming a run


def continue_from(args: argparse.Namespace, classifier: Classifier, checkpoint: dict[str, Any]) -> argparse.Namespace:
    """The options of a run from --initial-checkpoint: the checkpoint's recipe, overridden by the command line.

    Raises DataError for an option that does not fit the checkpoint's network or preparation.
    """
    own = asdict(classifier.recipe)
    given = {name: getattr(args, name) for name in own.keys() & args.given.keys()}
    for name in FIXED_BY_CHECKPOINT:
        if given.get(name, own[name]) != own[name]:
            raise DataError(f"{args.initial_checkpoint}: its {name} is {own[name]}; go on without {args.given[name]}")
    options = {"recipe": replace(classifier.recipe, **given), "recipe_name": checkpoint["config"]["recipe"]}
    return argparse.Namespace(**vars(args) | options)


def differing_options(args: argparse.Namespace, unfinished: Training) -> list[str]:
    """The options on the command line that differ from the unfinished run's."""
    now, then = (
        options | options["recipe"] | {"recipe": options["recipe_name"]}
        for options in (history.plain_options(args), unfinished.options)
    )
    free = {"output_dir", "device", "num_workers"}  # the run may have moved
    if args.resume != "auto":
        free.add("data_dir")  # its stars, too; main compares them
    compared = args.given.keys() & now.keys() - free
    return sorted(args.given[name] for name in compared if now[name] != then[name])


def resume(args: argparse.Namespace) -> tuple[argparse.Namespace, Training | None]:
    """The options of the unfinished run that --resume names, and that run.

    "auto": the newest run that agrees with the options on the command line; None if there is none. A path: raises
    DataError if an option other than --data-dir differs from that run's.
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
    if "data_dir" in args.given:  # also for the next --resume
        unfinished.options["data_dir"] = str(args.data_dir)
    options = unfinished.options | {
        "recipe": Recipe(**unfinished.options["recipe"]),
        "data_dir": Path(unfinished.options["data_dir"]),
        "output_dir": Path(os.path.abspath(path)).parent.parent,  # not resolve(): checkpoints/ may be a link
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
    unfinished = checkpoint = weights = None
    with (
        distributed.process_group(),
        quietly(args.quiet or distributed.rank() > 0),
        out_of_memory_hint("try a smaller --batch-size, or --device cpu"),
    ):
        if args.evaluate:
            evaluate_checkpoint(args)
            return
        if args.demo:
            make_demo_stars(args)
        if args.resume:
            args, unfinished = resume(args)
        if unfinished:
            # So that nothing is downloaded or fitted again; fit loads the rest of the state.
            weights = unfinished.states["classifier"]
        elif args.initial_checkpoint:
            classifier, checkpoint = load_checkpoint(args.initial_checkpoint)
            args, weights = continue_from(args, classifier, checkpoint), classifier.state_dict()
        if args.tensorboard and not find_spec("tensorboard"):
            raise DataError("--tensorboard: TensorBoard is not installed; pip install tensorboard")
        prepared, unused_stars = read_stars(args.data_dir, args.recipe.modality, args.num_workers)
        if checkpoint:
            note_known_stars(prepared.stars, args.initial_checkpoint, checkpoint)
        if unfinished and history.identify(prepared) != unfinished.stars:
            raise DataError(
                f"{args.data_dir}: its stars are no longer the {unfinished.record['config']['stars']} that the run "
                "began with; only with these can it go on (--resume FILE --data-dir DIR, if they have moved)"
            )
        train(args, prepared, unused_stars, unfinished, weights)


if __name__ == "__main__":
    run_as_script(lambda: main(ARGUMENTS))
