"""One training spread over several processes, which torchrun starts: a GPU each, or a part of the CPUs.

    torchrun --nproc-per-node=4 train.py --data-dir DIR

Each process takes its share of every batch. The contrastive loss and the gradients cover the whole batch. So do batch
norms on GPUs; on CPUs, where torch has no SyncBatchNorm, each process normalises its own share.
Outside torchrun there is one process, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cli import DataError

_alone = False  # whether this process goes on without the others after a failure


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes that torchrun started work together: by NCCL between GPUs, by gloo between CPUs.

    RANK and WORLD_SIZE that a scheduler left in the environment, without torchrun, do not count.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    try:
        dist.init_process_group()
    except ValueError as error:  # a variable of torchrun's is missing
        raise DataError(f"the processes cannot find each other ({error}); start them by torchrun") from None
    yield
    leave()


def leave(*, failed: bool = False) -> None:
    """From here on each process works alone, and counts as the first.

    After a failure nothing is closed: NCCL would wait for the others, which may wait for this one. torchrun ends them.
    """
    global _alone
    if failed:
        _alone = True
    elif _together():
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_initialized() and not _alone


def rank() -> int:
    """This process's number, 0 for the one that prints and writes files."""
    return dist.get_rank() if _together() else 0


def local_rank() -> int:
    """This process's number on its machine, and that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _together() else 0


def world_size() -> int:
    return dist.get_world_size() if _together() else 1


def gather_stars(values: Tensor) -> Tensor:
    """(B, …) of each process → (B·N, …) of all, with gradients for its own; every process must have as many stars."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.detach().contiguous())
    parts[rank()] = values
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """The value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def synchronise_batch_norms(model: nn.Module) -> nn.Module:
    """The network, its batch norms over the stars of all processes on GPUs."""
    if world_size() == 1 or not next(model.parameters()).is_cuda:
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def synchronise_buffers(model: nn.Module) -> None:
    """Give all processes the first one's batch-norm statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The network as training calls it: its gradients are the mean over all processes."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[local_rank()] if next(model.parameters()).is_cuda else None)
