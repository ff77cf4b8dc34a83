"""Two processes that are the ranks of a distributed run."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.multiprocessing as mp


def two_ranks(run, folder):
    """What ``run(rank)`` returns on each of two ranks; ``folder`` is an empty path."""
    mp.spawn(_in_rank, (run, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _in_rank(rank, run, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=(Path(folder) / "meet").as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(run(rank), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's own destructor hangs now and then
