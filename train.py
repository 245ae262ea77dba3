"""Train and evaluate the M-star classifier on paired spectra and images.

    python train.py --demo                                     simulate stars, train on them, in demo/
    python train.py                                            train on ./objects.csv, spectra/, images/
    python train.py --data-dir DIR --modality spectrum         spectra alone
    python train.py --resume auto                              go on after Ctrl-C or a crash
    torchrun --nproc-per-node=4 train.py                       on four GPUs
    python train.py --evaluate checkpoints/best_model_ID.pth   score a checkpoint on its validation stars

Read top to bottom: options, stars, split, training and evaluation, a run. The network is in model.py,
its loss in loss_sic.py, the reading of files in data.py and cache.py, what training changes in its stars in
augmentation.py, a run's record and plots in history.py.
"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import data
import distributed
import history
import outliers
from augmentation import (
    Augmentation,
    blend,
    blend_images,
    draw_augmentation,
    shift_and_add_noise,
    turn_images,
)
from cache import PreparedStars, read_stars
from data import CLASS_NAMES, DataError, Star
from evaluation import Evaluation, print_scores
from history import Paths, Training, load_training, run_paths
from loss_sic import loss_sic
from model import (
    CONTINUUM_DEGREE,
    IMAGE_BACKBONES,
    MAX_CONTINUUM_DEGREE,
    MODALITIES,
    FusionModel,
    load_checkpoint,
    save_checkpoint,
)
from simulate_sdss_data import simulate

WARMUP_EPOCHS = 2
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
AVERAGE_SPAN = 0.2  # of all steps: how far back the running mean of the weights, which is validated and kept, reaches
BATCH_NORM_BATCHES = 4  # of training stars, from which those weights get the statistics of their batch norms
NORMALISATION_STARS = 4096  # are enough to take the mean and the eigenspectra of training spectra from
SIC_NEGATIVES = ("all", "other-classes")
PARTS = {"validation": "which chose the checkpoint, so that their score flatters", "test": "which chose nothing"}

DEMO_DIR = Path("demo")
DEMO_STARS_PER_CLASS = 50
DEMO_DEFAULTS = {"data_dir": DEMO_DIR / "stars", "output_dir": DEMO_DIR, "num_epochs": 8, "image_weights": "none"}

# Options


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
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
    add("--compile", action="store_true", help="compile the training step: a slow start, then quicker steps")
    add(
        "--num-workers",
        type=number(int, 0, 256),
        default=min(8, os.cpu_count() or 1),
        help="processes that read the stars' files",
    )
    add("--image-backbone", choices=IMAGE_BACKBONES, default="resnet152", help="the paper's is resnet152")
    add("--image-weights", metavar="{imagenet,none,PATH}", default="imagenet", help="initial weights of the ResNet")
    add("--modality", choices=MODALITIES, default="fusion", help="what the network reads")
    add("--continuum-degree", type=number(int, -1, MAX_CONTINUUM_DEGREE), default=CONTINUUM_DEGREE, help="of the "
        "polynomial in log wavelength that is taken off each spectrum; -1 takes none off, which did better on "
        "simulated stars of S/N 1 to 5")  # fmt: skip
    add("--sic-weight", type=number(float, 0, 1000), default=1.0, help="weight of the contrastive loss")
    add("--sic-negatives", choices=SIC_NEGATIVES, default="all", help="the stars that the contrastive loss tells a "
        "star from: all others, as in the paper, or those of other classes")  # fmt: skip
    add("--resume", metavar="{auto,FILE}", help="go on with the unfinished run of this checkpoints/"
        f"{history.STATE_FILES.format('ID')}, auto: of the newest in --output-dir, under its own options")  # fmt: skip
    add("--state-interval", type=number(float, 0, 1e6), default=60.0, help="seconds of training, at least, between "
        "the states to resume from, which are written after an epoch")  # fmt: skip
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="score this checkpoint instead of training")
    add("--split", choices=("validation", "test", "all"), default="validation", help="the stars that --evaluate "
        "scores; all: every star of a directory that took no part in training")  # fmt: skip
    add("--demo", action="store_true", help=f"{len(CLASS_NAMES) * DEMO_STARS_PER_CLASS} simulated stars, the full "
        f"network from random weights, {DEMO_DEFAULTS['num_epochs']} epochs; all in {DEMO_DIR}/")  # fmt: skip
    parser.add_quiet()
    args = parser.parse_args(argv)
    if args.demo:  # the demo's defaults; what the command line names goes before them
        parser.set_defaults(**DEMO_DEFAULTS)
        args = parser.parse_args(argv)
    if args.resume and any(getattr(args, name) != parser.get_default(name) for name in vars(args)
                           if name not in ("resume", "output_dir", "quiet")):  # fmt: skip
        parser.error("--resume takes all options from the run that it goes on with (but --output-dir and --quiet)")
    if args.resume not in (None, "auto") and args.output_dir != parser.get_default("output_dir"):
        parser.error("--resume FILE goes on where the file lies; --output-dir goes with --resume auto")
    if args.demo and "WORLD_SIZE" in os.environ:
        parser.error("--demo is for one process")
    if args.validation_split + args.test_split >= 1:
        parser.error("--validation-split and --test-split together leave no star to train on")
    return args


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise DataError(f"{torch.cuda.device_count()} GPU(s) here, one for each process: lower --nproc-per-node")
    torch.cuda.set_device(distributed.local_rank())
    return torch.device("cuda", distributed.local_rank())


def choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without instructions of its own for it, a processor is slower in bf16 than in fp32
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = torch.backends.mkldnn.is_available() and any(
            capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
        )
    return "bf16" if has_bf16 else "fp32"


# Stars: read, checked, counted


class Batch(NamedTuple):
    """Some stars; what the modality does not read is None."""

    spectra: Tensor | None  # (B, 3522) float32
    images: Tensor | None  # (B, 3, 128, 128) uint8
    image_seen: Tensor | None  # (B,) bool: whether the Transformer sees the image; None: of all stars
    targets: Tensor  # (B,) int64, class indices; of augmented stars (B, 5) float32, the shares of the classes

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))


class StarDataset(Dataset):
    """Some of the prepared stars; one indexed read gives a whole Batch."""

    def __init__(self, prepared: PreparedStars, indices: np.ndarray) -> None:
        self.prepared = prepared
        self.indices = torch.as_tensor(indices)
        self.augmentation: Augmentation | None = None  # None: all stars as they are

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Batch:
        batch = self.read(positions)
        if self.augmentation is None:
            return batch
        augmentation = self.augmentation.of(positions)
        partners, shares = self.read(augmentation.partners), augmentation.shares
        spectra, images = batch.spectra, batch.images
        if spectra is not None:
            spectra = shift_and_add_noise(blend(spectra, partners.spectra, shares), augmentation)
        if images is not None:
            images = turn_images(blend_images(images, partners.images, shares), augmentation.symmetries)
        labels = [nn.functional.one_hot(part.targets, len(CLASS_NAMES)) for part in (batch, partners)]
        return Batch(spectra, images, augmentation.image_seen, blend(*labels, shares))

    def read(self, positions: list[int] | Tensor) -> Batch:
        """These stars as they are."""
        chosen, prepared = self.indices[positions], self.prepared
        spectra = None if prepared.spectra is None else prepared.spectra[chosen]
        images = None if prepared.images is None else prepared.images[chosen]
        return Batch(spectra, images, None, prepared.targets[chosen])


def make_loader(prepared: PreparedStars, indices: np.ndarray, batch_size: int) -> DataLoader:
    """Batches of those stars, in order and as they are; of several processes, each has batches of its own."""
    batches = [batch.tolist() for batch in torch.arange(len(indices)).split(batch_size)]
    return _loader(
        StarDataset(prepared, indices), batch_sampler=batches[distributed.rank() :: distributed.world_size()]
    )


class TrainingLoader:
    """Batches of those stars in another order, and with other augmentation, in each epoch; both follow from seed and
    epoch alone. Of several processes, each has its share of every batch; the stars that make the last shares equal
    come twice in the epoch."""

    def __init__(
        self, prepared: PreparedStars, indices: np.ndarray, batch_size: int, *, seed: int, image_dropout: float
    ) -> None:
        self.seed, self.image_dropout = seed, image_dropout
        processes = distributed.world_size()
        self.dataset = StarDataset(prepared, indices)
        self.sampler = DistributedSampler(
            self.dataset, processes, distributed.rank() if processes > 1 else 0, shuffle=True, seed=seed
        )
        self.loader = _loader(self.dataset, batch_size=batch_size // processes, sampler=self.sampler)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, *, augmented: bool = True) -> DataLoader:
        """The batches of one epoch, until the next call; without augmentation, the same stars as they are."""
        self.sampler.set_epoch(number)
        self.dataset.augmentation = None
        if augmented:
            classes = self.dataset.prepared.targets[self.dataset.indices]
            self.dataset.augmentation = draw_augmentation(classes, self.image_dropout, seed=self.seed, epoch=number)
        return self.loader


def _loader(dataset: StarDataset, **options: Any) -> DataLoader:
    # __getitems__ already gives a batch.
    return DataLoader(dataset, collate_fn=lambda batch: batch, pin_memory=torch.cuda.is_available(), **options)


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

    def batches(self, loader: Iterable[Batch], description: str) -> Iterator[Batch]:
        """The loader's batches on the device, under a progress bar."""
        for batch in data.progress(loader, desc=description, unit="batch"):
            yield batch.to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's loss and class logits (B, 5), float32; in training, those of the batch of all processes."""
        with self.autocast():
            align_logits, fuse_logits = self.model(batch.spectra, batch.images, batch.image_seen)
        targets = distributed.gather_stars(batch.targets) if self.model.training else batch.targets
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

    An average over steps of what other weights gave, as in training, is not what these weights give. The batches
    must be of stars as they are: blended images vary less than those that will be classified.
    """
    if engine.model.image_encoder is not None:
        batches = engine.batches(itertools.islice(loader, BATCH_NORM_BATCHES), "batch norms")
        with engine.autocast():
            update_bn((batch.images for batch in batches), engine.model.image_encoder)


def train_one_epoch(
    engine: Engine,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    update_average: Callable[[], None],
    description: str,
) -> float:
    """One pass over the training stars; returns the mean loss, by star."""
    engine.model.train()
    total, stars = torch.zeros((), device=engine.device), 0
    for batch in engine.batches(loader, description):
        loss, _ = engine.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Each group by itself: a ResNet's gradient can be many times as long as all others together, and its ups and
        # downs would decide how much of these is left.
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        update_average()
        total += loss.detach() * len(batch.targets)  # on the device: the loop never waits for it
        stars += len(batch.targets)
    return total.item() / stars


@torch.inference_mode()
def evaluate(engine: Engine, loader: DataLoader, description: str = "evaluating") -> Evaluation:
    """One pass over a loader's stars, those of all processes, without training."""
    engine.model.eval()
    total = torch.zeros((), device=engine.device)
    none = torch.empty(0, dtype=torch.int64, device=engine.device)  # of several processes, one may have no batch
    targets, predictions = [none], [none]
    for batch in engine.batches(loader, description):
        loss, logits = engine.loss(batch)
        total += loss * len(batch.targets)
        targets.append(batch.targets)
        predictions.append(logits.argmax(dim=1))
    own = (total.item(), torch.cat(targets).cpu().numpy(), torch.cat(predictions).cpu().numpy())
    totals, *both = zip(*distributed.gather_objects(own), strict=True)
    return Evaluation(sum(totals) / len(loader.dataset), *map(np.concatenate, both))


