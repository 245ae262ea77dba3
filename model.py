"""The network of "Deep Multimodal Networks for M-type Star Classification with Paired Spectrum and Photometric
Image" (PASP 2023): a ResNet-152 for the image, a 1D-CNN for the spectrum, and a Transformer that fuses their tokens.

    model = FusionModel()                                    # random weights; nothing is downloaded
    align_logits, fuse_logits = model(specs, imgs)           # (B, B), (B, 5)

    image     (B, 3, 128, 128) → ResNet → (B, 2048, 4, 4) → 4 rows → Linear → image_tokens (B, 4, 512)
                                                            mean   → Linear → image_features (B, 512)
    spectrum  (B, 3522) → 5 × Conv1d, 2 × MaxPool → (B, 512, 215) → 32 means → spectrum_tokens (B, 32, 512)
                                                                    mean → Linear → spectrum_features (B, 512)
    tokens    [CLS], 32 spectrum, 4 image; + token type, + position → TransformerEncoder → [CLS] → Linear → classes

The encoders follow the authors' code (https://github.com/Gajiln/Spectrum-Image-Star-Classification) layer by layer
and name by name, so their encoder weights load. The Transformer has the shape of ViLT (Kim et al. 2021), as theirs.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

TEMPERATURE = 0.07  # of the contrastive logits; the authors' fixed value
INIT_STD = 0.02  # ViLT's initial weights and embeddings


class ImageEncoder(nn.Module):
    """A ResNet without its pooling and classifier, pooled to four tokens.

    forward: imgs (B, 3, H, W), normalised as for ImageNet → image_features (B, hidden_size), image_tokens
    (B, 4, hidden_size).
    """

    def __init__(self, hidden_size: int = 512, *, backbone: str = "resnet152") -> None:
        super().__init__()
        resnet = torchvision.models.get_model(backbone, weights=None)
        self.model = nn.Sequential(*list(resnet.children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d((4, 1))
        self.fc = nn.Linear(resnet.fc.in_features, hidden_size)

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(self.model(imgs))  # (B, 2048, 4, 1)
        image_tokens = self.fc(pooled.flatten(2).transpose(1, 2))  # (B, 2048, 4) → (B, 4, 2048) → (B, 4, 512)
        image_features = self.fc(pooled.mean(dim=(2, 3)))
        return image_features, image_tokens


class SpecEncoder(nn.Module):
    """Five convolutions, with neither activation nor normalisation between them, as in the authors' code.

    forward: specs (B, L) → spectrum_features (B, hidden_size), spectrum_tokens (B, 32, hidden_size).
    """

    def __init__(self, hidden_size: int = 512) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 32, kernel_size=4)
        self.conv2 = nn.Conv1d(32, 64, kernel_size=4)
        self.conv3 = nn.Conv1d(64, 128, kernel_size=4)
        self.conv4 = nn.Conv1d(128, 256, kernel_size=4)
        self.conv5 = nn.Conv1d(256, hidden_size, kernel_size=4)
        self.max_pool = nn.MaxPool1d(4)
        self.token_pool = nn.AdaptiveAvgPool1d(32)
        self.fc = nn.Linear(hidden_size, hidden_size)

    def forward(self, specs: Tensor) -> tuple[Tensor, Tensor]:
        x = specs.unsqueeze(1)  # (B, 3522) → (B, 1, 3522)
        x = self.max_pool(self.conv2(self.conv1(x)))  # (B, 64, 879)
        x = self.max_pool(self.conv4(self.conv3(x)))  # (B, 256, 218)
        x = self.conv5(x)  # (B, 512, 215)
        spectrum_tokens = self.token_pool(x).transpose(1, 2)  # (B, 512, 32) → (B, 32, 512)
        spectrum_features = self.fc(x.mean(dim=2))
        return spectrum_features, spectrum_tokens


class FusionModel(nn.Module):
    """Both encoders, the Transformer that fuses their tokens, and the classifier.

    Args:
        modality: "fusion" reads both inputs; "spectrum" and "image" build one encoder, and the Transformer reads its
            tokens alone.
        image_backbone: a ResNet of torchvision; the paper's is "resnet152", smaller ones serve tests.

    forward: specs (B, 3522), standardised; imgs (B, 3, 128, 128), normalised as for ImageNet; B ≥ 1. An input that
    the modality does not read may be None. With "fusion", imgs may be None, too; its image tokens are zeros then →
        align_logits (B, B): cosine of image i and spectrum j over the temperature; None unless both inputs are read;
        fuse_logits (B, num_classes): the classes, from the Transformer's [CLS] output.
    """

    def __init__(
        self,
        num_classes: int = 5,
        hidden_size: int = 512,
        num_heads: int = 8,
        num_layers: int = 8,
        *,
        modality: str = "fusion",
        image_backbone: str = "resnet152",
    ) -> None:
        super().__init__()
        assert modality in ("fusion", "spectrum", "image"), f"modality is {modality!r}"
        self.spec_encoder = self.image_encoder = None
        num_tokens = 1  # [CLS]
        if modality != "image":
            self.spec_encoder = SpecEncoder(hidden_size)
            num_tokens += 32
        if modality != "spectrum":
            self.image_encoder = ImageEncoder(hidden_size, backbone=image_backbone)
            num_tokens += 4

        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, num_tokens, hidden_size))
        self.token_type_embedding = nn.Embedding(2, hidden_size)  # 0: [CLS] and spectrum, 1: image
        layer = nn.TransformerEncoderLayer(
            hidden_size,
            num_heads,
            dim_feedforward=4 * hidden_size,
            dropout=0.0,
            activation="gelu",
            norm_first=True,
            batch_first=True,
        )
        self.transformer = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(hidden_size), enable_nested_tensor=False
        )
        self.classifier = nn.Linear(hidden_size, num_classes)
        self._initialise_fusion()

    def _initialise_fusion(self) -> None:
        """ViLT's initial weights. Without it, torch's Transformer starts as eight copies of one layer."""
        nn.init.normal_(self.position_embedding, std=INIT_STD)
        nn.init.normal_(self.token_type_embedding.weight, std=INIT_STD)
        for module in (*self.transformer.modules(), self.classifier):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=INIT_STD)

    def forward(self, specs: Tensor | None, imgs: Tensor | None) -> tuple[Tensor | None, Tensor]:
        image_features, spectrum_features, fuse_logits = self.forward_features(specs, imgs)
        return contrastive_logits(image_features, spectrum_features), fuse_logits

    def forward_features(
        self, specs: Tensor | None, imgs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """image_features and spectrum_features (B, hidden_size), None where not read; fuse_logits (B, num_classes)."""
        image_features = spectrum_features = None
        tokens = []
        spectrum_type, image_type = self.token_type_embedding.weight
        if self.spec_encoder is not None:
            spectrum_features, spectrum_tokens = self.spec_encoder(specs)
            tokens.append(spectrum_tokens + spectrum_type)
        if self.image_encoder is not None:
            if imgs is None:
                image_tokens = torch.zeros_like(spectrum_tokens[:, :4])
            else:
                image_features, image_tokens = self.image_encoder(imgs)
            tokens.append(image_tokens + image_type)
        cls_token = (self.cls_token + spectrum_type).expand(len(tokens[0]), -1, -1)
        x = torch.cat([cls_token, *tokens], dim=1) + self.position_embedding  # (B, 1 + 32 + 4, 512)
        return image_features, spectrum_features, self.classifier(self.transformer(x)[:, 0])


def contrastive_logits(image_features: Tensor | None, spectrum_features: Tensor | None) -> Tensor | None:
    """(B, B): cosine similarity of image i and spectrum j, over the temperature; None where one input is not read."""
    if image_features is None or spectrum_features is None:
        return None
    # Without autocast: divided by 0.07, the cosines' three digits in bfloat16 would be too coarse.
    with torch.autocast(image_features.device.type, enabled=False):
        image_features = F.normalize(image_features.float(), dim=1)
        spectrum_features = F.normalize(spectrum_features.float(), dim=1)
        return image_features @ spectrum_features.T / TEMPERATURE
