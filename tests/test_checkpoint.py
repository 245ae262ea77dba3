"""Files of weights: they are read again as written, and no other file is taken for one."""

import hashlib
import http.server
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from common import checkpoint_contents, random_stars

from checkpoint import load_checkpoint, load_image_weights, save_checkpoint
from classifier import Classifier
from dataset import Batch
from model import ImageEncoder
from recipe import IMPROVED, PAPER

SPECTRUM = replace(PAPER, modality="spectrum", num_layers=1)


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "a.pth"
    save_checkpoint(path, Classifier(SPECTRUM), **checkpoint_contents())
    return path.read_bytes()


@pytest.mark.parametrize("recipe", [PAPER, IMPROVED], ids=["paper", "improved"])
def test_a_checkpoint_gives_the_same_logits_again(tmp_path, recipe):
    prepared, recipe = random_stars(1), replace(recipe, image_backbone="resnet18", num_layers=1)
    classifier = Classifier(recipe, "bf16")
    classifier.standardise.fit(prepared.spectra)
    classifier.calibration_temperature.fill_(2.5)
    save_checkpoint(tmp_path / "a.pth", classifier.eval(), **checkpoint_contents())
    again, contents = load_checkpoint(tmp_path / "a.pth")
    batch = Batch(prepared.spectra, prepared.images, prepared.targets)
    with torch.inference_mode():
        assert all(torch.equal(one, other) for one, other in zip(classifier(batch), again(batch), strict=True))
    logits = torch.randn(3, 5)
    assert torch.equal(again.probabilities(logits), (logits.double() / 2.5).softmax(dim=1))
    assert again.recipe == recipe and again.precision == "bf16" and not again.training
    assert {name: contents[name] for name in checkpoint_contents()} == checkpoint_contents()


class Intruder:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("intruder.txt"), "was here")


def saved(thing: object) -> bytes:
    content = io.BytesIO()
    torch.save(thing, content)
    return content.getvalue()


def spoil(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def spoilt(content: bytes) -> bytes:
        checkpoint = torch.load(io.BytesIO(content), weights_only=True)
        change(checkpoint)
        return saved(checkpoint)

    return spoilt


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: b"", "damaged, or not a file of PyTorch weights"),
        (lambda content: b"not weights", "damaged, or not a file of PyTorch weights"),
        (lambda content: content[:-1], "damaged, or not a file of PyTorch weights"),
        (lambda content: pickle.dumps(Intruder()), "damaged, or not a file of PyTorch weights"),
        (spoil(lambda c: c.update(config=Intruder())), "damaged, or not a file of PyTorch weights"),
        (lambda content: saved({"state_dict": {}}), "no checkpoint of this version"),
        (lambda content: saved(torch.ones(3)), "no checkpoint of this version"),
        (spoil(lambda c: c.update(format="m-star classifier 99")), "no checkpoint of this version"),
        (spoil(lambda c: (c.pop("weights"), c.pop("splits"))), "it lacks splits, weights; another version"),
        (spoil(lambda c: c["config"].update(class_names=["K"])), r"made for other classes, \['K'\]"),
        (spoil(lambda c: c["recipe"].update(depth=3)), "its weights are not those of its network"),
        (spoil(lambda c: c["recipe"].update(num_layers=2)), "its weights are not those of its network"),
        (spoil(lambda c: c["recipe"].update(image_backbone="vgg11", modality="fusion")), "are not those of its net"),
        (spoil(lambda c: c["weights"].popitem()), "its weights are not those of its network"),
    ],
)
def test_another_file_is_refused_and_not_executed(tmp_path, monkeypatch, checkpoint_bytes, change, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.pth"
    path.write_bytes(change(checkpoint_bytes))
    with pytest.raises(OSError, match=f"wrong.pth: .*{message}") as error:
        load_checkpoint(path)
    assert len(str(error.value).splitlines()) == 1 and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="none.pth: no such file"):
        load_checkpoint(tmp_path / "none.pth")


# Initial weights of the ResNet


@pytest.fixture(scope="module")
def resnet() -> torchvision.models.ResNet:
    return torchvision.models.resnet18()


def first_weights(weights: object) -> torch.Tensor:
    encoder = ImageEncoder(backbone="resnet18")
    load_image_weights(encoder, "resnet18", str(weights))
    return encoder.model[0].weight


def test_image_weights_from_a_file(tmp_path, resnet):
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    assert torch.equal(first_weights(tmp_path / "resnet18.pth"), resnet.conv1.weight)
    with pytest.raises(OSError, match="resnet18.pth: not the weights of torchvision's resnet34"):
        load_image_weights(ImageEncoder(backbone="resnet34"), "resnet34", str(tmp_path / "resnet18.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (("none", "no such file"), ("text", "not a file of PyTorch"), ("list", "not the weights")):
        with pytest.raises(OSError, match=rf"{name}\.pth: {message}|{name}\.pth: damaged, or {message}"):
            first_weights(tmp_path / f"{name}.pth")


@pytest.fixture
def weights_server(tmp_path, monkeypatch, resnet):
    """Stands in for torchvision's server of ImageNet weights: the file's name carries its checksum, as theirs do."""
    torch.save(resnet.state_dict(), tmp_path / "weights")
    checksum = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "weights").rename(tmp_path / f"resnet18-{checksum}.pth")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *arguments) -> None:
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{file.name}"
        monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
        yield file
        server.shutdown()


def test_imagenet_weights_are_fetched_once(weights_server, resnet):
    assert torch.equal(first_weights("imagenet"), resnet.conv1.weight)
    weights_server.unlink()
    assert torch.equal(first_weights("imagenet"), resnet.conv1.weight)


@pytest.mark.parametrize("fault", ["absent", "damaged"])
def test_imagenet_weights_that_cannot_be_had_name_the_remedy(weights_server, fault):
    if fault == "absent":
        weights_server.unlink()
    else:
        weights_server.write_bytes(weights_server.read_bytes()[:-100])
    with pytest.raises(OSError, match="--image-weights PATH.*--image-weights none") as error:
        first_weights("imagenet")
    assert len(str(error.value).splitlines()) == 1
