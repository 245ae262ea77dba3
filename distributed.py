"""One training spread over several processes, which torchrun starts: a GPU each, or a part of the CPUs.

    torchrun --nproc-per-node=4 train.py --data-dir DIR

Each process takes its share of every batch; contrast, batch norm and gradients are those of the whole
batch, so that a run with N processes is the run with one. Outside torchrun there is one
process, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's number, 0 for the one that prints and writes files; torchrun says it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, and that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def started_processes() -> int:
    """How many processes torchrun has started, whether or not they work together yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_size() -> int:
    """How many processes share the work now: more than one only inside `process_group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes that torchrun started work together: by NCCL between GPUs, by gloo between CPUs."""
    if "RANK" not in os.environ:
        yield
        return
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_stars(values: Tensor) -> Tensor:
    """(B, …) of each process → (B·N, …) of all, with gradients; every process must have as many stars."""
    if world_size() == 1:
        return values
    return torch.cat(dist_functional.all_gather(values))


def gather_objects(value: Any) -> list[Any]:
    """The value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def prepare(model: nn.Module) -> nn.Module:
    """The network, its batch norms taking in the stars of all processes."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
    return model


def share_gradients(model: nn.Module) -> nn.Module:
    """The network as training calls it: its gradients are the mean of those of all processes.

    Each process computes the loss of the whole batch, so the mean is that loss's gradient.
    """
    if world_size() == 1:
        return model
    device_ids = [local_rank()] if next(model.parameters()).is_cuda else None
    # static_graph: without contrast, some of the encoders' parameters have no gradient.
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False, static_graph=True)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the stars of all processes on CPUs, where torch's own SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        mean = dist_functional.all_reduce(x.mean(dim=(0, 2, 3))) / world_size()
        deviation = x - mean[:, None, None]
        variance = dist_functional.all_reduce(deviation.square().mean(dim=(0, 2, 3))) / world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            count = world_size() * x[:, 0].numel()
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(variance * (count / (count - 1)), weight)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (deviation * scale[:, None, None] + self.bias[:, None, None]).to(dtype)
