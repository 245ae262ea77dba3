"""How quickly the network trains and classifies here, beside a plain program that does the same.

    python benchmarks/speed.py                                  the paper's network, some minutes on two cores
    python benchmarks/speed.py --image-backbone resnet18        a small one
    python benchmarks/speed.py --compile                        with torch.compile as well

The yardstick is the same network in float32, in PyTorch's default memory layout, with Adam as it comes. Both
take turns, round by round, so that the machine's changes of speed meet both; the ratios are medians over the
rounds. A step's floating-point operations are counted by torch (matrix products, convolutions and attention,
forwards and backwards); the machine's own rate is that of large bf16 matrix products, measured in each round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import data  # noqa: E402
import train  # noqa: E402
from loss_sic import loss_sic  # noqa: E402
from model import IMAGE_BACKBONES, FusionModel  # noqa: E402

MATRIX_SIZE = 4096


def parse_arguments() -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add, number = parser.add_argument, data.number_between
    add("--image-backbone", choices=IMAGE_BACKBONES, default="resnet152", help="of the network")
    add("--batch-size", type=number(int, 1, 10**5), default=32, help="stars a step")
    add("--rounds", type=number(int, 1, 1000), default=5, help="of each measurement, after one that does not count")
    add("--steps", type=number(int, 1, 1000), default=2, help="in a round")
    add("--compile", action="store_true", help="time the step under torch.compile, too")
    return parser.parse_args()


def make_batch(batch_size: int, device: torch.device) -> train.Batch:
    spectra = 1 + 0.3 * torch.randn(batch_size, data.SPECTRUM_LENGTH)
    images = torch.randint(256, (batch_size, 3, data.IMAGE_SIZE, data.IMAGE_SIZE), dtype=torch.uint8)
    image_seen = torch.rand(batch_size) < 0.5
    return train.Batch(spectra, images, image_seen, torch.arange(batch_size) % len(data.CLASS_NAMES)).to(device)


def plain_step(model: FusionModel, batch: train.Batch) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model.train()

    def step() -> None:
        align_logits, fuse_logits = model(batch.spectra, batch.images, batch.image_seen)
        optimizer.zero_grad()
        loss_sic(align_logits, fuse_logits, batch.targets).backward()
        optimizer.step()

    return step


def our_step(engine: train.Engine, batch: train.Batch, *, compiled: bool = False) -> Callable[[], None]:
    """As train.py does it: clipped gradients, schedule and running mean of the weights included."""
    optimizer, scheduler = train.make_optimizer(engine.model, 1e-4, epochs=1000, steps_per_epoch=1000)
    update_average = train.running_mean(engine.model, steps=1000)[1]
    trained = engine._replace(model=train.compile_network(engine.model, engine.device)) if compiled else engine
    return lambda: train.train_one_epoch(trained, [batch], optimizer, scheduler, update_average, "")


def evaluation(engine: train.Engine, batch: train.Batch) -> Callable[[], None]:
    @torch.inference_mode()
    def evaluate() -> None:
        engine.model.eval()
        engine.loss(batch)

    return evaluate


def matrix_products(device: torch.device) -> Callable[[], None]:
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: left @ right


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call, in the mean."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronise()
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronise()
    return (time.perf_counter() - started) / times


def count_operations(model: FusionModel, batch: train.Batch) -> tuple[int, int]:
    """Floating-point operations of a training step, and of a forward pass."""
    with FlopCounterMode(display=False) as forward:
        loss = loss_sic(*model(batch.spectra, batch.images), batch.targets)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() + backward.get_total_flops(), forward.get_total_flops()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    device = train.choose_device("auto")
    precision = train.choose_precision("auto", device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # for both, as train.py has it
    batch = make_batch(args.batch_size, device)

    def make_model() -> FusionModel:
        return FusionModel(image_backbone=args.image_backbone).to(device)

    training_operations, evaluation_operations = count_operations(make_model(), batch)
    plain, ours = make_model(), make_model().to(memory_format=torch.channels_last)
    works = {
        "training, plain": plain_step(plain, batch),
        "training": our_step(train.Engine(ours, device, precision), batch),
        "evaluation, plain": evaluation(train.Engine(make_model(), device, "fp32"), batch),
        "evaluation": evaluation(train.Engine(ours, device, precision), batch),
        "matrix products": matrix_products(device),
    }
    if args.compile:
        model = make_model().to(memory_format=torch.channels_last)
        works["training, compiled"] = our_step(train.Engine(model, device, precision), batch, compiled=True)
    rounds = [{name: seconds(work, args.steps, device) for name, work in works.items()} for _ in range(args.rounds + 1)]
    rounds = rounds[1:]  # the first one also builds and tunes

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\nFusionModel with {args.image_backbone}, batches of {args.batch_size}, {name}, torch {torch.__version__}, "
          f"{args.rounds} rounds of {args.steps} steps\n")  # fmt: skip
    rates = [2 * MATRIX_SIZE**3 / one["matrix products"] for one in rounds]
    print(f"bf16 matrix products of {MATRIX_SIZE}²: {statistics.median(rates) / 1e12:.2f} Tflop/s\n")
    print("| | here | yardstick | ratio | share of the matrix-product rate |")
    print("|---|---|---|---|---|")
    for work, yardstick, operations in (
        ("training", "training, plain", training_operations),
        ("training, compiled", "training, plain", training_operations),
        ("evaluation", "evaluation, plain", evaluation_operations),
    ):
        if work in works:
            here, there = (args.batch_size / statistics.median(one[key] for one in rounds) for key in (work, yardstick))
            ratio = statistics.median(one[yardstick] / one[work] for one in rounds)
            share = statistics.median(operations / one[work] / rate for one, rate in zip(rounds, rates, strict=True))
            print(f"| {work}, {precision} | {here:.1f} stars/s | {there:.1f} stars/s | × {ratio:.1f} | {share:.0%} |")


if __name__ == "__main__":
    data.run_as_script(main)
