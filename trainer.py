"""One training step: augmentation, loss, gradients, AdamW; on one GPU captured as a CUDA graph.

A step of this network is thousands of small kernels. Launched one by one from Python, they leave an H200 idle for most
of the time. Captured once, they are launched together: benchmarks/README.md has the figures.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import distributed
from classifier import Classifier
from preparation import Batch

PLAIN_STEPS = 3  # before the capture: libraries initialise, AdamW allocates its state
NOT_DECAYED = ("cls_token", "position_embedding", "token_type_embedding.weight")  # nor are biases and norms


class Trainer:
    """A classifier in training, with its optimizer and schedule.

    step(batch): learns from a Batch on the classifier's device; returns both terms of its loss, a tensor (2,) there
        that the next call may overwrite. On one GPU, nothing waits for it.
    """

    def __init__(self, classifier: Classifier, epochs: int, steps_per_epoch: int) -> None:
        self.recipe = recipe = classifier.recipe
        self.classifier = distributed.synchronise_batch_norms(classifier)
        spec_encoder = classifier.network.spec_encoder
        if spec_encoder is not None and not classifier.is_contrastive:
            # Only the contrastive loss uses this layer. DDP needs a gradient for every trainable parameter.
            spec_encoder.fc.requires_grad_(False)
        self.ddp_model = distributed.wrap_ddp(self.classifier)
        self.device = classifier.device
        self.optimizer = make_optimizer(classifier.network, recipe.learning_rate, recipe.weight_decay)
        total_steps = epochs * steps_per_epoch
        warmup_steps = min(round(recipe.warmup_epochs * steps_per_epoch), math.ceil(total_steps / 3))
        self.scheduler = LambdaLR(self.optimizer, warmup_and_cosine(warmup_steps, total_steps))
        one_gpu = self.device.type == "cuda" and distributed.world_size() == 1
        self.captured = CapturedStep() if one_gpu else None

    def step(self, batch: Batch) -> Tensor:
        losses = self.captured(self._plain_step, batch) if self.captured else self._plain_step(batch)
        self.scheduler.step()
        return losses

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _plain_step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        if batch.images is not None and self.recipe.rotate_and_flip:
            batch = batch._replace(images=rotate_and_flip(batch.images))
        losses = self._losses(batch)
        # Every process computes the loss of the whole batch, but back-propagates only through its own stars. The
        # gradients must be summed; DDP averages them.
        (losses.sum() * distributed.world_size()).backward()
        self._update()
        return losses.detach()

    def _losses(self, batch: Batch) -> Tensor:
        """Both terms of the loss (2,), over the stars of all processes."""
        outputs = (*self.ddp_model(batch), batch.targets)
        return self.classifier.losses(*(None if part is None else distributed.gather_stars(part) for part in outputs))

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.classifier.parameters(), self.recipe.max_gradient_norm)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that the next epoch depends on."""
        parts = {"classifier": self.classifier, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Go on from these states, which stay as they are. Must be called before the first step."""
        self.classifier.load_state_dict(states["classifier"])
        self.optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))  # torch would go on in these tensors
        on_gpu = self.device.type == "cuda"
        for group in self.optimizer.param_groups:  # the state may come from another kind of device
            rate = float(group["lr"])
            group |= {"capturable": on_gpu, "lr": torch.tensor(rate, device=self.device) if on_gpu else rate}
        self.scheduler.load_state_dict(states["scheduler"])


def rotate_and_flip(images: Tensor) -> Tensor:
    """Each image (B, 3, H, H) in one of its eight rotations and reflections: the sky has no up and no left."""
    transposed, mirrored, upended = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(transposed, images.transpose(2, 3), images)
    images = torch.where(mirrored, images.flip(3), images)
    return torch.where(upended, images.flip(2), images)


class CapturedStep:
    """Runs the first steps as they are, then captures one as a CUDA graph and replays it; all batches are alike."""

    def __init__(self) -> None:
        self.plain_steps, self.graph, self.stream = 0, None, torch.cuda.Stream()

    def __call__(self, step: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        if self.plain_steps < PLAIN_STEPS:
            self.plain_steps += 1
            # torch.cuda.graph asks for steps on a stream of their own before the capture.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.graph is None:
            self.batch = Batch(*(None if part is None else part.clone() for part in batch))
            graph = torch.cuda.CUDAGraph()
            # The thread that reads the next batch may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.losses = step(self.batch)
            self.graph = graph
        for own, part in zip(self.batch, batch, strict=True):
            if part is not None:
                own.copy_(part)
        self.graph.replay()
        return self.losses


def make_optimizer(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay, except on biases, norms and embeddings."""
    named = list(network.named_parameters())
    decayed = [parameter for name, parameter in named if parameter.dim() > 1 and name not in NOT_DECAYED]
    others = [parameter for name, parameter in named if parameter.dim() <= 1 or name in NOT_DECAYED]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    device = named[0][1].device
    on_gpu = device.type == "cuda"
    # A captured graph reads the learning rate, which the schedule changes between steps, from the device.
    rate = torch.tensor(learning_rate, device=device) if on_gpu else learning_rate
    return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=on_gpu)


def warmup_and_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate of a step over its peak: it rises linearly over the warm-up, then falls to zero along a
    cosine."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return rate
