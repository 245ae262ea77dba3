"""Train and evaluate the M-star classifier on paired spectra and images.

    python train.py --demo                                     simulate stars, train on them, in demo/
    python train.py                                            train on ./objects.csv, spectra/, images/
    python train.py --data-dir DIR --modality spectrum         spectra alone
    python train.py --evaluate checkpoints/best_model_ID.pth   score a checkpoint on its validation stars

Read top to bottom: options, stars, split, training and evaluation, a run. The network is in model.py,
its loss in loss_sic.py, the reading of files in data.py and cache.py, a run's record and plots in history.py.
"""

import argparse
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import classification_report, precision_recall_fscore_support
from sklearn.model_selection import train_test_split
from sklearn.utils import resample
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import cache
import data
import history
import outliers
from cache import CachedArray, CheckedStar
from data import CLASS_NAMES, DataError, Star
from loss_sic import loss_sic
from model import IMAGE_BACKBONES, MODALITIES, FusionModel, load_checkpoint, normalise_images, save_checkpoint
from simulate_sdss_data import simulate

WARMUP_EPOCHS = 2
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
AVERAGE_SPAN = 0.2  # of all steps: how far back the running mean of the weights, which is validated and kept, reaches
BATCH_NORM_BATCHES = 4  # of training stars, from which those weights get the statistics of their batch norms
SPECTRA_AT_ONCE = 1024  # in memory, when their mean is taken
BOOTSTRAP_DRAWS = 1000
SIC_NEGATIVES = ("all", "other-classes")
PARTS = {"validation": "which chose the checkpoint, so that their score flatters", "test": "which chose nothing"}

DEMO_DIR = Path("demo")
DEMO_STARS_PER_CLASS = 50
DEMO_DEFAULTS = {"data_dir": DEMO_DIR / "stars", "output_dir": DEMO_DIR, "num_epochs": 8, "image_weights": "none"}

# Options


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and evaluate the M-star classifier on paired spectra and images.",
        epilog="examples:\n" + __doc__.split("\n\n")[1],
        formatter_class=data.ScriptHelp,
    )
    add, number = parser.add_argument, data.number_between
    add("--data-dir", type=Path, default=Path("."), help="holds objects.csv, spectra/ and images/")
    add("--output-dir", type=Path, default=Path("."), help="gets checkpoints/, plots/ and training_history.json")
    add("--epochs", dest="num_epochs", type=number(int, 1, 10**6), default=20, help="passes over the training stars")
    add("--batch-size", type=number(int, 1, 10**6), default=32, help="stars a step")
    add("--learning-rate", type=number(float, 1e-9, 10), default=3e-4, help="highest rate of the schedule")
    add(
        "--validation-split",
        type=number(float, 0.001, 0.999),
        default=0.2,
        help="fraction of the stars that chooses the checkpoint",
    )
    add("--test-split", type=number(float, 0, 0.999), default=0.0, help="fraction held out from every choice")
    add("--seed", dest="random_seed", type=number(int, 0, 2**32 - 1), default=42, help="of all that is drawn")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add(
        "--num-workers",
        type=number(int, 0, 256),
        default=min(8, os.cpu_count() or 1),
        help="processes that read the stars' files",
    )
    add("--image-backbone", choices=IMAGE_BACKBONES, default="resnet152", help="the paper's is resnet152")
    add("--image-weights", metavar="{imagenet,none,PATH}", default="imagenet", help="initial weights of the ResNet")
    add("--modality", choices=MODALITIES, default="fusion", help="what the network reads")
    add("--sic-weight", type=number(float, 0, 1000), default=1.0, help="weight of the contrastive loss")
    add("--sic-negatives", choices=SIC_NEGATIVES, default="all", help="the stars that the contrastive loss tells a "
        "star from: all others, as in the paper, or those of other classes")  # fmt: skip
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="score this checkpoint instead of training")
    add("--split", choices=("validation", "test", "all"), default="validation", help="the stars that --evaluate "
        "scores; all: every star of a directory that took no part in training")  # fmt: skip
    add("--demo", action="store_true", help=f"{len(CLASS_NAMES) * DEMO_STARS_PER_CLASS} simulated stars, the full "
        f"network from random weights, {DEMO_DEFAULTS['num_epochs']} epochs; all in {DEMO_DIR}/")  # fmt: skip
    args = parser.parse_args(argv)
    if args.demo:  # the demo's defaults; what the command line names goes before them
        parser.set_defaults(**DEMO_DEFAULTS)
        args = parser.parse_args(argv)
    if args.validation_split + args.test_split >= 1:
        parser.error("--validation-split and --test-split together leave no star to train on")
    return args


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without instructions of its own for it, a processor is slower in bf16 than in fp32
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return "bf16" if has_bf16 else "fp32"


