"""The network and its loss against the paper's code as described, and against formulas written out here."""

import hashlib
import http.server
import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from common import checkpoint_contents
from torch import nn

from augmentation import inverse_variances
from data import DataError
from loss_sic import contrastive_loss, loss_sic
from model import (
    NUM_EIGENSPECTRA,
    SMOOTHING_SIGMA,
    FusionModel,
    ImageEncoder,
    SpecEncoder,
    SpectrumNormalisation,
    contrastive_logits,
    load_checkpoint,
    make_continuum_basis,
    project,
    remove_continuum,
    save_checkpoint,
    smooth,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def small_model(**arguments) -> FusionModel:
    return FusionModel(image_backbone="resnet18", num_layers=2, **arguments)


def inputs(batch: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    specs = torch.rand(batch, 3522, generator=generator)
    imgs = torch.randint(256, (batch, 3, 128, 128), dtype=torch.uint8, generator=generator)
    return specs.to(device), imgs.to(device), (torch.arange(batch) % 5).to(device)


def test_full_size_network_has_the_papers_layers_and_takes_a_training_step():
    model = FusionModel()
    # 60,192,808 parameters of torchvision's resnet152, less its classifier's 2048 × 1000 + 1000.
    assert sum(p.numel() for p in model.image_encoder.model.parameters()) == 60_192_808 - 2_049_000
    assert model.image_encoder.fc.weight.shape == (512, 2048)
    assert model.position_embedding.shape == (1, 1 + 32 + 4, 512)
    assert len(model.transformer.layers) == 8
    specs, imgs, targets = inputs(2)
    align_logits, fuse_logits = model(specs, imgs)
    assert align_logits.shape == (2, 2) and fuse_logits.shape == (2, 5)
    loss_sic(align_logits, fuse_logits, targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_authors_encoder_weights_load():
    """Their names and shapes: torchvision's ResNet without its last two children as `model`; conv1…5; fc."""
    model = FusionModel(num_layers=1)
    body = nn.Sequential(*list(torchvision.models.resnet152().children())[:-2])
    image_weights = {f"model.{name}": value for name, value in body.state_dict().items()}
    image_weights |= {"fc.weight": torch.rand(512, 2048), "fc.bias": torch.rand(512)}
    channels = (1, 32, 64, 128, 256, 512)
    spectrum_weights = {"fc.weight": torch.rand(512, 512), "fc.bias": torch.rand(512)}
    for number, (inward, outward) in enumerate(itertools.pairwise(channels), start=1):
        spectrum_weights |= {
            f"conv{number}.weight": torch.rand(outward, inward, 4),
            f"conv{number}.bias": torch.rand(outward),
        }
    model.image_encoder.load_state_dict(image_weights)
    model.spec_encoder.load_state_dict(spectrum_weights)
    names = model.state_dict()
    assert torch.equal(names["spec_encoder.conv3.weight"], spectrum_weights["conv3.weight"])
    assert torch.equal(names["image_encoder.model.7.2.conv3.weight"], image_weights["model.7.2.conv3.weight"])


def test_spectrum_encoder_is_five_convolutions_and_two_poolings():
    encoder = SpecEncoder().eval()
    specs, _, _ = inputs(3)
    x = specs[:, None]
    for number in range(1, 6):
        convolution = getattr(encoder, f"conv{number}")
        windows = x.unfold(2, 4, 1)  # (B, channels, positions, 4)
        x = torch.einsum("bcpk,ock->bop", windows, convolution.weight) + convolution.bias[:, None]
        if number in (2, 4):
            x = x[..., : x.shape[-1] // 4 * 4].unflatten(2, (-1, 4)).amax(dim=3)
    assert x.shape == (3, 512, 215)
    features, tokens = encoder(specs)
    assert torch.allclose(features, x.mean(2) @ encoder.fc.weight.T + encoder.fc.bias, atol=1e-5)
    # Adaptive pooling of 215 positions to 32: token i averages positions floor(215 i / 32) … ceil(215 (i+1) / 32).
    edges = [(215 * i // 32, -(-215 * (i + 1) // 32)) for i in range(32)]
    expected = torch.stack([x[..., low:high].mean(2) for low, high in edges], dim=1)
    assert tokens.shape == (3, 32, 512)
    assert torch.allclose(tokens, expected, atol=1e-5)


def test_image_encoder_pools_a_resnet_to_four_tokens():
    encoder = ImageEncoder(backbone="resnet18").eval()
    resnet = torchvision.models.resnet18().eval()
    body = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    encoder.model.load_state_dict(dict(zip(encoder.model.state_dict(), body.values(), strict=True)))
    imgs = inputs(2)[1]
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(encoder.normalise(imgs)))))
    x = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))  # (2, 512, 4, 4)
    rows = x.mean(dim=3).transpose(1, 2)  # each of the four rows of the map, averaged
    features, tokens = encoder(imgs)
    assert torch.allclose(tokens, F.linear(rows, encoder.fc.weight, encoder.fc.bias), atol=1e-4)
    assert torch.allclose(features, F.linear(x.mean(dim=(2, 3)), encoder.fc.weight, encoder.fc.bias), atol=1e-4)


def test_transformer_is_pre_norm_with_gelu_and_layers_that_start_apart():
    model = small_model().eval()
    first, second = model.transformer.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert first.linear1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    queries, keys, values = first.self_attn.in_proj_weight.chunk(3)
    assert [part.std().item() for part in (queries, keys, values)] == pytest.approx([0.05, 0.05, 0.02], rel=0.02)
    assert model.coefficient_encoder.weight.std().item() == pytest.approx(0.1, rel=0.05)
    x = torch.randn(2, 37, 512)
    y = first.norm1(x)
    x_attended = x + first.self_attn(y, y, y, need_weights=False)[0]
    expected = x_attended + first.linear2(F.gelu(first.linear1(first.norm2(x_attended))))
    assert torch.allclose(first(x), expected, atol=1e-5)


def test_classes_come_from_the_cls_output_of_both_inputs():
    model = small_model().eval()
    specs, imgs, _ = inputs(2)
    _, logits = model(specs, imgs)
    spectra, coefficients = model.spectrum_normalisation(specs)
    spectrum_type, image_type = model.token_type_embedding.weight
    tokens = torch.cat(
        [
            model.cls_token + spectrum_type + model.coefficient_encoder(coefficients)[:, None],
            model.spec_encoder(spectra)[1] + spectrum_type,
            model.image_encoder(imgs)[1] + image_type,
        ],
        dim=1,
    )
    expected = model.classifier(model.transformer(tokens + model.position_embedding)[:, 0])
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, model(specs.flip(0), imgs)[1], atol=1e-4)
    assert not torch.allclose(logits, model(specs, imgs.flip(0))[1], atol=1e-4)


