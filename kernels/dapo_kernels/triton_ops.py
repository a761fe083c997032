"""Launches of the Triton kernels; signatures and meaning: `backend.RowOperations`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dapo_kernels import triton_kernels
from dapo_kernels.terms import NUM_SLOTS, ClipRule, PolicyTokens, RowResults, TokenLosses
from dapo_kernels.vocab import VocabShard

# Fixed, not tuned at run time: a trial run of an in-place kernel would destroy its input.
LANES = 256
ROW_WARPS = 8
LOGITS_PER_LANE = 16
"""Of a block, in loads of 16 bytes: two of bfloat16, four of float32. With twice as many the
statistics of bfloat16 need 125 registers instead of 64, so two programs share a multiprocessor
instead of four."""
ROWS_PER_PROGRAM = 128
COMBINE_WARPS = 4
TOKENS_PER_PROGRAM = 512
LOSS_WARPS = 16
MAX_LOSS_PROGRAMS = 128
"""At most as many as can run at once: the last one adds up what all have left."""
ENOUGH_PROGRAMS = 1024
"""Rows from which on a row is not split: a few waves on any GPU."""


def num_splits(num_rows: int, num_columns: int) -> int:
    """So many that there are about ENOUGH_PROGRAMS, and a block or more for each."""
    wanted = -(-ENOUGH_PROGRAMS // max(num_rows, 1))
    most = num_columns // (LANES * LOGITS_PER_LANE)
    return max(1, min(wanted, most))


def write_statistics(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    shard: VocabShard,
    inverse_temperature: float,
    keep: Tensor | None = None,
) -> None:
    splits = len(out)
    triton_kernels.statistics_kernel[(len(logits) * splits,)](
        logits,
        logits.stride(0),
        token_ids.contiguous(),
        None if keep is None else keep.contiguous(),
        out,
        out.stride(0),
        shard.start,
        shard.num_columns,
        shard.num_valid,
        inverse_temperature,
        splits,
        _split_columns(shard.num_columns, splits, logits),
        LANES=LANES,
        VECTOR=_vector(logits),
        UNROLL=LOGITS_PER_LANE // _vector(logits),
        num_warps=ROW_WARPS,
    )


def combine(statistics: Tensor, inverse_temperature: float) -> RowResults:
    num_parts, num_rows, _ = statistics.shape
    results = RowResults(
        logprobs=statistics.new_empty(num_rows),
        entropy=statistics.new_empty(num_rows),
        normalizer=statistics.new_empty((num_rows, 2)),
    )
    triton_kernels.combine_kernel[(triton.cdiv(num_rows, ROWS_PER_PROGRAM),)](
        statistics,
        statistics.stride(0),
        results.logprobs,
        results.entropy,
        results.normalizer,
        num_rows,
        num_parts,
        inverse_temperature,
        ROWS=ROWS_PER_PROGRAM,
        num_warps=COMBINE_WARPS,
    )
    return results


def write_gradient(
    logits: Tensor,
    token_ids: Tensor,
    shard: VocabShard,
    inverse_temperature: float,
    results: RowResults,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
    keep: Tensor | None = None,
) -> Tensor:
    # A row that becomes narrower is written over itself from left to right, by one program.
    is_narrowed = dtype != logits.dtype
    out = _narrow(logits, dtype) if is_narrowed else logits
    splits = 1 if is_narrowed else num_splits(len(logits), shard.num_columns)
    triton_kernels.gradient_kernel[(len(logits) * splits,)](
        logits,
        logits.stride(0),
        out,
        out.stride(0),
        token_ids.contiguous(),
        None if keep is None else keep.contiguous(),
        results.logprobs,
        results.entropy,
        results.normalizer,
        grad_logprobs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        shard.start,
        shard.num_columns,
        shard.num_valid,
        inverse_temperature,
        splits,
        _split_columns(shard.num_columns, splits, logits),
        LANES=LANES,
        VECTOR=_vector(logits),
        UNROLL=LOGITS_PER_LANE // _vector(logits),
        num_warps=ROW_WARPS,
    )
    return out


def token_losses(logprobs: Tensor, tokens: PolicyTokens, rule: ClipRule) -> TokenLosses:
    columns = {name: value.contiguous() for name, value in tokens.given().items()}
    num_tokens = len(logprobs)
    num_programs = min(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM), MAX_LOSS_PROGRAMS)
    slope = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    loss, figures = logprobs.new_empty(()), logprobs.new_empty(NUM_SLOTS)
    triton_kernels.loss_kernel[(num_programs,)](
        logprobs.contiguous(),
        columns.get("old_logprobs"),
        columns.get("rollout_logprobs"),
        columns["advantages"],
        columns["token_weights"],
        columns.get("ref_logprobs"),
        columns.get("entropy"),
        slope,
        logprobs.new_empty(num_programs * NUM_SLOTS),
        _arrivals(logprobs.device),
        loss,
        figures,
        num_tokens,
        rule.clip_low,
        rule.clip_high,
        rule.dual_clip,
        rule.importance_cap,
        rule.kl_coef,
        TOKENS=TOKENS_PER_PROGRAM,
        MAX_PROGRAMS=MAX_LOSS_PROGRAMS,
        num_warps=LOSS_WARPS,
    )
    return TokenLosses(loss, slope, figures)


_counters: dict[tuple[int | None, int], Tensor] = {}


def _arrivals(device: torch.device) -> Tensor:
    """A counter for each stream, 0 between launches: setting it to 0 would be a launch more."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device.index, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def _vector(logits: Tensor) -> int:
    """Logits in 16 bytes."""
    return 16 // logits.element_size()


def _split_columns(num_columns: int, splits: int, logits: Tensor) -> int:
    """Columns of one part: whole vectors for each lane."""
    unit = LANES * _vector(logits)
    return -(-num_columns // (splits * unit)) * unit


def _narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of the first half of each row as half as wide elements."""
    size, (row_stride, _) = list(logits.shape), logits.stride()
    ratio = logits.element_size() // dtype.itemsize
    start = logits.storage_offset() * ratio
    view = torch.empty(0, dtype=dtype, device=logits.device)
    return view.set_(logits.untyped_storage(), start, size, (row_stride * ratio, 1))
