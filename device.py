"""Where the network runs, and in which precision."""

import contextlib
from collections.abc import Iterator

import torch

import distributed
from cli import DataError

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # in messages of PyTorch and CUDA, and of cuBLAS and cuDNN


def choose_device(name: str) -> torch.device:
    """The device that --device names; "auto" is this process's GPU if there is one. Raises DataError without it.

    Float32 products use TF32 there. `cudnn.benchmark` stays off: its search takes seconds and gained nothing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise DataError(f"{torch.cuda.device_count()} GPU(s) here, one for each process: lower --nproc-per-node")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", distributed.local_rank())
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device)
    except RuntimeError as error:  # too old for this PyTorch, taken by another process, or full
        raise DataError(f"the GPU cannot be used ({str(error).splitlines()[0]}); use --device cpu") from error
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; "auto" is bf16 where the hardware computes in it, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without instructions of its own for it, a processor is slower in bf16 than in fp32
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = torch.backends.mkldnn.is_available() and any(
            capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
        )
    return "bf16" if has_bf16 else "fp32"


def describe_device(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in OUT_OF_MEMORY)


@contextlib.contextmanager
def out_of_memory_hint(hint: str) -> Iterator[None]:
    """Raise DataError, with the hint as its remedy, if the GPU runs out of memory in the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(f"the GPU's memory is full; {hint}") from error
