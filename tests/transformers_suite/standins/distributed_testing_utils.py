"""Starts the ranks of transformers' distributed tests on the CPU, where the source distribution lacks the module.

It is copied under the name that the mixins import and keeps their calling convention: a rank function gets its rank
first and finds the process group ready.
"""

import functools
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    """Nothing to select: every rank is on the CPU."""


def _start_rank_processes(function, args, nprocs):
    """Runs `function(rank, *args)` in `nprocs` new processes and waits; raises what a rank raised."""
    mp.spawn(function, args=args, nprocs=nprocs)


def _rank_main(rank, world_size, rendezvous, function, args, kwargs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """Decorator: `run_distributed(2)(function)(*args)` runs `function(rank, *args)` on two ranks over gloo."""

    def decorate(function):
        @functools.wraps(function)
        def start(*args, **kwargs):
            # A file as meeting point: no port to be taken by somebody else.
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_rank_main, args=(world_size, f"{folder}/store", function, args, kwargs), nprocs=world_size)

        return start

    return decorate