def parameter_groups(model: FusionModel) -> list[list[nn.Parameter]]:
    """The image encoder's parameters, and all others; one group where the model has no image encoder."""
    image_encoder = [] if model.image_encoder is None else list(model.image_encoder.parameters())
    of_image_encoder = set(image_encoder)
    others = [parameter for parameter in model.parameters() if parameter not in of_image_encoder]
    return [group for group in (image_encoder, others) if group]


def make_optimizer(
    model: FusionModel, learning_rate: float, epochs: int, steps_per_epoch: int
) -> tuple[Optimizer, LRScheduler]:
    """AdamW, its rate rising over two epochs (at most a third of the run), then falling to zero along a cosine."""
    groups = [{"params": group} for group in parameter_groups(model)]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    total_steps = epochs * steps_per_epoch
    warmup_steps = min(WARMUP_EPOCHS * steps_per_epoch, math.ceil(total_steps / 3))

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return optimizer, LambdaLR(optimizer, rate)


def running_mean(model: FusionModel, steps: int) -> tuple[FusionModel, Callable[[], None]]:
    """A network whose weights are the running mean of the model's, and what takes the next step into it."""
    averaged = copy.deepcopy(model)
    update = get_ema_multi_avg_fn(decay=1 - 1 / max(1, AVERAGE_SPAN * steps))
    return averaged, partial(update, list(averaged.parameters()), list(model.parameters()), None)


