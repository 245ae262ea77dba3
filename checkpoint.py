"""Files of weights: checkpoints of train.py, and a ResNet's initial weights.

    classifier, checkpoint = load_checkpoint(Path("checkpoints/best_model_ID.pth"))

A checkpoint is a plain dictionary: the recipe, the precision, the weights, the run's configuration, its epoch, the
stars of each part of the split, and the references of outliers.py. Reading one executes no code.
"""

import http.client
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from catalog import CLASS_NAMES, Star, count_known
from classifier import Classifier
from model import ImageEncoder
from recipe import Recipe

# Identifies a checkpoint of train.py. The number is raised with any change of the code that the prediction depends on:
# weights must not be used on inputs that they were not trained on.
CHECKPOINT_FORMAT = "m-star classifier 7"
CHECKPOINT_KEYS = {"recipe", "precision", "weights", "config", "splits", "references", "epoch"}
# What torch.load raises on files that are damaged or something else.
UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, pickle.UnpicklingError)


def save_checkpoint(path: Path, classifier: Classifier, **contents: Any) -> None:
    """Write the classifier and `contents` (plain values and tensors): config, splits, references, epoch."""
    own = {"recipe": asdict(classifier.recipe), "precision": classifier.precision, "weights": classifier.state_dict()}
    torch_save({"format": CHECKPOINT_FORMAT, **own, **contents}, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a checkpoint, on the device and ready to evaluate, and everything else in the file.

    Raises OSError for a file that is missing, damaged, another program's, another version's or of other classes.
    """
    checkpoint = torch_load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise OSError(f"{path}: no checkpoint of this version of the program (train.py writes them to checkpoints/)")
    if missing := CHECKPOINT_KEYS - checkpoint.keys():
        raise OSError(f"{path}: it lacks {', '.join(sorted(missing))}; another version of train.py wrote it")
    try:
        class_names = checkpoint["config"]["class_names"]
        if class_names != list(CLASS_NAMES):
            raise OSError(f"{path}: made for other classes, {class_names}")
        classifier = Classifier(Recipe(**checkpoint["recipe"]), checkpoint["precision"])
        classifier.load_state_dict(checkpoint.pop("weights"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise OSError(f"{path}: its weights are not those of its network ({type(error).__name__})") from error
    return classifier.eval().to(device), checkpoint


def describe_training(checkpoint: dict[str, Any]) -> str:
    """The stars that a checkpoint was trained on: "160 of 200 stars"."""
    return f"{len(checkpoint['splits']['train'])} of {checkpoint['config']['stars']}"


def note_known_stars(stars: Sequence[Star], path: Path, checkpoint: dict[str, Any]) -> None:
    """Print how many of the stars the checkpoint's run has used, if any, perhaps in other observations."""
    known = [Star(*row) for part in ("train", "validation") for row in checkpoint["splits"][part]]
    if seen := count_known(stars, known):
        print(f"note: {seen} of these stars were used for training or checkpoint selection of {path}: optimistic")


def load_image_weights(encoder: ImageEncoder, backbone: str, weights: str) -> None:
    """Load a ResNet's initial weights: "imagenet" (downloaded once), or the path of a file in torchvision's format.

    Raises OSError if they cannot be obtained or do not fit.
    """
    state = _fetch_imagenet_weights(backbone) if weights == "imagenet" else torch_load(Path(weights))
    resnet = torchvision.models.get_model(backbone, weights=None)
    try:
        resnet.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise OSError(f"{weights}: not the weights of torchvision's {backbone}") from error
    encoder.model.load_state_dict(nn.Sequential(*list(resnet.children())[:-2]).state_dict())


def _fetch_imagenet_weights(backbone: str) -> dict[str, Tensor]:
    # V1 is what `pretrained=True` gave when the paper was written.
    imagenet = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    try:
        return imagenet.get_state_dict(progress=True, check_hash=True)
    except (OSError, http.client.HTTPException, *UNREADABLE) as error:  # RuntimeError: another hash than its name's
        raise OSError(
            f"the ImageNet weights could not be had from {imagenet.url}, or the file in {torch.hub.get_dir()} is "
            f"damaged ({type(error).__name__}: {error}); download that file elsewhere and give its path "
            "(--image-weights PATH), or train from random weights (--image-weights none)"
        ) from error


def torch_save(contents: dict[str, Any], path: Path) -> None:
    """Raises OSError also where torch reports a full disk as a RuntimeError."""
    try:
        torch.save(contents, path)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written; is the disk full? ({error})") from error


def torch_load(path: Path) -> Any:
    """Tensors and plain values only: nothing in the file is executed. Raises OSError, naming the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of other programs' files; the error says it in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OSError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise OSError(f"{path}: damaged, or not a file of PyTorch weights ({type(error).__name__})") from error
