"""Measure the speed of training and evaluation on this machine, against a plain PyTorch program.

    python benchmarks/speed.py                                         a minute on a GPU
    python benchmarks/speed.py --batch-sizes 8 --image-backbone resnet18    a small one, for CPUs
    python benchmarks/speed.py --candidates                            with other implementations of the step

"Plain" is the same network in float32, in PyTorch's default memory layout, with its default Adam. Each row takes turns
with it, so that changes of the machine's speed affect both; ratios are medians over the rounds. A step's floating-point
operations are counted by torch (matrix products, convolutions and attention, forwards and backwards); the machine's own
rate is that of large bf16 matrix products.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

from training_run import train_best, training_options

import train
from cache import PreparedStars
from catalog import CLASS_NAMES, Star
from classifier import Classifier
from cli import ScriptParser, number_between, quietly, run_as_script
from dataset import StarLoader
from device import choose_device, choose_precision, describe_device
from loss_sic import loss_sic
from preparation import SPECTRUM_LENGTH, Batch
from recipe import IMAGE_BACKBONES, IMPROVED, PAPER, Recipe
from survey_files import IMAGE_SIZE
from trainer import Trainer

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
STEPS = {"cpu": 1, "cuda": 10}  # in a round
EPOCH_BATCHES = 16  # of the epoch that is profiled

Work = Callable[[], object]  # a training step, or a forward pass


def parse_arguments() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add, number = parser.add_argument, number_between
    add("--image-backbone", choices=IMAGE_BACKBONES, default="resnet152", help="ResNet of the network")
    add("--batch-sizes", type=number(int, 2, 10**5), nargs="+", default=[32, 128, 512], metavar="N",
        help="stars in a step")  # fmt: skip
    add("--evaluation-sizes", type=number(int, 1, 10**5), nargs="*", default=[512, 1024], metavar="N",
        help="stars in a forward pass")  # fmt: skip
    add("--rounds", type=number(int, 1, 1000), default=3, metavar="N", help="rounds of measurements")
    add("--candidates", action="store_true", help="also time other implementations; one starts slowly, being compiled")
    return parser.parse_args()


def random_stars(number: int) -> PreparedStars:
    """Random arrays in the form of prepared stars."""
    flux = 1 + 0.3 * torch.randn(number, SPECTRUM_LENGTH)
    return PreparedStars(
        [Star(str(i), CLASS_NAMES[i % len(CLASS_NAMES)], 1 + i, 52000, 1) for i in range(number)],
        torch.stack([flux, torch.full_like(flux, 100.0)], dim=1),
        torch.randint(256, (number, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
        torch.arange(number) % len(CLASS_NAMES),
    )


def make_batch(number: int, device: torch.device) -> Batch:
    stars = random_stars(number)
    return Batch(stars.spectra.to(device), stars.images.to(device), stars.targets.to(device))


def plain_classifier(recipe: Recipe, device: torch.device) -> Classifier:
    return Classifier(recipe, "fp32").to(memory_format=torch.contiguous_format).to(device)


def plain_step(recipe: Recipe, batch: Batch, device: torch.device) -> Work:
    classifier = plain_classifier(recipe, device).train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-4)

    def step() -> None:
        specs, imgs = classifier.standardise(batch.spectra, batch.images)
        align_logits, fuse_logits = classifier.network(specs, imgs.contiguous())
        optimizer.zero_grad()
        loss_sic(align_logits, fuse_logits, batch.targets).backward()
        optimizer.step()

    return step


class HalfWeightsTrainer(Trainer):
    """Computes with bfloat16 copies of the weights, cast together, and updates the float32 ones.

    Autocast casts each weight and each gradient by a kernel of its own.
    """

    def __init__(self, classifier: Classifier, **options: int) -> None:
        super().__init__(classifier, **options)
        network = classifier.network
        norms = (module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm))
        kept = {parameter for norm in norms for parameter in norm.parameters()}
        kept |= {network.cls_token, network.position_embedding, network.token_type_embedding.weight}
        self.weights = {name: weight for name, weight in classifier.named_parameters() if weight not in kept}
        self.halves = halves = {k: weight.detach().bfloat16().requires_grad_() for k, weight in self.weights.items()}
        self.ddp_model = lambda batch: torch.func.functional_call(classifier, halves, (batch,))

    def _losses(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_copy_(list(self.halves.values()), list(self.weights.values()))
        for half in self.halves.values():
            half.grad = None
        return super()._losses(batch)

    def _update(self) -> None:
        used = [name for name, half in self.halves.items() if half.grad is not None]
        for name in used:
            self.weights[name].grad = torch.empty_like(self.weights[name])
        torch._foreach_copy_([self.weights[name].grad for name in used], [self.halves[name].grad for name in used])
        super()._update()


class CompiledTrainer(Trainer):
    """Compiles the ResNet's blocks and the Transformer's layers, each kind once."""

    def __init__(self, classifier: Classifier, **options: int) -> None:
        torch._dynamo.config.recompile_limit = 64  # one kind has as many shapes
        for module in classifier.network.modules():
            if isinstance(module, BasicBlock | Bottleneck | nn.TransformerEncoderLayer):
                module.compile(dynamic=False)
        super().__init__(classifier, **options)


def our_step(
    recipe: Recipe, batch: Batch, device: torch.device, kind: type[Trainer] = Trainer, precision: str = "auto"
) -> Work:
    classifier = Classifier(recipe, choose_precision(precision, device)).to(device).train()
    trainer = kind(classifier, epochs=100, steps_per_epoch=100)
    return lambda: trainer.step(batch)


def plain_evaluation(recipe: Recipe, batch: Batch, device: torch.device) -> Work:
    classifier = plain_classifier(recipe, device).eval()

    def forward() -> object:
        specs, imgs = classifier.standardise(batch.spectra, batch.images)
        return classifier.network(specs, imgs.contiguous())

    return torch.inference_mode()(forward)


def our_evaluation(recipe: Recipe, batch: Batch, device: torch.device) -> Work:
    classifier = Classifier(recipe, choose_precision("auto", device)).to(device).eval()
    return torch.inference_mode()(lambda: classifier(batch))


def seconds(work: Work, times: int, device: torch.device) -> float:
    """The mean duration of a call."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronise()
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronise()
    return (time.perf_counter() - started) / times


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second of bf16 matrix products."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: left @ right, 3, device)
    return 2 * size**3 / seconds(lambda: left @ right, 10, device)


