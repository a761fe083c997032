"""Four gloo processes that run the kernels over 2 and over 4 vocabulary shards.

`results_by_rank` starts them once for all tests; each case is run over shards there, and whole in
the process of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dapo_kernels import linear_dapo_loss, linear_logprob, logprob

WORLD, SIZE, TOKENS, CHUNK = 4, 16, 12, 5
NUM_CHUNKS = 3
VOCABULARIES = [
    (32, 32),  # no padding
    (32, 29),  # padding at the end of the last shard
    (32, 13),  # shards of nothing but padding, with 2 and with 4 ranks
]
DTYPES = [torch.float64, torch.float32]
CONTRACTS = ("all_reduce", "partial", "reduce_scatter")
RULE = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.05}
Results = dict[str, Any]


@dataclass(frozen=True)
class Case:
    function: str
    num_rows: int = 32
    valid: int = 29
    dtype: torch.dtype = torch.float64
    hidden_grad: str = "all_reduce"
    is_subset: bool = False
    """Only some of the tokens take part."""
    has_main_grad: bool = False


def cases() -> list[Case]:
    """Vocabularies and dtypes with every function; then what only hidden states have."""
    found = [
        Case(function, num_rows, valid, dtype)
        for function in ("logprob", "linear_logprob", "linear_dapo_loss")
        for num_rows, valid in VOCABULARIES
        for dtype in DTYPES
    ]
    for function in ("linear_logprob", "linear_dapo_loss"):
        for contract in CONTRACTS:
            for is_subset in (False, True):
                found.append(Case(function, hidden_grad=contract, is_subset=is_subset))
        found.append(Case(function, dtype=torch.float32, has_main_grad=True))
    found.append(Case("logprob", is_subset=True))
    return list(dict.fromkeys(found))


def tensors(case: Case, num_tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.num_rows + case.valid)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    values = {
        "hidden": normal(TOKENS, SIZE),
        "token_ids": torch.randint(0, case.valid, (TOKENS,), generator=generator),
        "old_logprobs": -normal(TOKENS).abs() - 3,
        "rollout_logprobs": -normal(TOKENS).abs() - 3,
        "ref_logprobs": -normal(TOKENS).abs() - 3,
        "advantages": normal(TOKENS),
        "token_weights": normal(TOKENS).abs() + 0.1,
        "grad_logprobs": normal(TOKENS),
        "grad_entropy": normal(TOKENS),
    }
    values = {name: value[:num_tokens] for name, value in values.items()}
    return {**values, "weight": normal(case.num_rows, SIZE)}


def run(case: Case, group: dist.ProcessGroup | None, num_tokens: int = TOKENS) -> Results:
    """This rank's results: whole vectors of tokens, its shard of the weight's gradient."""
    values = tensors(case, num_tokens)
    size, rank = (group.size(), group.rank()) if group else (1, 0)
    weight = values["weight"].chunk(size)[rank].contiguous().requires_grad_()
    hidden = values["hidden"].requires_grad_()
    if case.hidden_grad == "reduce_scatter":
        hidden = values["hidden"].detach().chunk(size)[rank].contiguous().requires_grad_()
    if case.has_main_grad:
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with CountedCollectives() as forward:
        outputs = _call(case, values, hidden, weight, group)
    with CountedCollectives() as backward:
        if case.function == "linear_dapo_loss":
            outputs["loss"].backward()
        else:
            torch.autograd.backward(
                (outputs["logprobs"], outputs["entropy"]),
                (values["grad_logprobs"], values["grad_entropy"]),
            )
    gradients = {"hidden": hidden.grad, "weight": weight.grad}
    if case.has_main_grad:
        gradients["weight"] = weight.main_grad  # type: ignore[attr-defined]
    return {
        "outputs": {name: value.detach() for name, value in outputs.items()},
        "gradients": gradients,
        "forward": forward.calls,
        "backward": backward.calls,
    }


def _call(
    case: Case,
    values: dict[str, Tensor],
    hidden: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    options: dict[str, Any] = {"temperature": 0.8, "valid_vocab": case.valid, "group": group}
    ids = values["token_ids"]
    taking_part = torch.arange(0, len(ids), 2) if case.is_subset else None
    if case.function == "logprob":
        keep = None if taking_part is None else torch.arange(len(ids)) % 2 == 0
        logits = hidden @ weight.t()
        return _named(logprob(logits, ids, keep=keep, **options))
    options |= {"hidden_grad": case.hidden_grad, "chunk_tokens": CHUNK, "rows": taking_part}
    if case.function == "linear_logprob":
        return _named(linear_logprob(hidden, weight, ids, **options))
    names = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "token_weights")
    tokens = {name: values[name] for name in names}
    loss, stats = linear_dapo_loss(hidden, weight, ids, **tokens, **RULE, **options)
    figures = {name: getattr(stats, name) for name in stats.__slots__}
    return {"loss": loss, **figures}


def _named(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("logprobs", "entropy"), outputs, strict=True))


class CountedCollectives:
    """Counts the collectives of torch.distributed; one on the world group is an error."""

    NAMES = (
        "all_gather_into_tensor",
        "all_reduce",
        "reduce_scatter_tensor",
        "all_gather",
        "broadcast",
        "barrier",
    )

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __enter__(self) -> CountedCollectives:
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
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


# ------------------------------------------------------------------ what the processes do


def results_by_rank(directory: Path) -> list[Results]:
    """What each of the four processes computed: by (group size, case), and a few by name."""
    mp.spawn(_worker, (str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.new_group(list(range(WORLD)))}
    results: Results = {}
    for size, group in groups.items():
        for case in cases():
            results[size, case] = run(case, group)
        for function in ("logprob", "linear_logprob", "linear_dapo_loss"):
            results["no token", size, function] = run(Case(function), group, num_tokens=0)
        results["scoring", size] = _score(group)
        results["refusal", size] = _refusal(group)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def _score(group: dist.ProcessGroup) -> Results:
    """Without gradient; then the loss on the log-probs that gave."""
    case = Case("linear_logprob", dtype=torch.float32)
    values = tensors(case)
    weight = values["weight"].chunk(group.size())[group.rank()].contiguous()
    with CountedCollectives() as counted, torch.no_grad():
        scored = _call(case, values, values["hidden"], weight, group)
    values["old_logprobs"] = scored["logprobs"]
    case = Case("linear_dapo_loss", dtype=torch.float32)
    loss = _call(case, values, values["hidden"].requires_grad_(), weight, group)
    return {"calls": counted.calls, "ratio_max_diff": loss["ratio_max_diff"]}


def _refusal(group: dist.ProcessGroup) -> str:
    """The sentence for a vocabulary that does not fit into the shards; nobody waits for anybody."""
    case = Case("linear_logprob", valid=33)
    values = tensors(case)
    weight = values["weight"].chunk(group.size())[group.rank()].contiguous()
    try:
        _call(case, values, values["hidden"], weight, group)
    except ValueError as error:
        return str(error)
    return "accepted"
