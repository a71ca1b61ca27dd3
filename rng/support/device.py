"""Which device computes and in which precision, and the processes that share a training under torchrun."""

import atexit
import datetime
import gc
import os

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from rng.support.errors import InputError


def pick(name="auto"):
    """"auto" takes a CUDA GPU, else the CPU; "auto" and "cuda" give each process of torchrun its own GPU.

    Any torch device name will do; InputError if it fails. Noise levels are float64, which Apple's GPUs lack.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name!r} cannot be used here; try --device cpu") from error
    return device


def bfloat16_pays(device):
    """True where bfloat16 is not emulated: CPUs with AMX or AVX-512 BF16, NVIDIA GPUs since Ampere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device, precision="auto"):
    """Context for networks: bfloat16 autocast for "bfloat16", and for "auto" where it pays, else float32."""
    enabled = precision == "bfloat16" or (precision == "auto" and bfloat16_pays(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def add_arguments(group):
    """The options --device and --precision."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="auto (default): bfloat16 where it pays")


def rank():
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def replica(network, device):
    """The network to call in training: its gradients become the mean over all processes."""
    if world_size() == 1:
        return network
    if not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def _leave():
    """Frees the replicas, then their group, whose threads can abort a process that ends before them."""
    gc.collect()
    distributed.destroy_process_group()


def wait_for_all():
    """Returns when every process has come here: torchrun ends all of them where one ends with an error."""
    if world_size() > 1:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # of labelling
        distributed.barrier()
        distributed.destroy_process_group()


def mean(values, device):
    """Mean over all processes of a list of numbers -> list of floats."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return (total / world_size()).tolist()