def count_operations(recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Floating-point operations a star of a training step, and of a forward pass."""
    classifier, batch = plain_classifier(recipe, device), make_batch(2, device)
    with FlopCounterMode(display=False) as counter:
        align_logits, fuse_logits = classifier.network(*classifier.standardise(batch.spectra, batch.images))
        forward = counter.get_total_flops()
        loss_sic(align_logits, fuse_logits, batch.targets).backward()
    return counter.get_total_flops() / 2, forward / 2


def print_rows(
    kind: str, plain: Work, others: dict[str, Callable[[], Work]], stars: int, operations: float, rate: float,
    rounds: int, device: torch.device,
) -> None:  # fmt: skip
    """Time the plain work, and each of the others in turns with it; one is made when it is timed, and gone afterwards.

    stars: of a call; operations: of a star; rate: of matrix products.
    """
    for name, make in {"plain": lambda: plain, **others}.items():
        try:
            work = make()
            start = 5 * seconds(work, 5, device)
            times = [[seconds(one, STEPS[device.type], device) for one in (plain, work)] for _ in range(rounds)]
        except torch.OutOfMemoryError:
            print(f"| {kind}, {name} | {stars} | does not fit | | | |", flush=True)
            continue
        finally:
            work = None  # a captured step keeps its memory
            torch.cuda.empty_cache()
        each = statistics.median(own for _, own in times)
        ratio = statistics.median(other / own for other, own in times)
        share = operations * stars / each / rate
        speed = f"{stars / each:,.0f} | × {ratio:.2f} | {share:.1%}"
        print(f"| {kind}, {name} | {stars} | {speed} | {start:.1f} |", flush=True)


def idle_share(recipe: Recipe, batch_size: int, device: torch.device) -> float:
    """The share of an epoch in which the GPU runs no kernel. The profiler takes some time itself."""
    recipe = replace(recipe, batch_size=batch_size)
    classifier = Classifier(recipe, choose_precision("auto", device)).to(device)
    trainer = Trainer(classifier, epochs=2, steps_per_epoch=EPOCH_BATCHES)
    stars = random_stars(EPOCH_BATCHES * batch_size)
    loader = StarLoader(stars, range(len(stars.stars)), device)
    train.train_one_epoch(trainer, loader, 1, 0, "")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        started = time.perf_counter()
        train.train_one_epoch(trainer, loader, 2, 0, "")
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    on_gpu = (event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA)
    busy, end = 0.0, 0.0
    for kernel in sorted(on_gpu, key=lambda kernel: kernel.start):  # of several streams: they may overlap
        busy += max(0.0, kernel.end - max(kernel.start, end))
        end = max(end, kernel.end)
    return 1 - busy / 1e6 / elapsed


def training_seconds(recipe: Recipe, stars: int = 400) -> float:
    """Seconds of a training by train.py on stars from its cache: from the split to the last epoch's checkpoint."""
    options = training_options()
    options.recipe = replace(recipe, image_weights="none")
    started = time.perf_counter()
    train_best(options, random_stars(stars))
    return time.perf_counter() - started


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    device = choose_device("auto")
    recipe = replace(PAPER, image_backbone=args.image_backbone)
    improved = replace(IMPROVED, image_backbone=args.image_backbone)
    rate = matrix_rate(device)
    of_step, of_forward = count_operations(recipe, device)
    print(f"\nFusionModel with {args.image_backbone} on {describe_device(device)}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; bf16 matrix products: {rate / 1e12:.1f} Tflop/s; a step: {of_step / 1e9:.1f} "
          f"Gflop a star, a forward pass {of_forward / 1e9:.1f}\n")  # fmt: skip
    print(
        "| | batch | stars/s | against plain | share of the matrix rate | first 5 calls, s |\n|---|---|---|---|---|---|"
    )
    for size in args.batch_sizes:
        batch = make_batch(size, device)
        step = partial(our_step, recipe, batch, device)
        others = {"paper": step, "improved": partial(our_step, improved, batch, device)}
        if args.candidates:
            others["paper, float32 (TF32)"] = partial(step, precision="fp32")
            others["paper, bf16 weights"] = partial(step, HalfWeightsTrainer, "bf16")
            others["paper, compiled"] = partial(step, CompiledTrainer)
        plain = plain_step(recipe, batch, device)
        print_rows("training", plain, others, size, of_step, rate, args.rounds, device)
    for size in args.evaluation_sizes:
        batch = make_batch(size, device)
        others = {"paper": partial(our_evaluation, recipe, batch, device)}
        plain = plain_evaluation(recipe, batch, device)
        print_rows("evaluation", plain, others, size, of_forward, rate, args.rounds, device)
    if device.type == "cuda":
        with quietly():
            idle = {size: idle_share(recipe, size, device) for size in args.batch_sizes}
            whole = training_seconds(recipe)
        for size, share in idle.items():
            print(f"\nGPU idle in an epoch of batches of {size}: {share:.1%}")
        print(f"\na whole training, 400 stars, {recipe.num_epochs} epochs: {whole:.1f} s")


if __name__ == "__main__":
    run_as_script(main)
