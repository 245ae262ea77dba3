"""The benchmarks, as a user starts them, on few stars and small budgets."""

import json

import accuracy
import numpy as np
import pytest
import torch
from common import run_script

import data
import train
from model import CHECKPOINT_FORMAT, MAX_DEVIATION, FusionModel, SpectrumNormalisation, flatten_spectra
from simulate_sdss_data import simulate


@pytest.fixture(scope="module")
def stars_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stars") / "data"
    simulate(directory, per_class=14, seed=3, min_snr=5)
    return directory


def test_accuracy_scores_networks_and_classical_methods_on_the_same_stars(stars_dir, tmp_path):
    methods = [
        "LDA on 32 band means",
        "LDA on 32 band means and image colours",
        "χ² fit to class means",
        "χ² fit to weighted class means, continuum removed, smoothed",
        "eigenspectra + LDA",
        "eigenspectra + SVM",
        "random forest on image colours",
    ]
    networks = ["images only", "without averaged weights", "with a pooler"]
    options = ["--data-dir", stars_dir, "--test-split", "0.25", "--seeds", "1", "--epochs", "1"]
    options += ["--modality", "spectrum", "--image-backbone", "resnet18", "--output-dir", tmp_path]
    done = run_script("benchmarks/accuracy.py", *options, "--methods", *methods, *networks)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    scores = {run["method"]: run["test"]["accuracy"] for run in results["runs"]}
    assert list(scores) == methods + networks
    assert min(scores[name] for name in methods[:6]) > 0.5
    numbers = {"train": 38, "validation": 14, "test": 18}
    assert results["parts"] == {part: f"{number} SIMULATED stars" for part, number in numbers.items()}
    table = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    assert all(f"| {method} |" in table for method in scores) and "SIMULATED" in table
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    assert [run["device"] for run in results["runs"]] == ["cpu"] * len(methods) + [device] * len(networks)
    assert sum(row.endswith("| cpu |") for row in table.splitlines()) >= len(methods)

    again = run_script("benchmarks/accuracy.py", *options, "--methods", *methods[:1], "--seeds", "1", "2")
    assert again.returncode == 0, again.stderr
    runs = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))["runs"]
    assert runs[:-1] == results["runs"] and (runs[-1]["method"], runs[-1]["seed"]) == (methods[0], 2)

    other = run_script("benchmarks/accuracy.py", *options[:-2], "--epochs", "2", "--output-dir", tmp_path)
    assert other.returncode == 1 and "of another experiment" in other.stderr.splitlines()[-1]
    assert results["settings"]["network"] == CHECKPOINT_FORMAT
    with pytest.raises(data.DataError, match="of another experiment"):
        accuracy.open_results(tmp_path / "accuracy.json", results["settings"] | {"network": "that of another version"})


def test_data_speed_has_each_figure_beside_its_yardstick(tmp_path):
    options = ["--stars", "200", "--cached", "100", "--many", "200", "--steps", "2", "--image-backbone", "resnet18"]
    done = run_script("benchmarks/data_speed.py", *options, "--work-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(table) == 8
    ratios = [float(row[3].strip("×| ")) for row in table if "×" in row[3]]
    assert len(ratios) == 4 and min(ratios) > 1
    assert not list(tmp_path.iterdir())


def test_download_speed_keeps_to_its_connections(tmp_path):
    options = ["--stars", "12", "--yardstick-stars", "2", "--latency", "0.02", "--workers", "3", "--image-rate", "50"]
    done = run_script("benchmarks/download_speed.py", *options)
    assert done.returncode == 0, done.stderr
    table = {row[1]: row[2:] for row in (line.split("|") for line in done.stdout.splitlines()) if len(row) > 2}
    assert table[" requests "][0].strip() == "24" and int(table[" most connections open "][0]) <= 3
    assert float(table[" cutouts asked for, a second "][0]) <= 55


def test_accuracy_asks_which_stars_to_score_on(stars_dir):
    done = run_script("benchmarks/accuracy.py", "--data-dir", stars_dir)
    assert done.returncode == 2 and "--test-dir DIR or --test-split FRACTION" in done.stderr


def with_ablation(name: str, steps: int = 3) -> tuple[FusionModel, FusionModel, torch.optim.Optimizer]:
    """A small network after a few steps of training with that part left out, its running mean, and the optimiser."""
    with accuracy.ABLATIONS[name]:
        network = train.FusionModel(modality="spectrum", hidden_size=64, num_layers=1)
        optimizer, scheduler = train.make_optimizer(network, 1e-3, epochs=1, steps_per_epoch=steps)
        averaged, update_average = train.running_mean(network, steps)
        for _ in range(steps):
            _, logits = network(torch.randn(4, data.SPECTRUM_LENGTH), None)
            logits.square().sum().backward()
            optimizer.step()
            scheduler.step()
            update_average()
    return network, averaged, optimizer


def test_ablations_leave_out_what_they_name():
    network, averaged, optimizer = with_ablation("without position embeddings")
    assert not network.position_embedding.any() and not averaged.position_embedding.any()
    assert network.cls_token.any() and optimizer.param_groups[0]["lr"] < 1e-3
    network, averaged, optimizer = with_ablation("Adam at a constant 1e-4")
    assert type(optimizer) is torch.optim.Adam and {group["lr"] for group in optimizer.param_groups} == {1e-4}
    assert network.position_embedding.any()
    network, averaged, optimizer = with_ablation("with a pooler")
    pooler, cls_output = network.classifier.pooler, torch.randn(2, 64)
    assert pooler.weight.grad.any() and pooler.weight in optimizer.state
    expected = torch.tanh(cls_output @ pooler.weight.T + pooler.bias) @ network.classifier.weight.T
    torch.testing.assert_close(network.classifier(cls_output), expected + network.classifier.bias)
    normalisation, spectra = SpectrumNormalisation(), 1 + torch.rand(2, data.SPECTRUM_LENGTH)
    normalisation.fit(1 + torch.rand(30, data.SPECTRUM_LENGTH))
    seen, coefficients = normalisation(spectra)
    with accuracy.ABLATIONS["without eigenspectra"]:
        whole, none = normalisation(spectra)
    expected = (flatten_spectra(spectra, normalisation.continuum_basis) - normalisation.mean) / normalisation.std
    torch.testing.assert_close(whole, expected.clamp(-MAX_DEVIATION, MAX_DEVIATION))
    assert not torch.allclose(seen, whole, atol=1.0)
    assert coefficients.all() and none.shape == coefficients.shape and not none.any()
    network, averaged, _ = with_ablation("without coefficients in [CLS]")
    assert not network.coefficient_encoder.weight.any() and not averaged.coefficient_encoder.weight.any()


def test_accuracy_refuses_to_leave_out_what_is_not_there(stars_dir):
    options = ["--data-dir", stars_dir, "--test-split", "0.2", "--modality", "spectrum"]
    done = run_script("benchmarks/accuracy.py", *options, "--methods", "without turned images")
    assert done.returncode == 2 and "without turned images: nothing to leave out" in done.stderr


def test_noisier_spectra_count_for_less_in_weighted_class_means():
    rng = np.random.default_rng(0)
    y, noise = np.repeat([0, 1], 40), np.tile([0.01, 1.0], 40)
    X = (1.0 + y)[:, None] + noise[:, None] * rng.standard_normal((80, 500))
    errors = [
        np.abs(accuracy.TemplateFit().fit(X, y, weights).templates_ - [[1.0], [2.0]]).mean()
        for weights in (noise**-2.0, None)
    ]
    assert errors[0] < 0.05 * errors[1]
