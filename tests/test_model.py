"""The network against the authors' code, written here a second time with plain tensor operations."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision

from model import FusionModel, ImageEncoder, SpecEncoder, contrastive_logits


def small_model(**arguments) -> FusionModel:
    return FusionModel(image_backbone="resnet18", num_layers=2, **arguments).eval()


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3522, generator=random), torch.randn(batch, 3, 128, 128, generator=random)


def test_the_full_network_has_the_papers_layers_and_the_authors_names():
    with torch.device("meta"):  # shapes alone
        model, resnet = FusionModel(), torchvision.models.resnet152()
        specs, imgs = torch.empty(2, 3522), torch.empty(2, 3, 128, 128)
        *features, fuse_logits = model.forward_features(specs, imgs)
        tokens = model.image_encoder(imgs)[1], model.spec_encoder(specs)[1]
    assert [part.shape for part in features] == [(2, 512)] * 2 and fuse_logits.shape == (2, 5)
    assert [part.shape for part in tokens] == [(2, 4, 512), (2, 32, 512)]
    assert model.cls_token.shape == (1, 1, 512) and model.position_embedding.shape == (1, 37, 512)
    assert len(model.transformer.layers) == 8 and model.transformer.layers[0].self_attn.num_heads == 8
    assert model.transformer.layers[0].linear1.out_features == 2048

    body = torch.nn.Sequential(*list(resnet.children())[:-2])
    image_shapes = {f"model.{name}": value.shape for name, value in body.state_dict().items()}
    image_shapes |= {"fc.weight": (512, 2048), "fc.bias": (512,)}
    spectrum_shapes = {"fc.weight": (512, 512), "fc.bias": (512,)}
    for number, (inward, outward) in enumerate(itertools.pairwise((1, 32, 64, 128, 256, 512)), start=1):
        spectrum_shapes |= {f"conv{number}.weight": (outward, inward, 4), f"conv{number}.bias": (outward,)}
    for encoder, shapes in ((model.image_encoder, image_shapes), (model.spec_encoder, spectrum_shapes)):
        assert {name: value.shape for name, value in encoder.state_dict().items()} == shapes


def test_the_spectrum_encoder_is_five_convolutions_and_two_poolings():
    encoder, specs = SpecEncoder().eval(), inputs(3)[0]
    x = specs[:, None]
    for number in range(1, 6):
        convolution = getattr(encoder, f"conv{number}")
        windows = x.unfold(2, 4, 1)  # (B, channels, positions, 4)
        x = torch.einsum("bcpk,ock->bop", windows, convolution.weight) + convolution.bias[:, None]
        if number in (2, 4):
            x = x[..., : x.shape[-1] // 4 * 4].unflatten(2, (-1, 4)).amax(dim=3)
    assert x.shape == (3, 512, 215)
    # Adaptive pooling of 215 positions to 32: token i averages positions floor(215 i / 32) … ceil(215 (i+1) / 32).
    edges = [(215 * i // 32, -(-215 * (i + 1) // 32)) for i in range(32)]
    features, tokens = encoder(specs)
    assert torch.allclose(features, F.linear(x.mean(dim=2), encoder.fc.weight, encoder.fc.bias), atol=1e-5)
    assert torch.allclose(tokens, torch.stack([x[..., a:b].mean(dim=2) for a, b in edges], dim=1), atol=1e-5)


def test_the_image_encoder_pools_a_resnet_to_four_tokens():
    encoder, resnet = ImageEncoder(backbone="resnet18").eval(), torchvision.models.resnet18().eval()
    body = [value for name, value in resnet.state_dict().items() if not name.startswith("fc.")]
    encoder.model.load_state_dict(dict(zip(encoder.model.state_dict(), body, strict=True)))
    imgs = inputs(2)[1]
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(imgs))))
    x = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))  # (2, 512, 4, 4)
    rows = x.mean(dim=3).transpose(1, 2)
    features, tokens = encoder(imgs)
    assert torch.allclose(tokens, F.linear(rows, encoder.fc.weight, encoder.fc.bias), atol=1e-5)
    assert torch.allclose(features, F.linear(x.mean(dim=(2, 3)), encoder.fc.weight, encoder.fc.bias), atol=1e-5)


def test_the_transformer_is_pre_norm_with_gelu_and_layers_that_begin_apart():
    model = small_model()
    first, second = model.transformer.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    embeddings = (model.position_embedding, model.token_type_embedding.weight)
    for weights in (first.linear1.weight, first.self_attn.in_proj_weight, model.classifier.weight, *embeddings):
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.cls_token.any()
    x = torch.randn(2, 37, 512)
    y = first.norm1(x)
    attended = x + first.self_attn(y, y, y, need_weights=False)[0]
    expected = attended + first.linear2(F.gelu(first.linear1(first.norm2(attended))))
    assert torch.allclose(first(x), expected, atol=1e-5)
    assert isinstance(model.transformer.norm, torch.nn.LayerNorm)


def test_the_classes_come_from_the_cls_output_of_both_inputs():
    model, (specs, imgs) = small_model(), inputs(2)
    spectrum_type, image_type = model.token_type_embedding.weight
    tokens = [
        (model.cls_token + spectrum_type).expand(2, -1, -1),
        model.spec_encoder(specs)[1] + spectrum_type,
        model.image_encoder(imgs)[1] + image_type,
    ]
    expected = model.classifier(model.transformer(torch.cat(tokens, dim=1) + model.position_embedding)[:, 0])
    align_logits, fuse_logits = model(specs, imgs)
    assert torch.allclose(fuse_logits, expected, atol=1e-5)
    features = model.image_encoder(imgs)[0], model.spec_encoder(specs)[0]
    assert torch.allclose(align_logits, contrastive_logits(*features), atol=1e-4)


def test_align_logits_are_cosines_of_image_and_spectrum_over_the_temperature():
    images, spectra = torch.randn(3, 512), torch.randn(3, 512)
    cosines = torch.stack([F.cosine_similarity(image, spectra) for image in images])
    assert torch.allclose(contrastive_logits(images, spectra), cosines / 0.07, atol=1e-4)


def test_without_images_their_tokens_are_zeros():
    model, (specs, imgs) = small_model(), inputs(2)
    align_logits, alone = model(specs, None)
    assert align_logits is None and not torch.allclose(alone, model(specs, imgs)[1], atol=1e-4)
    torch.nn.init.zeros_(model.image_encoder.fc.weight)
    torch.nn.init.zeros_(model.image_encoder.fc.bias)
    assert torch.allclose(alone, model(specs, imgs)[1], atol=1e-5)


def test_a_star_alone_gets_the_logits_that_it_gets_in_a_batch():
    model, (specs, imgs) = small_model(), inputs(3)
    together, (align_logits, alone) = model(specs, imgs)[1], model(specs[1:2], imgs[1:2])
    assert align_logits.shape == (1, 1) and torch.allclose(together[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("modality, tokens", [("spectrum", 33), ("image", 5)])
def test_one_modality_builds_and_reads_one_encoder(modality, tokens):
    model, (specs, imgs) = small_model(modality=modality), inputs(2)
    assert (model.spec_encoder is None) == (modality == "image")
    assert (model.image_encoder is None) == (modality == "spectrum")
    assert model.position_embedding.shape == (1, tokens, 512)
    align_logits, fuse_logits = model(*((specs, None) if modality == "spectrum" else (None, imgs)))
    assert align_logits is None and fuse_logits.shape == (2, 5)
