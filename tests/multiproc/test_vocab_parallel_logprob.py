"""Vocab-parallel log-probs over 2 and 4 gloo processes against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dapo_kernels import linear_logprob

WORLD, SIZE, TOKENS = 4, 16, 37
VOCABULARIES = [
    (32, 32),  # no padding
    (32, 29),  # padding at the end of the last shard
    (32, 13),  # shards of nothing but padding, with 2 and with 4 ranks
]
DTYPES = [torch.float64, torch.float32]


def inputs(rows: int, valid: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + valid)
    hidden = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, valid, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), ids, upstream.to(dtype)


def run(
    rows: int,
    valid: int,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
    num_tokens: int = TOKENS,
) -> dict[str, Tensor]:
    """This rank's results; its rows of the weight only."""
    hidden, weight, ids, upstream = inputs(rows, valid, dtype)
    hidden, ids, upstream = hidden[:num_tokens], ids[:num_tokens], upstream[:num_tokens]
    size, rank = (group.size(), group.rank()) if group else (1, 0)
    local = weight.chunk(size)[rank].contiguous().requires_grad_()
    hidden.requires_grad_()
    logprobs, entropy = linear_logprob(
        hidden,
        local,
        ids,
        temperature=0.8,
        vocab_start=rank * rows // size,
        valid_vocab=valid,
        group=group,
        chunk_tokens=10,
    )
    logprobs.backward(upstream)
    assert hidden.grad is not None
    assert local.grad is not None
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy,
        "grad_hidden": hidden.grad,
        "grad_weight": local.grad,
    }


class CountedCollectives:
    """Counts the collectives of torch.distributed that linear_logprob calls."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __enter__(self) -> CountedCollectives:
        self._originals = {
            name: getattr(dist, name)
            for name in ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast")
        }
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert kwargs["group"] is not None, "a collective on the world group"
            self.calls[name] = self.calls.get(name, 0) + 1
            return original(*args, **kwargs)

        return call


def refusals(group: dist.ProcessGroup) -> str:
    """The sentence for a shard that does not lie at rank * V_local."""
    hidden, weight, ids, _ = inputs(32, 32, torch.float32)
    try:
        linear_logprob(
            hidden,
            weight[: 32 // group.size()].contiguous(),
            ids,
            temperature=1.0,
            vocab_start=group.rank() * 32 // group.size() + 1,
            valid_vocab=32,
            group=group,
        )
    except ValueError as error:
        return str(error)
    return "accepted"


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.new_group(list(range(WORLD)))}
    results: dict[Any, Any] = {}
    for size, group in groups.items():
        for rows, valid in VOCABULARIES:
            for dtype in DTYPES:
                with CountedCollectives() as counted:
                    results[size, rows, valid, dtype] = run(rows, valid, dtype, group)
                results["calls", size, rows, valid, dtype] = counted.calls
        results["refusal", size] = refusals(group)
    with CountedCollectives() as counted:
        results["no token"] = run(32, 32, torch.float32, groups[4], num_tokens=0)
    results["calls without token"] = counted.calls
    with CountedCollectives() as counted, torch.no_grad():
        hidden, weight, ids, _ = inputs(32, 32, torch.float32)
        linear_logprob(
            hidden,
            weight.chunk(WORLD)[rank].contiguous(),
            ids,
            temperature=1.0,
            vocab_start=rank * 8,
            valid_vocab=32,
            group=groups[4],
        )
    results["scoring calls"] = counted.calls
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of the four processes computed."""
    directory: Path = tmp_path_factory.mktemp("vocab-parallel")
    mp.spawn(worker, (str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


# Shards add the same terms in another order: some tens of roundings of values up to 30.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "valid"), VOCABULARIES)
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_equals_whole(
    by_rank: list[dict[Any, Any]], size: int, rows: int, valid: int, dtype: torch.dtype
) -> None:
    whole = run(rows, valid, dtype, None)
    shards = whole["grad_weight"].chunk(size)
    for rank, results in enumerate(by_rank):
        expected = {**whole, "grad_weight": shards[rank % size]}
        found = results[size, rows, valid, dtype]
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_hold_the_same_bits(by_rank: list[dict[Any, Any]], size: int) -> None:
    """Each rank decides on clipping by itself; they must decide alike."""
    for rows, valid in VOCABULARIES:
        first = by_rank[0][size, rows, valid, torch.float32]
        for results in by_rank[1:]:
            found = results[size, rows, valid, torch.float32]
            for name in ("logprobs", "entropy", "grad_hidden"):
                assert torch.equal(found[name], first[name])


def test_gradient_of_hidden_needs_every_shard(by_rank: list[dict[Any, Any]]) -> None:
    """Negative control: what one shard alone contributes is far from the whole."""
    hidden, weight, ids, upstream = inputs(32, 32, torch.float64)
    leaf = hidden.requires_grad_()
    logits = leaf @ weight.t() / 0.8
    logprobs = logits[torch.arange(TOKENS), ids] - logits.logsumexp(1)
    (grad_logits,) = torch.autograd.grad((logprobs * upstream).sum(), logits)
    found = by_rank[0][2, 32, 32, torch.float64]["grad_hidden"]
    torch.testing.assert_close(found, grad_logits @ weight / 0.8, **TOLERANCE[torch.float64])
    one_shard = grad_logits[:, :16] @ weight[:16] / 0.8
    assert (found - one_shard).abs().max() > 0.1


def test_one_collective_each_way(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        calls = [value for key, value in results.items() if key[0] == "calls"]
        assert len(calls) == 12
        assert all(c == {"all_gather_into_tensor": 1, "all_reduce": 1} for c in calls)
        assert results["scoring calls"] == {"all_gather_into_tensor": 1}


def test_no_token_needs_no_collective(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        assert results["calls without token"] == {}
        assert results["no token"]["logprobs"].shape == (0,)
        assert torch.equal(results["no token"]["grad_weight"], torch.zeros(8, SIZE))


def test_shard_at_the_wrong_place_is_refused(by_rank: list[dict[Any, Any]]) -> None:
    for rank, results in enumerate(by_rank):
        place = rank % 2 * 16
        assert f"vocab_start is {place + 1} on rank {rank % 2} of 2" in results["refusal", 2]
        assert f"rank * V_local = {place}; pad the vocabulary" in results["refusal", 2]