def test_align_logits_are_cosines_of_image_and_spectrum_over_the_temperature():
    images, spectra = torch.randn(3, 512), torch.randn(3, 512)
    logits = contrastive_logits(images, spectra)
    for i in range(3):
        for j in range(3):
            cosine = images[i].dot(spectra[j]) / (images[i].norm() * spectra[j].norm())
            assert logits[i, j].item() == pytest.approx(cosine.item() / 0.07, abs=1e-4)


def test_loss_is_the_papers_formula():
    torch.manual_seed(0)
    align, fuse, targets = torch.randn(4, 4), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    by_image = -torch.stack([align[i, i] - align[i].exp().sum().log() for i in range(4)]).mean()
    by_spectrum = -torch.stack([align[i, i] - align[:, i].exp().sum().log() for i in range(4)]).mean()
    classes = -torch.stack([fuse[i, t] - fuse[i].exp().sum().log() for i, t in enumerate(targets)]).mean()
    assert contrastive_loss(align).item() == pytest.approx(((by_image + by_spectrum) / 2).item(), abs=1e-6)
    expected = (by_image + by_spectrum) / 2 + classes
    assert loss_sic(align, fuse, targets).item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss_sic(align, fuse, targets, sic_weight=0.0).item() == pytest.approx(classes.item(), abs=1e-6)
    assert loss_sic(None, fuse, targets).item() == pytest.approx(classes.item(), abs=1e-6)
    shares = F.one_hot(targets, 5).float()
    for same_class_negatives in (True, False):
        both = (loss_sic(align, fuse, t, same_class_negatives=same_class_negatives) for t in (targets, shares))
        assert next(both).item() == pytest.approx(next(both).item(), abs=1e-6)
    blended = 0.7 * classes + 0.3 * loss_sic(None, fuse, targets.roll(1))
    assert loss_sic(None, fuse, 0.7 * shares + 0.3 * shares.roll(1, 0)).item() == pytest.approx(
        blended.item(), abs=1e-6
    )


