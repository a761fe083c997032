"""An all-reduce across the nodes of the trial: `python -m ... RANK WORLD ADDRESS PORT`.

Prints backend, seconds of the first one (with the connections), GiB/s of the later ones.
"""

from __future__ import annotations

import datetime
import sys
import time
from importlib import import_module
from typing import Any

NUM_BYTES = 64 * 2**20
REPEATS = 5
PATIENCE = datetime.timedelta(seconds=120)


def main(rank: int, world: int, address: str, port: int) -> str:
    """What to print. Raises what torch raises; the caller reports its last line."""
    # By name: the launcher itself starts without torch, and this runs in a process of its own.
    torch = import_module("torch")
    distributed = import_module("torch.distributed")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    host = "127.0.0.1" if rank == 0 else address
    store = distributed.TCPStore(host, port, world, is_master=rank == 0, timeout=PATIENCE)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=PATIENCE
    )
    numbers = torch.ones(NUM_BYTES // 4, device="cuda" if backend == "nccl" else "cpu")
    first_s = _all_reduce_s(torch, distributed, numbers)
    later_s = [_all_reduce_s(torch, distributed, numbers) for _ in range(REPEATS)]
    if numbers[0].item() != float(world) ** (1 + REPEATS):
        raise ArithmeticError(f"the sum over {world} nodes is wrong: {numbers[0].item()}")
    distributed.destroy_process_group()
    return f"{backend} {first_s:.3f} {NUM_BYTES / 2**30 / min(later_s):.3f}"


def _all_reduce_s(torch: Any, distributed: Any, numbers: Any) -> float:
    began = time.monotonic()
    distributed.all_reduce(numbers)
    if numbers.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - began


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
