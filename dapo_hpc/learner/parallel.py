"""The learner's processes: how they find each other, their groups, and how rank 0 tells the rest.

Ranks meet at a TCP store of rank 0 on a free port, whose address lies in the run directory. While
rank 0 waits for a batch, which can take half an hour, the others wait on that store and not in a
collective that a watchdog would kill. A rank that is restarted finds its place in the store taken,
marks the store as broken and waits for a new one; everybody else sees the mark and exits, and their
launcher starts them again.

Tensor-parallel ranks are neighbours, then context-parallel, then data-parallel, then
pipeline-parallel (Megatron's order).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # documented, but not in its stubs
    DistError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from dapo_hpc.config import LearnerSection
from dapo_hpc.learner import cpu
from dapo_hpc.network import local_addresses
from dapo_hpc.run_dir import write_json

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Longer than any collective of a healthy run: only mini-batches and checkpoints hold them."""
MEET_S = 300.0
"""How long a rank looks for the others."""
CONNECT_S = 2.0
"""For one address of rank 0 to answer."""
POLL_S = 0.2
BROKEN = "broken"


class PeerLost(RuntimeError):
    """Another rank of this learner died; exit, so that all ranks start anew together."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks along each axis."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1

    @classmethod
    def of(cls, learner: LearnerSection) -> Layout:
        """Of a config's section."""
        return cls(
            tensor=learner.tensor_parallel,
            pipeline=learner.pipeline_parallel,
            data=learner.data_parallel,
            context=learner.context_parallel,
        )

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    def require_world(self, world: int) -> None:
        """Raises ValueError unless exactly `world` processes make up this layout."""
        if world != self.world:
            raise ValueError(
                f"{world} learner processes were started, but learner.tensor_parallel * "
                f"pipeline_parallel * data_parallel * context_parallel is {self.tensor} * "
                f"{self.pipeline} * {self.data} * {self.context} = {self.world}. Start as many as "
                "that."
            )