def test_stars_of_ones_own_class_need_not_be_negatives():
    align = torch.randn(4, 4)
    classes = torch.tensor([0, 1, 0, 2])
    expected = 0.0
    for logits in (align, align.T):
        for i in range(4):
            others = [j for j in range(4) if j == i or classes[j] != classes[i]]
            expected += (logits[i, others].logsumexp(0) - logits[i, i]).item() / 8
    assert contrastive_loss(align, classes).item() == pytest.approx(expected, abs=1e-6)
    assert contrastive_loss(align, torch.arange(4)).item() == pytest.approx(contrastive_loss(align).item(), abs=1e-6)
    assert contrastive_loss(align, torch.zeros(4)).item() == 0.0  # nobody else: nothing to tell apart


def test_images_are_normalised_as_imagenet():
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    images[0, 1] = 255
    normalised = ImageEncoder(backbone="resnet18").normalise(images)
    assert normalised[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)
    assert normalised[0, 1, 0, 0].item() == pytest.approx((1 - 0.456) / 0.224)


def stars_of_bands(number: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectra (number, 3522) of three bands of random depths, with a mean and a slope, and the same without noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels, centres = torch.arange(3522), torch.tensor([700.0, 1800.0, 2900.0])
    bands = torch.exp(-0.5 * ((pixels - centres[:, None]) / 60) ** 2)
    depths = 0.3 + 0.1 * torch.randn(number, 3, generator=generator)
    clean = 1 + pixels / 3522 - depths @ bands
    return clean + noise * torch.randn(number, 3522, generator=generator), clean


def test_spectra_are_measured_against_the_mean_spectrum():
    normalisation = SpectrumNormalisation()
    spectra, _ = stars_of_bands(200, noise=0.1, seed=0)
    normalisation.fit(spectra)
    flat = smooth(remove_continuum(spectra, make_continuum_basis()))
    weights = inverse_variances(spectra)
    weights /= weights.sum()
    assert torch.allclose(normalisation.mean, (weights * flat).sum(dim=0), atol=1e-5)
    assert torch.allclose(normalisation.std, flat.std(dim=0).mean(), rtol=0.01)
    normalised, coefficients = normalisation(spectra)
    assert (weights * normalised).sum(dim=0).abs().max() < 0.02  # not 0, as deviations are cut off
    basis = normalisation.eigenspectra
    deviations = ((flat - normalisation.mean) / normalisation.std).clamp(-5, 5)
    assert deviations.abs().max() == 5 and torch.allclose(normalised, project(deviations, basis), atol=1e-4)
    assert torch.allclose(basis.T @ basis, torch.eye(NUM_EIGENSPECTRA), atol=1e-4)
    assert torch.allclose(normalised @ basis @ basis.T, normalised, atol=1e-4)
    assert torch.allclose(coefficients * math.sqrt(3522 / NUM_EIGENSPECTRA) @ basis.T, normalised, atol=1e-4)
    assert coefficients.square().mean().item() == pytest.approx(normalised.square().mean().item(), rel=1e-4)
    wild = F.one_hot(torch.tensor(1000), 3522)
    # to where data.py clips, and beyond: one wild pixel does not outshine the others
    near, beyond = ((normalisation(spectra + h * wild)[0] - normalised).abs() for h in (5, 100))
    assert near.max() < 0.3 and near.mean() < 0.05 and beyond.max() < 2.5
    assert set(normalisation.state_dict()) == {"mean", "std", "eigenspectra"}  # they travel with the weights


@pytest.mark.parametrize("degree, least, most", [(3, 0, 0.02), (-1, 0.5, math.inf)])
def test_the_continuum_is_seen_or_not(degree, least, most):
    normalisation = SpectrumNormalisation(degree)
    spectra, _ = stars_of_bands(200, noise=0.0, seed=0)
    slopes = torch.linspace(-1, 1, 200)[:, None] * make_continuum_basis()[:, 1]
    normalisation.fit(spectra + 10 * slopes)
    changes = normalisation(spectra + 10 * slopes)[0] - normalisation(spectra)[0]
    assert least <= changes.std() < most


def test_eigenspectra_keep_what_tells_stars_apart_and_little_noise():
    """Also where most training stars are noisy: those of little noise decide."""
    normalisation = SpectrumNormalisation()
    training = torch.cat([stars_of_bands(60, noise=0.02, seed=1)[0], stars_of_bands(140, noise=1.0, seed=2)[0]])
    normalisation.fit(training)
    spectra, clean = stars_of_bands(100, noise=0.3, seed=3)
    expected = (smooth(remove_continuum(clean, make_continuum_basis())) - normalisation.mean) / normalisation.std
    kept, found = normalisation(clean)[0], normalisation(spectra)[0]
    smoothed = (smooth(remove_continuum(spectra, make_continuum_basis())) - normalisation.mean) / normalisation.std
    assert (kept - expected).std() < 0.3 * expected.std()
    assert (found - expected).std() < 0.3 * (smoothed - expected).std()


def test_no_star_alone_decides_what_spectra_are_measured_against():
    """In the half of a spectrum that is filled with a straight line, no noise is found."""
    normalisation = SpectrumNormalisation()
    spectra, clean = stars_of_bands(200, noise=0.5, seed=4)
    normalisation.fit(spectra)
    before, std = normalisation.mean.clone(), normalisation.std.clone()
    spectra[0, :1750] = torch.linspace(clean[0, 0], clean[0, 1750], 1750)
    normalisation.fit(spectra)
    assert (normalisation.mean - before).abs().max() < 0.6 * std


def test_few_stars_have_few_eigenspectra_and_equal_ones_none():
    normalisation = SpectrumNormalisation()
    spectra, _ = stars_of_bands(7, noise=0.0, seed=0)
    normalisation.fit(spectra)
    assert normalisation.eigenspectra[:, :3].any(dim=0).all() and not normalisation.eigenspectra[:, 6:].any()
    assert normalisation(spectra)[0].std() == pytest.approx(1, abs=0.5)
    for same in (spectra[:1], spectra[:1].repeat(7, 1)):
        with pytest.raises(DataError, match="all have the same spectrum"):
            normalisation.fit(same)


def test_reddening_and_calibration_are_taken_out_of_spectra():
    """Whatever cubic in log wavelength lies on a spectrum, the network gets the same."""
    normalisation, x = SpectrumNormalisation(), torch.linspace(-1, 1, 3522)
    spectra, _ = stars_of_bands(50, noise=0.1, seed=0)
    normalisation.fit(spectra)
    tilted = spectra + 0.5 - x + 0.7 * x**2 + 0.3 * x**3
    expected, _ = normalisation(spectra)
    assert torch.allclose(normalisation(tilted)[0], expected, atol=1e-4)
    assert not torch.allclose(normalisation(spectra + (3 * x).sin())[0], expected, atol=0.1)


def test_smoothing_takes_noise_from_pixels_and_leaves_bands():
    generator = torch.Generator().manual_seed(0)
    noise = smooth(torch.randn(20, 3522, generator=generator))
    assert noise.std().item() == pytest.approx((2 * math.sqrt(math.pi) * SMOOTHING_SIGMA) ** -0.5, rel=0.02)
    pixels = torch.arange(3522)
    band, steps = torch.exp(-0.5 * ((pixels - 1500) / 30) ** 2), (pixels > 1500).float()
    assert torch.allclose(smooth(band[None])[0], band, atol=0.01)
    two = smooth(torch.stack([steps, band]))  # no star gets anything of another
    assert torch.allclose(two[1], smooth(band[None])[0]) and two[0].diff().min() >= -1e-6
    assert two[0, [0, -1]].tolist() == pytest.approx([0, 1], abs=1e-6)  # its ends are level


def test_an_image_hidden_is_an_image_left_out():
    """Training hides the images of some stars from the Transformer, not from the contrast."""
    model = small_model().eval()
    specs, imgs, _ = inputs(4)
    with torch.inference_mode():
        align_logits, seen = model(specs, imgs)
        still_align_logits, some = model(specs, imgs, torch.tensor([True, False, True, False]))
        none, absent = model(specs, None)
    assert none is None and torch.equal(align_logits, still_align_logits)
    assert torch.allclose(some[0::2], seen[0::2], atol=1e-5) and torch.allclose(some[1::2], absent[1::2], atol=1e-5)
    assert not torch.allclose(seen, absent, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_size_on_any_device(batch, device):
    model = small_model().to(device)
    model.spectrum_normalisation.fit(inputs(8)[0])
    specs, imgs, targets = inputs(batch, device)
    align_logits, fuse_logits = model(specs, imgs)
    assert align_logits.shape == (batch, batch) and fuse_logits.shape == (batch, 5)
    loss = loss_sic(align_logits, fuse_logits, targets)
    loss.backward()
    assert loss.isfinite()


def test_a_star_alone_gets_the_logits_that_it_gets_in_a_batch():
    model = small_model().eval()
    specs, imgs, _ = inputs(3)
    with torch.inference_mode():
        together, alone = model(specs, imgs)[1], model(specs[1:2], imgs[1:2])[1]
    assert torch.allclose(together[1:2], alone, atol=1e-4)


@pytest.mark.parametrize("modality, built, absent", [("spectrum", "spec", "image"), ("image", "image", "spec")])
def test_one_modality_builds_and_reads_only_its_encoder(modality, built, absent):
    model = small_model(modality=modality)
    assert getattr(model, f"{built}_encoder") is not None and getattr(model, f"{absent}_encoder") is None
    specs, imgs, _ = inputs(2)
    align_logits, fuse_logits = model(specs if modality == "spectrum" else None, imgs if modality == "image" else None)
    assert align_logits is None and fuse_logits.shape == (2, 5)


def test_unknown_modality_and_backbone_are_refused():
    with pytest.raises(ValueError, match="modality is 'both'"):
        FusionModel(modality="both")
    with pytest.raises(ValueError, match="image_backbone is 'vgg'"):
        FusionModel(image_backbone="vgg")


def test_image_weights_from_a_file(tmp_path):
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    model = small_model(image_weights=tmp_path / "resnet18.pth")
    assert torch.equal(model.image_encoder.model[0].weight, resnet.conv1.weight)
    (tmp_path / "garbage.pth").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("absent", "no such file"),
        ("garbage", "not a file of PyTorch weights"),
        ("list", "not the weights"),
    ):
        with pytest.raises(OSError, match=message):
            small_model(image_weights=tmp_path / f"{name}.pth")
    with pytest.raises(OSError, match="not the weights of torchvision's resnet34"):
        FusionModel(image_backbone="resnet34", image_weights=tmp_path / "resnet18.pth")


@pytest.fixture
def weights_server(tmp_path, monkeypatch):
    """Stands in for torchvision's server of ImageNet weights: the file's name carries its checksum, as theirs do."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights")
    checksum = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "weights").rename(tmp_path / f"resnet18-{checksum}.pth")

    def handler(*args):
        return http.server.SimpleHTTPRequestHandler(*args, directory=tmp_path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(weights, "url", f"http://127.0.0.1:{server.server_port}/{file.name}")
    yield file
    server.shutdown()
    server.server_close()


def test_imagenet_weights_are_fetched_and_checked(weights_server):
    model = small_model(image_weights="imagenet")
    assert torch.equal(model.image_encoder.model[0].weight, torch.load(weights_server)["conv1.weight"])


@pytest.mark.parametrize("fault", ["absent", "damaged"])
def test_imagenet_weights_that_cannot_be_had_name_the_remedy(weights_server, fault):
    if fault == "absent":
        weights_server.unlink()
    else:
        weights_server.write_bytes(weights_server.read_bytes()[:-100])
    with pytest.raises(OSError, match="--image-weights PATH.*--image-weights none"):
        small_model(image_weights="imagenet")


def test_checkpoint_holds_all_that_rebuilds_the_network(tmp_path):
    model = small_model(modality="spectrum", num_heads=4).eval()
    save_checkpoint(tmp_path / "a.pth", model, **checkpoint_contents("spectrum"))
    again, checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert not again.training
    specs, _, _ = inputs(2)
    assert checkpoint["epoch"] == 1
    assert torch.equal(again(specs, None)[1], model(specs, None)[1])
    # Plain PyTorch reads it without executing anything.
    assert set(torch.load(tmp_path / "a.pth", weights_only=True)) == {
        "format",
        "model_arguments",
        "model_state",
        *checkpoint_contents("spectrum"),
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda checkpoint: checkpoint["model_arguments"].update(depth=3),
        lambda checkpoint: checkpoint["model_arguments"].update(image_weights="/etc/passwd"),
        lambda checkpoint: checkpoint["model_arguments"].update(num_heads=7),
        lambda checkpoint: checkpoint["model_arguments"].update(hidden_size=256),
        lambda checkpoint: checkpoint["model_state"].popitem(),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, spoil):
    save_checkpoint(tmp_path / "a.pth", small_model(modality="spectrum"), **checkpoint_contents("spectrum"))
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(OSError, match="its weights are not those of its network"):
        load_checkpoint(tmp_path / "a.pth")