# Stars: read, checked, counted


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
    checked, arrays = cache.open_stars(
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


def turn_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 3, H, H) turned by quarter turns and mirrored at random: the sky has no up and no left."""
    symmetries = torch.randint(8, (len(images),), generator=generator).tolist()
    turned = torch.empty_like(images)
    # NumPy turns and mirrors without copying, so that each image is copied once.
    for image, target, k in zip(images.numpy(), turned.numpy(), symmetries, strict=True):
        view = np.rot90(image, k % 4, axes=(1, 2))
        target[:] = view[:, :, ::-1] if k >= 4 else view
    return turned


class StarDataset(Dataset):
    """Some of the prepared stars; one indexed read gives a whole batch (spectra, images, targets).

    spectra (B, 3522) float32 and images (B, 3, 128, 128) uint8, turned at random if there is a
    generator to draw from; None for an input the modality does not read; targets (B,) int64.
    """

    def __init__(
        self, prepared: PreparedStars, indices: np.ndarray, augmentation: torch.Generator | None = None
    ) -> None:
        self.prepared = prepared
        self.indices = torch.as_tensor(indices)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor | None, Tensor | None, Tensor]:
        chosen = self.indices[positions]
        spectra, images, targets = self.prepared.spectra, self.prepared.images, self.prepared.targets
        spectra = None if spectra is None else spectra[chosen]
        images = None if images is None else images[chosen]
        if images is not None and self.augmentation is not None:
            images = turn_images(images, self.augmentation)
        return spectra, images, targets[chosen]


def make_loader(
    prepared: PreparedStars, indices: np.ndarray, batch_size: int, shuffle_seed: int | None = None
) -> DataLoader:
    """Batches of those stars: for training if a seed is given, shuffled anew each epoch and with augmentation;
    in order and as they are otherwise."""
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    return DataLoader(
        StarDataset(prepared, indices, augmentation=generator),
        batch_size=batch_size,
        shuffle=shuffle_seed is not None,
        generator=generator,
        collate_fn=lambda batch: batch,  # __getitems__ already gives a batch
        pin_memory=torch.cuda.is_available(),
    )


# Split


def split_stars(
    prepared: PreparedStars, validation_split: float, test_split: float, seed: int
) -> dict[str, np.ndarray]:
    """Indices of the "train", "validation" and "test" stars: stratified by class, no star in two parts."""
    needed = 2 if test_split == 0 else 3
    counts = Counter(star.subclass for star in prepared.stars)
    for name in CLASS_NAMES:
        if counts[name] < needed:
            raise DataError(
                f"class {name} has {counts[name]} usable star(s); every class needs at least {needed} to be split"
            )

    star_group = data.group_same_stars(prepared.stars)
    groups, first = np.unique(star_group, return_index=True)
    group_class = prepared.targets.numpy()[first]

    def part(groups: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        try:
            return train_test_split(groups, test_size=fraction, stratify=group_class[groups], random_state=seed)
        except ValueError as error:  # fewer stars in a part than classes
            raise DataError(f"{len(groups)} stars cannot be split, {fraction:.2f} of them apart: {error}") from error

    held_out = np.array([], dtype=int)
    if test_split > 0:
        groups, held_out = part(groups, test_split)
    training, validation = part(groups, validation_split / (1 - test_split))
    parts = {"train": training, "validation": validation, "test": held_out}
    splits = {name: np.flatnonzero(np.isin(star_group, members)) for name, members in parts.items()}
    for name, indices in splits.items():
        absent = set(range(len(CLASS_NAMES))) - set(prepared.targets[indices].tolist())
        if len(indices) and absent:
            raise DataError(
                f"no {CLASS_NAMES[min(absent)]} star in the {name} part: too few stars, or too small a part"
            )
    return splits


# Training and evaluation


class Engine(NamedTuple):
    """What every pass over the stars needs."""

    model: FusionModel
    device: torch.device
    precision: str
    sic_weight: float = 1.0
    sic_negatives: str = "all"

    def batches(self, loader: Iterable, description: str) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor]]:
        """The loader's batches on the device, under a progress bar."""
        for batch in tqdm(loader, desc=description, unit="batch", leave=False):
            yield tuple(None if part is None else part.to(self.device) for part in batch)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self, spectra: Tensor | None, images: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's loss and class logits (B, 5), float32."""
        with self.autocast():
            align_logits, fuse_logits = self.model(spectra, images)
        fuse_logits = fuse_logits.float()
        loss = loss_sic(
            align_logits,
            fuse_logits,
            targets,
            sic_weight=self.sic_weight,
            same_class_negatives=self.sic_negatives == "all",
        )
        return loss, fuse_logits


