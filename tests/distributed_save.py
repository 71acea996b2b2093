"""Saves a state as several ranks do: tensors cut by rows, one file a rank.

`save_sharded` starts this module once as a program, which starts a process for each rank.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def save_sharded(state: dict, folder: Path, ranks: int) -> None:
    """Writes `state` as a torch.distributed checkpoint of this many ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(state, Path(scratch) / "state.pt")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, scratch, str(folder), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def _rank(rank: int, scratch: str, folder: str, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    state = torch.load(f"{scratch}/state.pt", weights_only=True)

    def shard(value):
        if isinstance(value, dict):
            return {key: shard(entry) for key, entry in value.items()}
        # As under FSDP: matrices are parameters, cut by rows; z_L_init is a buffer, the same on every rank.
        return distribute_tensor(value, mesh, [Shard(0)]) if torch.is_tensor(value) and value.ndim == 2 else value

    dcp.save(shard(state), checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, as importing torch anew in each would take most of the time.
    arguments = (sys.argv[1], sys.argv[2], int(sys.argv[3]))
    multiprocessing.start_processes(_rank, args=arguments, nprocs=arguments[2], start_method="fork")
