"""Training on a GPU: the captured step is the plain step; runs resume; figures agree with the CPU's.

python -m pytest -m gpu tests/test_gpu.py          two minutes
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import random_stars, run_script

import dataset
import train
from classifier import Classifier
from cli import DataError
from dataset import StarLoader
from device import choose_precision, out_of_memory_hint
from preparation import SPECTRUM_LENGTH, Batch
from recipe import IMPROVED, PAPER, Recipe
from simulate_sdss_data import simulate
from trainer import CapturedStep, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
STEPS = 20
SMALL = {"image_backbone": "resnet50", "image_weights": "none"}
OPTIONS = ("--image-backbone", "resnet18", "--image-weights", "none", "--layers", 2, "--num-workers", 2)


def random_batches(number: int, stars: int = 32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(number):
        flux = 1 + 0.3 * torch.randn(stars, SPECTRUM_LENGTH, generator=generator)
        spectra = torch.stack([flux, torch.full_like(flux, 100.0)], dim=1)
        images = torch.randint(256, (stars, 3, 128, 128), generator=generator, dtype=torch.uint8)
        targets = torch.randint(5, (stars,), generator=generator)
        batches.append(Batch(spectra.cuda(), images.cuda(), targets.cuda()))
    return batches


def losses_of(recipe: Recipe, precision: str, *, captured: bool) -> torch.Tensor:
    torch.manual_seed(0)
    classifier = Classifier(recipe, precision).cuda().train()
    trainer = Trainer(classifier, epochs=10, steps_per_epoch=10)
    if not captured:
        trainer.captured = None
    torch.manual_seed(5)
    return torch.stack([trainer.step(batch).clone() for batch in random_batches(STEPS)]).cpu()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", [PAPER, IMPROVED], ids=["paper", "improved"])
def test_captured_steps_give_the_losses_of_plain_ones(recipe, precision):
    recipe = replace(recipe, **SMALL, learning_rate=1e-5)  # small, so that rounding does not grow from step to step
    captured, plain = (losses_of(recipe, precision, captured=way) for way in (True, False))
    assert captured.sum(dim=1).std() > 0.01
    assert torch.allclose(captured, plain, rtol=2e-3 if precision == "fp32" else 1e-2), (captured - plain).abs().max()


def test_each_replay_draws_its_own_augmentation():
    """The first pass begins with plain steps, the second has replays alone; with one seed, they draw the same."""
    torch.manual_seed(0)
    recipe = replace(PAPER, **SMALL, rotate_and_flip=1, learning_rate=1e-9)
    trainer = Trainer(Classifier(recipe).cuda().train(), epochs=10, steps_per_epoch=10)
    (batch,) = random_batches(1)
    torch.manual_seed(1)
    first = [trainer.step(batch).sum().item() for _ in range(10)]
    torch.manual_seed(1)
    second = [trainer.step(batch).sum().item() for _ in range(10)]
    assert len(set(first)) == 10 and second == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("modality", ["fusion", "spectrum", "image"])
def test_stars_that_do_not_fit_on_the_gpu_are_streamed_to_it(modality, monkeypatch):
    recipe = replace(IMPROVED, **SMALL, modality=modality, learning_rate=1e-6, batch_size=10)
    prepared, losses = random_stars(12), []
    for network_share in (dataset.NETWORK_SHARE, 2.0):  # of the memory: none is left for stars
        monkeypatch.setattr(dataset, "NETWORK_SHARE", network_share)
        torch.manual_seed(0)
        trainer = Trainer(Classifier(recipe).cuda(), epochs=10, steps_per_epoch=6)
        loader = StarLoader(prepared, np.arange(60), trainer.device)
        assert (loader.resident is None) == (network_share == 2.0)
        losses.append(train.train_one_epoch(trainer, loader, 1, 0, ""))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_full_memory_has_a_remedy():
    def step(batch: Batch) -> torch.Tensor:
        steps.append(batch)
        return torch.empty(1 << 45 if len(steps) > 3 else 2, device="cuda")

    steps, captured, (batch,) = [], CapturedStep(), random_batches(1)
    with pytest.raises(DataError, match="memory is full; buy more"), out_of_memory_hint("buy more"):
        for _ in range(5):
            captured(step, batch)
    assert len(steps) == 4 and torch.ones(4, device="cuda").sum() == 4


def test_state_on_the_gpu_goes_on_where_it_was():
    recipe = replace(IMPROVED, **SMALL, learning_rate=1e-5)
    torch.manual_seed(0)
    classifier = Classifier(recipe, "bf16").cuda().train()
    batches, losses = random_batches(10), []
    trainer = Trainer(copy.deepcopy(classifier), epochs=10, steps_per_epoch=10)
    for batch in batches[:5]:
        trainer.step(batch)
    states = trainer.state_dict()
    for way in ("straight on", "from its state"):
        if way == "from its state":
            trainer = Trainer(copy.deepcopy(classifier), epochs=10, steps_per_epoch=10)
            trainer.load_state_dict(states)
        torch.manual_seed(3)
        losses.append(torch.stack([trainer.step(batch).clone() for batch in batches[5:]]).cpu())
    assert torch.allclose(*losses, rtol=2e-2), losses


@pytest.fixture(scope="module")
def stars_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    simulate(directory, per_class=24, seed=7, min_snr=5)
    return directory


def run_training(stars_dir, output_dir, *options) -> dict:
    done = run_script("train.py", "--data-dir", stars_dir, "--output-dir", output_dir, *OPTIONS, *options)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((output_dir / "training_history.json").read_text())
    return record


def test_a_run_is_scored_on_the_cpu_as_on_the_gpu(stars_dir, tmp_path):
    record = run_training(stars_dir, tmp_path, "--epochs", 3, "--precision", "fp32")
    assert "NVIDIA" in record["config"]["device"]
    (checkpoint,) = (tmp_path / "checkpoints").glob("best_model_*.pth")
    done = run_script("train.py", "--evaluate", checkpoint, "--data-dir", stars_dir, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.rsplit("loss ", 1)[1])
    best = record["final_metrics"]["best_epoch"] - 1
    assert loss == pytest.approx(record["epoch_metrics"]["val_loss"][best], abs=0.02)


def test_auto_is_bf16(stars_dir, tmp_path):
    if choose_precision("auto", torch.device("cuda")) == "fp32":
        pytest.skip("this GPU does not compute in bf16")
    record = run_training(stars_dir, tmp_path, "--epochs", 1, "--modality", "spectrum")
    assert record["config"]["precision"] == "bf16"


def test_speed_measures_every_part():
    options = ["--image-backbone", "resnet18", "--batch-sizes", "8", "--evaluation-sizes", "8", "--rounds", "1"]
    done = run_script("benchmarks/speed.py", *options)
    assert done.returncode == 0, done.stderr
    idle = float(done.stdout.split("batches of 8: ")[1].split("%")[0])
    assert 0 <= idle < 100 and "a whole training" in done.stdout