class Processes:
    """This rank's place among the learner's ranks, and the ways to reach the others."""

    def __init__(self, layout: Layout, rank: int, store: Store, device: torch.device) -> None:
        self.layout = layout
        self.rank = rank
        self.world = layout.world
        self.device = device
        self.store = store
        self.data_rank: int = mpu.get_data_parallel_rank()
        self.context_rank: int = mpu.get_context_parallel_rank()
        self.tensor_rank: int = mpu.get_tensor_model_parallel_rank()
        self.pipeline_rank: int = mpu.get_pipeline_model_parallel_rank()
        self.is_last_stage: bool = mpu.is_pipeline_last_stage()
        self._sequence = 0

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """None when one rank holds all."""
        return mpu.get_tensor_model_parallel_group() if self.layout.tensor > 1 else None

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that share a row; None when one rank holds all of it."""
        return mpu.get_context_parallel_group() if self.layout.context > 1 else None

    @property
    def reports(self) -> bool:
        """True on the ranks that hold log-probs to count: one of each data-parallel replica, or one
        for each part of its rows."""
        return self.is_last_stage and self.tensor_rank == 0

    @property
    def speaks(self) -> bool:
        """True on the one rank of each data-parallel replica that counts what all of it knows."""
        return self.reports and self.context_rank == 0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over all ranks, float64; those that do not report give zeros."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        values = values.to(device=self.device, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values, op=operation)
        return values.cpu()

    def agree(self, flag: bool) -> bool:
        """True on every rank if it is True on any."""
        return bool(self.max_over_ranks(torch.tensor([float(flag)]))[0] > 0)

    def gather(self, mine: dict[str, Any]) -> dict[str, Any]:
        """The entries of all ranks, on every rank."""
        tables: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(tables, mine)
        return {name: value for table in tables for name, value in table.items()}

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def share_in_replica(self, read: Callable[[], bytes]) -> bytes:
        """`read()` of the first rank of this model-parallel group, on all of its ranks."""
        size = self.layout.tensor * self.layout.pipeline
        if size == 1:
            return read()
        group, source = mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank()
        content = torch.empty(0, dtype=torch.uint8)
        if self.rank == source:
            content = torch.frombuffer(bytearray(read()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([content.numel()], dtype=torch.int64, device=self.device)
        dist.broadcast(length, source, group=group)
        if self.rank != source:
            content = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, source, group=group)
        return content.cpu().numpy().tobytes()

    def announce(self, message: bytes) -> None:
        """Rank 0: the next message for the others, who are waiting in `listen`."""
        if self.world == 1:
            return
        self.store.set(f"message/{self._sequence}", message)  # type: ignore[arg-type]  # takes bytes
        if self._sequence > 1:
            self.store.delete_key(f"message/{self._sequence - 2}")
        self._sequence += 1

    def listen(self) -> bytes:
        """Other ranks: wait, without limit, for rank 0's next message.

        Raises PeerLost when another rank died.
        """
        key = f"message/{self._sequence}"
        try:
            while not self.store.check([key]):
                self.check_peers()
                time.sleep(POLL_S)
            self._sequence += 1
            return bytes(self.store.get(key))
        except DistError as error:
            raise PeerLost(f"rank 0 of the learner is gone ({error}).") from None

    def check_peers(self) -> None:
        """Raises PeerLost when another rank was restarted since this learner formed."""
        if self.world > 1 and self.store.check([BROKEN]):
            raise PeerLost("another rank of the learner was restarted; this one starts anew too.")


def connect(
    layout: Layout,
    rank: int,
    address: Path | None,
    *,
    threads: int = 1,
    local_rank: int | None = None,
    interface: str | None = None,
) -> Processes:
    """Meet the other ranks and form the parallel groups.

    Args:
        layout: sizes of the axes.
        rank: of this process, 0 to layout.world - 1.
        address: file in the run directory through which rank 0 is found; None: one rank.
        threads: OpenMP threads on CPU.
        local_rank: number of its GPU on its node; None: counted from `rank`.
        interface: network interface that rank 0 is found at, as in ib0; None: any.

    Raises:
        ValueError: rank 0's node has no such interface.
        PeerLost: the others did not appear in time, or one of them left.
    """
    logging.getLogger("megatron").setLevel(logging.WARNING)
    cpu.install()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place = rank if local_rank is None else local_rank
        device = torch.device("cuda", place % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = _meet(layout.world, rank, address, interface)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=layout.world,
        timeout=COLLECTIVE_TIMEOUT,
    )
    form_groups(layout)
    _seed(layout)
    return Processes(layout, rank, store, device)


def form_groups(layout: Layout) -> None:
    """Megatron's parallel groups; torch's process group is there."""
    mpu.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
    )


def disconnect() -> None:
    """Leave the groups; for tests, and for a learner that is done."""
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _seed(layout: Layout) -> None:
    """Nothing is drawn in training (every dropout is 0), but Megatron asks for seeded trackers."""
    if torch.cuda.is_available():
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(0)
    torch.manual_seed(layout.world)
    cpu.use_plain_random_state()


def _meet(world: int, rank: int, address: Path | None, interface: str | None = None) -> Store:
    if world == 1:
        return HashStore()
    if address is None:
        raise ValueError(f"{world} ranks need a common file to meet; got none.")
    return _host(world, address, interface) if rank == 0 else _join(rank, address)


def _host(world: int, address: Path, interface: str | None) -> Store:
    addresses = local_addresses(interface)
    store = TCPStore(
        "127.0.0.1", 0, None, is_master=True, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False
    )
    found = {"host": socket.gethostname(), "addresses": addresses, "port": store.port}
    write_json(address, {**found, "pid": os.getpid(), "world": world})
    return store


def _join(rank: int, address: Path) -> Store:
    """Connect to rank 0's store; one that knew this rank before is broken: wait for the next."""
    deadline = time.monotonic() + MEET_S
    left: str | None = None
    while time.monotonic() < deadline:
        text = address.read_text() if address.exists() else None
        if text is not None and text != left:
            store = _try(json.loads(text))
            if store is not None and store.add(f"joined/{rank}", 1) == 1:
                return store
            if store is not None:
                store.set(BROKEN, str(rank))
                left = text
        time.sleep(POLL_S)
    raise PeerLost(
        f"rank {rank} of the learner found no rank 0 through {address} in {MEET_S:.0f} s. "
        "Look at the log of rank 0."
    )


def _try(found: dict[str, Any]) -> Store | None:
    """Rank 0's store at the first of its addresses that answers."""
    is_here = found["host"] == socket.gethostname()
    for host in (["127.0.0.1"] if is_here else []) + found["addresses"]:
        if not _answers(host, found["port"]):
            continue
        try:
            return TCPStore(
                host, found["port"], None, is_master=False, timeout=timedelta(seconds=5)
            )
        except (DistError, RuntimeError):
            continue
    return None


def _answers(host: str, port: int) -> bool:
    """torch tries an address that does not answer for long, with a stack trace for each try."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