def is_best(f1: float, before: list[float], stars: int) -> bool:
    """Whether an epoch's validation F1 is the best so far, as far as that many validation stars can tell.

    What is nearer to the best than two of its standard errors counts as equal, and of equals the latest epoch is kept,
    which has learned for longest. That is the rule of Breiman et al. 1984 (Classification and Regression Trees, 3.4.3),
    with two in place of one: the best of many epochs is a lucky one. With 80 stars it is 0.06; with many, nothing.
    """
    best = max([f1, *before])
    return f1 >= best - 2 * math.sqrt(best * (1 - best) / stars)


def compile_network(network: FusionModel, device: torch.device) -> Callable:
    # Several processes wait for each other within a step, which CUDA graphs would have to hold.
    graphs = device.type == "cuda" and distributed.world_size() == 1
    return torch.compile(network, mode="reduce-overhead" if graphs else None)


def fit(
    engine: Engine,
    prepared: PreparedStars,
    splits: dict[str, np.ndarray],
    training: Training,
    paths: Paths,
    known: dict[str, Any],
) -> None:
    """Train from the epoch that `training` is at; after each one validate the running mean of the weights, print,
    extend the record's epoch_metrics, keep the best checkpoint, and from time to time the state to resume from.

    known: what a checkpoint holds beside network and epoch.
    """
    record, states = training.record, training.states
    config, curves, final = record["config"], record["epoch_metrics"], record["final_metrics"]
    model, epochs = distributed.prepare(engine.model), config["num_epochs"]
    train_loader = TrainingLoader(
        prepared, splits["train"], config["batch_size"], seed=config["random_seed"], image_dropout=model.image_dropout
    )
    val_loader = make_loader(prepared, splits["validation"], config["batch_size"])
    optimizer, scheduler = make_optimizer(model, config["learning_rate"], epochs, len(train_loader))
    averaged, update_average = running_mean(model, steps=epochs * len(train_loader))
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "scheduler": scheduler}
    for name, state in states.items():
        parts[name].load_state_dict(state)
    network = distributed.share_gradients(model)
    if training.options["compile"]:
        network = compile_network(network, engine.device)
    trained, validated = engine._replace(model=network), engine._replace(model=averaged)
    state_saved = time.perf_counter()
    for epoch in range(len(curves["train_loss"]) + 1, epochs + 1):
        started = time.perf_counter()
        now = f"epoch {epoch}/{epochs}"
        loader = train_loader.epoch(epoch)
        train_loss = train_one_epoch(trained, loader, optimizer, scheduler, update_average, now)
        measure_batch_norm(validated, train_loader.epoch(epoch, augmented=False))
        validation = evaluate(validated, val_loader, f"{now}, validating")
        if not math.isfinite(train_loss + validation.loss):
            raise DataError(
                f"the loss is not finite in epoch {epoch}; try a smaller --learning-rate or --precision fp32"
            )
        scores = validation.scores()
        kept = is_best(scores["f1"], curves["val_f1"], len(splits["validation"]))
        if kept and distributed.rank() == 0:  # before the record says so: Ctrl-C may come at any moment
            with data.write_atomically(paths.checkpoint) as temporary:
                save_checkpoint(temporary, averaged, epoch=epoch, **known)
        losses = {"train_loss": train_loss, "val_loss": validation.loss}
        for name, curve in curves.items():
            curve.append(losses[name] if name in losses else scores[name.removeprefix("val_")])
        if kept:
            final["best_epoch"] = epoch
        elapsed = time.perf_counter() - started
        record["total_training_time_seconds"] = round(record["total_training_time_seconds"] + elapsed, 1)
        due = time.perf_counter() - state_saved >= training.options["state_interval"]
        if due and epoch < epochs and distributed.rank() == 0:
            training._replace(states={name: part.state_dict() for name, part in parts.items()}).save(paths.state)
            state_saved = time.perf_counter()
        print(
            f"{epoch:3d}/{epochs}  loss {train_loss:6.3f}  val loss {validation.loss:6.3f}  "
            f"accuracy {scores['accuracy']:.3f}  precision {scores['precision']:.3f}  recall {scores['recall']:.3f}  "
            f"F1 {scores['f1']:.3f}{'*' if kept else ' '}  {elapsed:5.1f} s",
            flush=True,
        )