def measure_batch_norm(engine: Engine, loader: DataLoader) -> None:
    """Set the means and variances of the network's batch norms to those of a few batches.

    An average over steps of what other weights gave, as in training, is not what these weights give.
    """
    if engine.model.image_encoder is not None:
        batches = engine.batches(itertools.islice(loader, BATCH_NORM_BATCHES), "batch norms")
        with engine.autocast():
            update_bn((normalise_images(images) for _, images, _ in batches), engine.model.image_encoder)


def train_one_epoch(
    engine: Engine,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    averaged: AveragedModel,
    description: str,
) -> float:
    """One pass over the training stars, with the running mean of the weights; returns the mean loss, by star."""
    engine.model.train()
    total = torch.zeros((), device=engine.device)
    for spectra, images, targets in engine.batches(loader, description):
        loss, _ = engine.loss(spectra, images, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(engine.model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(engine.model)
        total += loss.detach() * len(targets)
    return total.item() / len(loader.dataset)


class Evaluation(NamedTuple):
    loss: float  # mean, by star
    targets: np.ndarray  # (N,) class indices
    predictions: np.ndarray  # (N,) class indices

    def scores(self) -> dict[str, float]:
        """Accuracy; precision, recall and F1 weighted by class frequency, F1 also as the plain mean over
        classes; fraction within ± 1 subclass."""
        *by_class, count = precision_recall_fscore_support(self.targets, self.predictions, zero_division=0)
        precision, recall, f1 = (float(np.average(score, weights=count)) for score in by_class)
        return {
            "accuracy": float((self.predictions == self.targets).mean()),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1_macro": float(by_class[2].mean()),
            "within_one_subclass": float((np.abs(self.predictions - self.targets) <= 1).mean()),
        }

    def intervals(self) -> dict[str, list[float]]:
        """The 95 % interval of each score, by the bootstrap: these stars drawn again with replacement."""
        random = np.random.RandomState(0)
        draws = [
            Evaluation(self.loss, *resample(self.targets, self.predictions, random_state=random)).scores()
            for _ in range(BOOTSTRAP_DRAWS)
        ]
        return pd.DataFrame(draws).quantile([0.025, 0.975]).to_dict(orient="list")

    def report(self) -> str:
        labels = range(len(CLASS_NAMES))
        return classification_report(
            self.targets, self.predictions, labels=labels, target_names=CLASS_NAMES, digits=3, zero_division=0
        )


@torch.inference_mode()
def evaluate(engine: Engine, loader: DataLoader, description: str = "evaluating") -> Evaluation:
    """One pass over a loader's stars, in its order, without training."""
    engine.model.eval()
    total, targets_seen, predictions = 0.0, [], []
    for spectra, images, targets in engine.batches(loader, description):
        loss, logits = engine.loss(spectra, images, targets)
        total += loss.item() * len(targets)
        targets_seen.append(targets.cpu())
        predictions.append(logits.argmax(dim=1).cpu())
    return Evaluation(total / len(loader.dataset), torch.cat(targets_seen).numpy(), torch.cat(predictions).numpy())


def make_optimizer(
    model: FusionModel, learning_rate: float, epochs: int, steps_per_epoch: int
) -> tuple[Optimizer, LRScheduler]:
    """AdamW, its rate rising over two epochs (at most a third of the run), then falling to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    total_steps = epochs * steps_per_epoch
    warmup_steps = min(WARMUP_EPOCHS * steps_per_epoch, math.ceil(total_steps / 3))

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return optimizer, LambdaLR(optimizer, rate)


def fit(
    engine: Engine, prepared: PreparedStars, splits: dict[str, np.ndarray], record: dict, checkpoint_path: Path
) -> None:
    """Train; after each epoch validate the running mean of the weights, print, extend record["epoch_metrics"],
    and keep the best checkpoint."""
    config, curves, final = record["config"], record["epoch_metrics"], record["final_metrics"]
    train_loader = make_loader(prepared, splits["train"], config["batch_size"], shuffle_seed=config["random_seed"])
    val_loader = make_loader(prepared, splits["validation"], config["batch_size"])
    epochs = config["num_epochs"]
    optimizer, scheduler = make_optimizer(engine.model, config["learning_rate"], epochs, len(train_loader))
    decay = 1 - 1 / max(1, AVERAGE_SPAN * epochs * len(train_loader))
    averaged = AveragedModel(engine.model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    # Whole stars, not rows: --evaluate must know them also in another catalogue, or after a change of this one.
    parts = {part: [list(prepared.stars[i]) for i in indices] for part, indices in splits.items()}
    references = outliers.fit_references(make_loader(prepared, splits["train"], config["batch_size"]))
    best_f1 = -1.0
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        now = f"epoch {epoch}/{epochs}"
        train_loss = train_one_epoch(engine, train_loader, optimizer, scheduler, averaged, now)
        validated = engine._replace(model=averaged.module)
        measure_batch_norm(validated, train_loader)
        validation = evaluate(validated, val_loader, f"{now}, validating")
        if not math.isfinite(train_loss + validation.loss):
            raise DataError(
                f"the loss is not finite in epoch {epoch}; try a smaller --learning-rate or --precision fp32"
            )
        scores = validation.scores()
        curves["train_loss"].append(train_loss)
        curves["val_loss"].append(validation.loss)
        for name in ("accuracy", "precision", "recall", "f1"):
            curves[f"val_{name}"].append(scores[name])
        # Less than half a star apart is no difference; of equals the later has learned for longer.
        improved = scores["f1"] > best_f1 - 0.5 / len(splits["validation"])
        if improved:
            best_f1, final["best_epoch"] = max(best_f1, scores["f1"]), epoch
            with data.write_atomically(checkpoint_path) as temporary:
                save_checkpoint(
                    temporary, averaged.module, epoch=epoch, config=config, splits=parts, references=references
                )
        print(
            f"{epoch:3d}/{epochs}  loss {train_loss:6.3f}  val loss {validation.loss:6.3f}  "
            f"accuracy {scores['accuracy']:.3f}  precision {scores['precision']:.3f}  recall {scores['recall']:.3f}  "
            f"F1 {scores['f1']:.3f}{'*' if improved else ' '}  {time.perf_counter() - started:5.1f} s",
            flush=True,
        )


# A run


def begin_record(
    args: argparse.Namespace,
    training_id: str,
    engine: Engine,
    prepared: PreparedStars,
    splits: dict[str, np.ndarray],
    not_used: dict[str, Any],
) -> dict:
    """A run's record in training_history.json, before its first epoch: every option, and what they came to."""
    image = args.image_backbone if engine.model.image_encoder is not None else None
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del options["evaluate"], options["split"]  # of the other command
    config = {
        "training_id": training_id,
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        **options,
        "device": "cpu" if engine.device.type == "cpu" else torch.cuda.get_device_name(engine.device),
        "precision": engine.precision,
        "spec_length": data.SPECTRUM_LENGTH,
        "image_size": data.IMAGE_SIZE,
        "num_classes": len(CLASS_NAMES),
        "class_names": list(CLASS_NAMES),
        "model_architecture": f"FusionModel({args.modality}{'' if image is None else f', {image}'})",
        "image_backbone": image,
        "image_weights": None if image is None else args.image_weights,
        "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, {WARMUP_EPOCHS} epochs of warm-up, cosine, "
        f"gradients clipped at {MAX_GRADIENT_NORM}",
        "csv_file": str(data.catalog_path(args.data_dir)),
        "image_dir": str(args.data_dir / "images"),
        "spectra_dir": str(args.data_dir / "spectra"),
        "stars": data.describe(prepared.stars),
        "simulated_stars": sum(star.simulated for star in prepared.stars),
        "stars_by_class_and_split": {
            part: {name: int((prepared.targets[indices] == k).sum()) for k, name in enumerate(CLASS_NAMES)}
            for part, indices in splits.items()
        },
        **not_used,
        "versions": history.library_versions(),
        "git_commit": history.git_commit(),
    }
    return {"config": config, "epoch_metrics": {name: [] for name in history.EPOCH_METRICS}, "final_metrics": {}}


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """--evaluate: score a checkpoint on its validation or test stars, or on a directory new to it."""
    model, checkpoint = load_checkpoint(args.evaluate)
    config = checkpoint["config"]
    parts = {part: [Star(*row) for row in rows] for part, rows in checkpoint["splits"].items()}
    device = choose_device(args.device)
    model = model.to(device, memory_format=torch.channels_last)
    precision = choose_precision(args.precision, device)
    engine = Engine(model, device, precision, config["sic_weight"], config["sic_negatives"])
    prepared, _ = read_stars(args.data_dir, config["modality"], args.num_workers)

    if args.split == "all":
        indices = np.arange(len(prepared.stars))
        known = parts["train"] + parts["validation"]
        groups = data.group_same_stars([*known, *prepared.stars])
        seen = np.isin(groups[len(known) :], groups[: len(known)]).sum()
        if seen:
            print(f"note: the checkpoint was trained on, or chosen by, {seen} of these stars: the score flatters it")
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
    # The run's own batch size: the contrastive loss is larger the more stars there are to tell apart.
    evaluation = evaluate(engine, make_loader(prepared, indices, config["batch_size"]))
    print(f"\n{args.evaluate}, epoch {checkpoint['epoch']}, on {data.describe([prepared.stars[i] for i in indices])}")
    print(f"({args.split}; trained on {len(parts['train'])} of {config['stars']})\n")
    print(evaluation.report())
    print_scores(evaluation.scores(), evaluation.intervals())
    print(f"loss {evaluation.loss:.3f}")


def print_scores(scores: dict[str, float], intervals: dict[str, list[float]]) -> None:
    print("with its 95 % bootstrap interval:")
    for name, value in scores.items():
        low, high = intervals[name]
        print(f"{name.replace('_', ' '):>22} {value:.3f}  ({low:.3f} to {high:.3f})")


def train(args: argparse.Namespace, prepared: PreparedStars, not_used: dict[str, Any]) -> dict:
    """A whole run on those stars: split, train; then evaluate the best checkpoint, record, plot. Returns the record."""
    device = choose_device(args.device)
    torch.manual_seed(args.random_seed)
    torch.backends.cudnn.benchmark = True
    splits = split_stars(prepared, args.validation_split, args.test_split, args.random_seed)
    weights = None if args.image_weights == "none" or args.modality == "spectrum" else args.image_weights
    model = FusionModel(
        num_classes=len(CLASS_NAMES), modality=args.modality, image_backbone=args.image_backbone, image_weights=weights
    ).to(device, memory_format=torch.channels_last)
    if model.spec_encoder is not None:
        chunks = torch.from_numpy(splits["train"]).split(SPECTRA_AT_ONCE)
        model.fit_normalisation(prepared.spectra[indices] for indices in chunks)
    engine = Engine(model, device, choose_precision(args.precision, device), args.sic_weight, args.sic_negatives)

    with history.claim_training_id(args.output_dir) as training_id:
        record = begin_record(args, training_id, engine, prepared, splits, not_used)
        config = record["config"]
        print(f"\n{config['model_architecture']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
              f"on {config['device']} in {engine.precision}; {config['stars']}: {len(splits['train'])} to train, "
              f"{len(splits['validation'])} to validate, {len(splits['test'])} to test\n")  # fmt: skip
        checkpoint_path = args.output_dir / "checkpoints" / f"best_model_{training_id}.pth"
        started = time.perf_counter()
        fit(engine, prepared, splits, record, checkpoint_path)
        record["total_training_time_seconds"] = round(time.perf_counter() - started, 1)
        best, _ = load_checkpoint(checkpoint_path)
        engine = engine._replace(model=best.to(device, memory_format=torch.channels_last))
        files = conclude(engine, prepared, splits, record, args.output_dir)
        print(f"\ntrained in {record['total_training_time_seconds']:.0f} s. Open these:")
        for file in [*files, checkpoint_path]:
            print(f"  {file}")
        return record


def conclude(
    engine: Engine, prepared: PreparedStars, splits: dict[str, np.ndarray], record: dict, output_dir: Path
) -> list[Path]:
    """Evaluate the best checkpoint, append the run to the history, draw its plots; returns the files written."""
    final, training_id = record["final_metrics"], record["config"]["training_id"]
    stars = {part: f"{len(splits[part])} {part} stars of {record['config']['stars']}" for part in splits}
    evaluations = {
        part: evaluate(engine, make_loader(prepared, splits[part], record["config"]["batch_size"]))
        for part in ("validation", "test")
        if len(splits[part])
    }
    for part, evaluation in evaluations.items():
        scores, report = evaluation.scores(), evaluation.report()
        key = "val" if part == "validation" else part
        final[f"final_{key}_accuracy"] = scores["accuracy"]
        for name in ("precision", "recall", "f1"):
            final[f"final_{key}_{name}_weighted"] = scores[name]
        final[f"final_{key}_f1_macro"] = scores["f1_macro"]
        final[f"final_{key}_within_one_subclass"] = scores["within_one_subclass"]
        intervals = evaluation.intervals()
        final[f"final_{key}_intervals_95"] = intervals
        final[f"final_{key}_scored_on"] = f"{stars[part]}, {PARTS[part]}"
        record["classification_report" if part == "validation" else "test_classification_report"] = report
        print(f"\nbest checkpoint (epoch {final['best_epoch']}) on the {stars[part]}, {PARTS[part]}:\n\n{report}")
        print_scores(scores, intervals)

    # The record first: it must not be lost if a plot cannot be drawn.
    files = [output_dir / "training_history.json", output_dir / "plots" / f"training_plot_{training_id}.png"]
    history.append_to_history(files[0], record)
    history.plot_training(files[1], record)
    for part, evaluation in evaluations.items():
        suffix = "" if part == "validation" else f"_{part}"
        files.append(output_dir / "plots" / f"confusion_matrix_{training_id}{suffix}.png")
        history.plot_confusion_matrix(files[-1], evaluation.targets, evaluation.predictions, stars[part])
    return files


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.evaluate:
        evaluate_checkpoint(args)
        return
    if args.demo and args.data_dir.exists():
        print(f"{args.data_dir} is there already: its stars are used as they are; delete it for new ones")
    elif args.demo:
        simulate(args.data_dir, per_class=DEMO_STARS_PER_CLASS, seed=args.random_seed)
    try:
        train(args, *read_stars(args.data_dir, args.modality, args.num_workers))
    except torch.OutOfMemoryError as error:
        raise DataError("the GPU's memory is full; try a smaller --batch-size") from error


if __name__ == "__main__":
    data.run_as_script(main)
