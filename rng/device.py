"""Which device computes, and in which precision."""

import torch

from rng import distributed
from rng.errors import InputError


def pick(name="auto"):
    """"auto" takes a CUDA GPU (under torchrun each process its own), else the CPU.

    Any torch device name is taken as it is; InputError if it cannot be used. Noise levels are float64, which Apple's GPUs
    do not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", distributed.local_rank())
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name!r} cannot be used here; try --device cpu") from error
    return device


def bfloat16_pays(device):
    """True where bfloat16 is faster than float32: CPUs with AMX or AVX-512 BF16, and GPUs that support it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device, precision="auto"):
    """Context in which networks run: bfloat16 autocast for "bfloat16", and for "auto" where it pays; else float32."""
    enabled = precision == "bfloat16" or (precision == "auto" and bfloat16_pays(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
