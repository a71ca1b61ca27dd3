"""Several processes under torchrun, which share each batch of a training; alone, nothing here does anything."""

import atexit
import datetime
import gc
import os

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def rank():
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    """Number of this process on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


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
    """Frees the replicas, then the group they hold: its threads, left running, can abort a process that ends."""
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