# A run


def begin_training(
    args: argparse.Namespace,
    training_id: str,
    engine: Engine,
    prepared: PreparedStars,
    splits: dict[str, np.ndarray],
    not_used: dict[str, Any],
) -> Training:
    """A run before its first epoch; its record has every option, and what they came to."""
    image = args.image_backbone if engine.model.image_encoder is not None else None
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in ("evaluate", "split", "resume", "quiet"):  # of other commands, or of no effect on the run
        del options[name]
    held_out = np.concatenate([splits["validation"], splits["test"]])
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
        f"gradients clipped at {MAX_GRADIENT_NORM}, the image encoder's apart, running mean of the weights over "
        f"{AVERAGE_SPAN:.0%} of the steps",
        "processes": distributed.started_processes(),
        "csv_file": str(data.catalog_path(args.data_dir)),
        "image_dir": str(args.data_dir / "images"),
        "spectra_dir": str(args.data_dir / "spectra"),
        "stars": data.describe(prepared.stars),
        "held_out_stars": history.fingerprint([prepared.stars[i] for i in held_out]),
        "simulated_stars": sum(star.simulated for star in prepared.stars),
        "stars_by_class_and_split": {
            part: {name: int((prepared.targets[indices] == k).sum()) for k, name in enumerate(CLASS_NAMES)}
            for part, indices in splits.items()
        },
        **not_used,
        "versions": history.library_versions(),
        "git_commit": history.git_commit(),
    }
    record = {
        "config": config,
        "epoch_metrics": {name: [] for name in history.EPOCH_METRICS},
        "final_metrics": {},
        "total_training_time_seconds": 0.0,
    }
    return Training(options, identify(prepared), record, states={})


def identify(prepared: PreparedStars) -> list[str]:
    """All that the split depends on, which a resumed run must find again."""
    return [repr(star) for star in prepared.stars]


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """--evaluate: score a checkpoint on its validation or test stars, or on a directory new to it."""
    device = choose_device(args.device)
    model, checkpoint = load_checkpoint(args.evaluate, device)
    config = checkpoint["config"]
    parts = {part: [Star(*row) for row in rows] for part, rows in checkpoint["splits"].items()}
    precision = choose_precision(args.precision, device)
    engine = Engine(model, device, precision, config["sic_weight"], config["sic_negatives"])
    prepared, _ = read_stars(args.data_dir, config["modality"], args.num_workers)

    if args.split == "all":
        indices = np.arange(len(prepared.stars))
        if seen := data.count_known(prepared.stars, parts["train"] + parts["validation"]):
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


def train(
    args: argparse.Namespace, prepared: PreparedStars, not_used: dict[str, Any], unfinished: Training | None = None
) -> dict:
    """A whole run on those stars, or the rest of an unfinished one: split, train; then evaluate the best checkpoint,
    record, plot. Returns the record."""
    device = choose_device(args.device)
    torch.manual_seed(args.random_seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # on GPUs, TF32 where bf16 is not used
    splits = split_stars(prepared, args.validation_split, args.test_split, args.random_seed)
    weights = None if args.image_weights == "none" or args.modality == "spectrum" or unfinished else args.image_weights
    model = FusionModel(
        num_classes=len(CLASS_NAMES),
        continuum_degree=args.continuum_degree,
        modality=args.modality,
        image_backbone=args.image_backbone,
        image_weights=weights,
    )
    if model.spec_encoder is not None:
        some = splits["train"][:: math.ceil(len(splits["train"]) / NORMALISATION_STARS)]
        model.spectrum_normalisation.fit(prepared.spectra[some])
    model.to(device, memory_format=torch.channels_last)
    engine = Engine(model, device, choose_precision(args.precision, device), args.sic_weight, args.sic_negatives)
    known = {
        # Whole stars, not rows: --evaluate must know them also in another catalogue, or after a change of this one.
        "splits": {part: [list(prepared.stars[i]) for i in indices] for part, indices in splits.items()},
        "references": outliers.fit_references(make_loader(prepared, splits["train"], args.batch_size)),
    }

    first = distributed.rank() == 0
    resumed_id = unfinished.record["config"]["training_id"] if unfinished else None
    # Of several processes, the first alone writes files, and has an ID to name them by.
    claim = history.claim_training_id(args.output_dir, resumed_id) if first else contextlib.nullcontext("")
    with claim as training_id:
        training = unfinished or begin_training(args, training_id, engine, prepared, splits, not_used)
        record, config = training.record, training.record["config"]
        print(f"\n{config['model_architecture']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
              f"on {config['device']} in {engine.precision}; {config['stars']}: {len(splits['train'])} to train, "
              f"{len(splits['validation'])} to validate, {len(splits['test'])} to test\n")  # fmt: skip
        paths, stopped = run_paths(args.output_dir, training_id), None
        if unfinished and first:
            for path in (paths.checkpoint, paths.state, paths.training_plot, *paths.confusion_matrix.values()):
                data.remove_leftovers(path)
        try:
            with distributed.process_group():
                fit(engine, prepared, splits, training, paths, known | {"config": config})
        except (KeyboardInterrupt, DataError, OSError) as reason:
            stopped = reason
        record["stopped"] = None if stopped is None else str(stopped) or "interrupted"
        # The epochs of a run that was stopped are recorded as well; but without one, there is nothing to record.
        if first and record["epoch_metrics"]["train_loss"]:
            best, checkpoint = load_checkpoint(paths.checkpoint, device)
            record["final_metrics"]["best_epoch"] = checkpoint["epoch"]
            # Stopped again before it was where it had been stopped before, a run keeps its earlier record.
            if checkpoint["epoch"] <= len(record["epoch_metrics"]["train_loss"]):
                conclude(engine._replace(model=best), prepared, splits, record, paths)
        if stopped is not None:
            if paths.state.exists():
                print(f"python train.py --resume {paths.state}    goes on from the last state kept")
            raise stopped
        paths.state.unlink(missing_ok=True)
        return record


def conclude(
    engine: Engine, prepared: PreparedStars, splits: dict[str, np.ndarray], record: dict, paths: Paths
) -> None:
    """Evaluate the best checkpoint, put the run into the history, draw its plots."""
    final = record["final_metrics"]
    stars = {part: f"{len(splits[part])} {part} stars of {record['config']['stars']}" for part in splits}
    evaluations = {
        part: evaluate(engine, make_loader(prepared, splits[part], record["config"]["batch_size"]))
        for part in ("validation", "test")
        if len(splits[part])
    }
    for part, evaluation in evaluations.items():
        key = "val" if part == "validation" else part
        final |= evaluation.final_metrics(key, f"{stars[part]}, {PARTS[part]}")
        report = evaluation.report()
        record["classification_report" if part == "validation" else "test_classification_report"] = report
        print(f"\nbest checkpoint (epoch {final['best_epoch']}) on the {stars[part]}, {PARTS[part]}:\n\n{report}")
        print_scores(evaluation.scores(), final[f"final_{key}_intervals_95"])

    # The record first: it must not be lost if a plot cannot be drawn.
    history.put_into_history(paths.history, record)
    history.plot_training(paths.training_plot, record)
    for part, evaluation in evaluations.items():
        history.plot_confusion_matrix(
            paths.confusion_matrix[part], evaluation.targets, evaluation.predictions, stars[part]
        )  # fmt: skip
    print(f"\ntrained in {record['total_training_time_seconds']:.0f} s. Open these:")
    for file in (
        paths.history,
        paths.training_plot,
        *(paths.confusion_matrix[part] for part in evaluations),
        paths.checkpoint,
    ):
        print(f"  {file}")


def resume(args: argparse.Namespace) -> tuple[argparse.Namespace, Training]:
    """The options of the unfinished run that --resume names, and that run."""
    path = Path(args.resume)
    if args.resume == "auto":
        states = sorted((args.output_dir / "checkpoints").glob(history.STATE_FILES.format("*")))
        if not states:
            raise DataError(f"{args.output_dir / 'checkpoints'}: no unfinished run is kept in it")
        path = states[-1]
    unfinished = load_training(path)
    options = unfinished.options | {
        "data_dir": Path(unfinished.options["data_dir"]),
        "output_dir": path.parent.parent if path.parent.name else Path(".."),  # which may have moved
    }
    print(f"{path}: {len(unfinished.record['epoch_metrics']['train_loss'])} of {options['num_epochs']} epochs are done")
    return argparse.Namespace(**options), unfinished


def main(argv: list[str] | None = None) -> None:
    args, unfinished = parse_arguments(argv), None
    with data.quietly(args.quiet or distributed.rank() > 0):
        if args.evaluate:
            evaluate_checkpoint(args)
            return
        if args.resume:
            args, unfinished = resume(args)
        elif args.demo and args.data_dir.exists():
            print(f"{args.data_dir} is there already: its stars are used as they are; delete it for new ones")
        elif args.demo:
            simulate(args.data_dir, per_class=DEMO_STARS_PER_CLASS, seed=args.random_seed)
        processes = distributed.started_processes()
        if args.batch_size % processes:
            raise DataError(f"batches of {args.batch_size} stars cannot be shared by {processes} processes")
        prepared, not_used = read_stars(args.data_dir, args.modality, args.num_workers)
        if unfinished and identify(prepared) != unfinished.stars:
            raise DataError(
                f"{args.data_dir}: its stars are not just what the {unfinished.record['config']['stars']} were that "
                "the run began with, and it can go on with these alone"
            )
        try:
            train(args, prepared, not_used, unfinished)
        except torch.OutOfMemoryError as error:
            raise DataError("the GPU's memory is full; try a smaller --batch-size") from error


if __name__ == "__main__":
    data.run_as_script(main)
