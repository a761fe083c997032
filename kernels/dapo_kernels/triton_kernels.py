"""The Triton kernels; `triton_ops` launches them.

Rows: a program works on one row, or on a part of it when rows are few. A thread keeps 16 bytes of
adjacent logits per load, UNROLL loads in flight, and a running maximum of its own, so that the loop
over a row needs neither barrier nor shuffle, one exp2 per logit, and one more per block when the
thread's maximum moves. Offsets of rows are 64 bits wide; rows lie on the first axis of the grid,
the one without a limit of 65,535.

Arguments that may be absent are None, which Triton compiles out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dapo_kernels.terms import MAX_LOGRATIO, MAX_SLOT, NUM_SLOTS

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-1e30)
"""Stands for a logit of -inf: finite, so that 0 * it is not NaN."""
_LOWEST = tl.constexpr(-1e20)
"""Where maxima start: so far above _LEAST that a row of -inf alone sums up to 0. Logits below this
count as -inf."""
_MAX_LOGRATIO = tl.constexpr(MAX_LOGRATIO)
_MAX_SLOT = tl.constexpr(MAX_SLOT)
_NUM_SLOTS = tl.constexpr(NUM_SLOTS)


# ------------------------------------------------------------------ pieces of kernels


@triton.jit
def _columns(LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """[UNROLL, LANES, VECTOR] columns of a block: a thread's VECTOR lie side by side."""
    load = tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return load + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _include(x, maximum, total, weighted, scale):
    """Running statistics of each lane ([LANES]) after its logits of one more block.

    In units of log2: t = x * scale - maximum, in one rounding, where maximum is the largest
    x * scale, rounded. What rounding took from it is the same for all terms, and cancels.
    """
    x = tl.maximum(x, _LEAST, propagate_nan=tl.PropagateNan.ALL)
    new_maximum = tl.maximum(maximum, tl.max(tl.max(x, 2), 0) * scale)
    t = tl.fma(x, scale, -new_maximum[None, :, None])
    exponential = tl.exp2(t)
    offset = maximum - new_maximum
    rescale = tl.exp2(offset)
    weighted = rescale * (weighted + offset * total) + tl.sum(tl.sum(exponential * t, 2), 0)
    total = rescale * total + tl.sum(tl.sum(exponential, 2), 0)
    return new_maximum, total, weighted


@triton.jit
def _expm1(x):
    """exp(x) - 1, also for small x: five terms of the series are exact to float32 there."""
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5))))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)


@triton.jit
def _bounded(logratio):
    """Clamped to +-20, NaN kept."""
    logratio = tl.where(logratio > _MAX_LOGRATIO, _MAX_LOGRATIO, logratio)
    return tl.where(logratio < -_MAX_LOGRATIO, -_MAX_LOGRATIO, logratio)


# ------------------------------------------------------------------ statistics of rows


@triton.jit
def statistics_kernel(
    logits,
    row_stride,
    token_ids,
    keep,
    out,
    out_split_stride,
    vocab_start,
    num_columns,
    num_valid,
    inverse_temperature,
    num_splits,
    split_columns,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * VECTOR * UNROLL
    program = tl.program_id(0)
    row = program // num_splits
    split = program % num_splits
    out += split.to(tl.int64) * out_split_stride + row.to(tl.int64) * 4
    if keep is not None:  # noqa: SIM102  # a tensor that may be absent is a question of its own
        if tl.load(keep + row) == 0:
            # Together the parts stand for certainty, log-prob 0 and entropy 0; the first says so.
            is_first = (split == 0) & (vocab_start == 0)
            tl.store(out, tl.where(is_first, 0.0, _LOWEST))
            tl.store(out + 1, tl.where(is_first, 1.0, 0.0))
            tl.store(out + 2, 0.0)
            tl.store(out + 3, tl.where(is_first, 0.0, -float("inf")))
            return
    logits += row.to(tl.int64) * row_stride
    first = split * split_columns
    last = tl.minimum(first + split_columns, num_valid)
    scale = inverse_temperature * _LOG2_E

    columns = _columns(LANES, VECTOR, UNROLL)
    maximum = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole = first + tl.maximum(last - first, 0) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        x = tl.load(logits + start + columns).to(tl.float32)
        maximum, total, weighted = _include(x, maximum, total, weighted, scale)
    for start in range(whole, last, BLOCK):
        # All columns of the shard may be read, which keeps loads wide; padding then counts as -inf.
        x = tl.load(logits + start + columns, mask=start + columns < num_columns, other=0.0)
        x = tl.where(start + columns < last, x.to(tl.float32), -float("inf"))
        maximum, total, weighted = _include(x, maximum, total, weighted, scale)

    row_maximum = tl.max(maximum, 0)
    offset = maximum - row_maximum
    rescale = tl.exp2(offset)
    weighted = rescale * (weighted + offset * total)
    token = tl.load(token_ids + row) - vocab_start
    is_here = (token >= first) & (token < last)
    target = tl.load(logits + token, mask=is_here, other=-float("inf")).to(tl.float32)
    tl.store(out, row_maximum)
    tl.store(out + 1, tl.sum(total * rescale, 0))
    tl.store(out + 2, tl.sum(weighted, 0))
    tl.store(out + 3, target)


@triton.jit
def combine_kernel(
    statistics,
    part_stride,
    logprobs,
    entropy,
    normalizer,
    num_rows,
    num_parts,
    inverse_temperature,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    scale = inverse_temperature * _LOG2_E
    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    target = tl.full([ROWS], -float("inf"), tl.float32)
    at = statistics + row * 4
    for _ in range(0, num_parts):
        maximum = tl.maximum(maximum, tl.load(at, mask=is_row, other=0.0))
        other = tl.load(at + 3, mask=is_row, other=0.0)
        # As a maximum, but a target of NaN stays NaN.
        target = tl.where(other <= target, target, other)
        at += part_stride
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    at = statistics + row * 4
    for _ in range(0, num_parts):
        offset = tl.load(at, mask=is_row, other=0.0) - maximum
        share = tl.load(at + 1, mask=is_row, other=1.0)
        rescale = tl.exp2(offset)
        weighted += rescale * (tl.load(at + 2, mask=is_row, other=0.0) + offset * share)
        total += rescale * share
        at += part_stride
    # 0 if every logit of the row is -inf.
    total = tl.where(total == 0, 1.0, total)
    log_total = tl.log2(total)
    logprob = (tl.fma(target, scale, -maximum) - log_total) * _LN_2
    # Rounding may lift a certain token, and an entropy of nothing, to the wrong side of 0.
    logprob = tl.where(logprob > 0, 0.0, logprob)
    nats = (log_total - weighted / total) * _LN_2
    tl.store(logprobs + row, logprob, mask=is_row)
    tl.store(entropy + row, tl.where(nats < 0, 0.0, nats), mask=is_row)
    tl.store(normalizer + row * 2, maximum, mask=is_row)
    tl.store(normalizer + row * 2 + 1, log_total, mask=is_row)


# ------------------------------------------------------------------ gradient of rows


@triton.jit
def _gradient_block(x, maximum, log_total, entropy, scale, upstream, upstream_entropy):
    """-p * upstream of the log-prob, and -p (log p + entropy) * upstream of the entropy."""
    log2_p = tl.fma(x, scale, -maximum) - log_total
    p = tl.exp2(log2_p)
    gradient = -upstream * p
    if upstream_entropy is not None:
        slope = tl.where(p > 0, p * (log2_p * _LN_2 + entropy), 0.0)
        gradient -= upstream_entropy * slope
    return gradient


@triton.jit
def gradient_kernel(
    logits,
    row_stride,
    out,
    out_row_stride,
    token_ids,
    keep,
    logprobs,
    entropy,
    normalizer,
    grad_logprobs,
    grad_entropy,
    vocab_start,
    num_columns,
    num_valid,
    inverse_temperature,
    num_splits,
    split_columns,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * VECTOR * UNROLL
    program = tl.program_id(0)
    row = program // num_splits
    split = program % num_splits
    logits += row.to(tl.int64) * row_stride
    out += row.to(tl.int64) * out_row_stride
    first = split * split_columns
    last = tl.minimum(first + split_columns, num_columns)
    columns = _columns(LANES, VECTOR, UNROLL)

    logprob = tl.load(logprobs + row)
    upstream = tl.load(grad_logprobs + row) * inverse_temperature
    is_idle = (upstream == 0) | (logprob == -float("inf"))
    row_entropy = 0.0
    upstream_entropy = None
    if grad_entropy is not None:
        upstream_entropy = tl.load(grad_entropy + row) * inverse_temperature
        row_entropy = tl.load(entropy + row)
        # The entropy has a gradient even where the token is impossible.
        upstream = tl.where(logprob == -float("inf"), 0.0, upstream)
        is_idle = (upstream == 0) & (upstream_entropy == 0)
    if keep is not None:
        is_idle = is_idle | (tl.load(keep + row) == 0)
    if is_idle:
        zeros = tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty)
        for start in range(first, last, BLOCK):
            tl.store(out + start + columns, zeros, mask=start + columns < last)
        return

    maximum = tl.load(normalizer + row * 2)
    log_total = tl.load(normalizer + row * 2 + 1)
    scale = inverse_temperature * _LOG2_E
    whole = first + tl.maximum(tl.minimum(last, num_valid) - first, 0) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        x = tl.load(logits + start + columns).to(tl.float32)
        gradient = _gradient_block(
            x, maximum, log_total, row_entropy, scale, upstream, upstream_entropy
        )
        if out.dtype.element_ty != logits.dtype.element_ty:
            # The narrower output lies over logits that other threads have still to read.
            tl.debug_barrier()
        tl.store(out + start + columns, gradient.to(out.dtype.element_ty))
    for start in range(whole, last, BLOCK):
        is_column = start + columns < last
        x = tl.load(logits + start + columns, mask=is_column, other=0.0).to(tl.float32)
        gradient = _gradient_block(
            x, maximum, log_total, row_entropy, scale, upstream, upstream_entropy
        )
        gradient = tl.where(start + columns < num_valid, gradient, 0.0)
        if out.dtype.element_ty != logits.dtype.element_ty:
            tl.debug_barrier()
        tl.store(out + start + columns, gradient.to(out.dtype.element_ty), mask=is_column)

    # The token itself: 1 - p from the log-prob; p of a confident token, rounded, leaves nothing.
    token = tl.load(token_ids + row) - vocab_start
    own = -_expm1(logprob) * upstream
    if grad_entropy is not None:
        p = tl.exp(logprob)
        own -= upstream_entropy * tl.where(p > 0, p * (logprob + row_entropy), 0.0)
    is_here = (token >= first) & (token < tl.minimum(last, num_valid))
    tl.debug_barrier()
    tl.store(out + token, own.to(out.dtype.element_ty), mask=is_here)


# ------------------------------------------------------------------ loss of tokens


@triton.jit
def loss_kernel(
    logprobs,
    old_logprobs,
    rollout_logprobs,
    advantages,
    token_weights,
    ref_logprobs,
    entropy,
    slope,
    partials,
    num_done,
    total_loss,
    figures,
    num_tokens,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    kl_coef,
    TOKENS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    slots = tl.arange(0, _NUM_SLOTS)
    sums = tl.zeros([_NUM_SLOTS], tl.float32)
    num_programs = tl.num_programs(0)
    for start in range(tl.program_id(0) * TOKENS, num_tokens, num_programs * TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < num_tokens
        # No load waits for another: what stands at a token that does not count is put away after.
        weight = tl.load(token_weights + token, mask=is_token, other=0.0)
        logprob = tl.load(logprobs + token, mask=is_token, other=0.0)
        advantage = tl.load(advantages + token, mask=is_token, other=0.0)
        is_trained = weight != 0
        is_impossible = is_trained & (logprob == -float("inf"))
        counts = is_trained & (logprob != -float("inf"))
        logprob = tl.where(counts, logprob, 0.0)
        advantage = tl.where(counts, advantage, 0.0)

        # ---- the clipped ratio
        old = logprob
        if old_logprobs is not None:
            old = tl.load(old_logprobs + token, mask=is_token, other=0.0)
            old = tl.where(counts, old, 0.0)
        difference = logprob - old
        logratio = _bounded(difference)
        ratio = tl.exp(logratio)
        clipped = tl.where(ratio < 1.0 - clip_low, 1.0 - clip_low, ratio)
        clipped = tl.where(clipped > 1.0 + clip_high, 1.0 + clip_high, clipped)
        loss = -advantage * ratio
        slope_ratio = tl.where(tl.abs(difference) > _MAX_LOGRATIO, 0.0, loss)
        is_clipped = -advantage * clipped > loss
        loss = tl.where(is_clipped, -advantage * clipped, loss)
        is_dual = (dual_clip > 0) & (advantage < 0) & (loss > -dual_clip * advantage)
        loss = tl.where(is_dual, -dual_clip * advantage, loss)
        slope_ratio = tl.where(is_clipped | is_dual, 0.0, slope_ratio)

        # ---- how far the engine was from the learner
        importance = tl.where(counts, 1.0, 0.0)
        is_capped = importance < 0
        if rollout_logprobs is not None:
            rollout = tl.load(rollout_logprobs + token, mask=is_token, other=0.0)
            raw = tl.exp(_bounded(old - rollout))
            is_capped = counts & (raw >= importance_cap)
            importance = tl.where(counts, tl.where(is_capped, importance_cap, raw), 0.0)
        loss *= importance
        slope_ratio *= importance

        # ---- KL to the reference
        kl = tl.zeros([TOKENS], tl.float32)
        if ref_logprobs is not None:
            ref = tl.load(ref_logprobs + token, mask=is_token, other=0.0)
            ref = tl.where(counts, ref, 0.0)
            distance = _bounded(ref - logprob)
            growth = _expm1(distance)
            kl = growth - distance
            loss += kl_coef * kl
            inside = tl.abs(ref - logprob) <= _MAX_LOGRATIO
            slope_ratio -= kl_coef * tl.where(inside, growth, 0.0)
        tl.store(slope + token, tl.where(counts, weight * slope_ratio, 0.0), mask=is_token)

        # ---- figures, in the order of DapoLossStats
        loss = tl.where(counts, weight * loss, 0.0)
        is_good = advantage > 0
        is_bad = advantage < 0
        dual = is_bad & (ratio > dual_clip) & (dual_clip > 0)
        sums += tl.where(slots == 0, tl.sum(loss, 0), 0.0)
        sums += tl.where(slots == 1, tl.sum(is_trained.to(tl.float32), 0), 0.0)
        above = is_good & (ratio > 1.0 + clip_high)
        sums += tl.where(slots == 2, tl.sum(above.to(tl.float32), 0), 0.0)
        below = is_bad & (ratio < 1.0 - clip_low)
        sums += tl.where(slots == 3, tl.sum(below.to(tl.float32), 0), 0.0)
        sums += tl.where(slots == 4, tl.sum(dual.to(tl.float32), 0), 0.0)
        sums += tl.where(slots == 5, tl.sum(is_impossible.to(tl.float32), 0), 0.0)
        sums += tl.where(slots == 6, tl.sum(logratio, 0), 0.0)
        sums += tl.where(slots == 7, tl.sum(logratio * logratio, 0), 0.0)
        sums += tl.where(slots == 8, tl.sum(tl.where(counts, ratio, 0.0), 0), 0.0)
        sums += tl.where(slots == 9, tl.sum(importance, 0), 0.0)
        sums += tl.where(slots == 10, tl.sum(is_capped.to(tl.float32), 0), 0.0)
        sums += tl.where(slots == 11, tl.sum(kl, 0), 0.0)
        if entropy is not None:
            nats = tl.load(entropy + token, mask=is_token, other=0.0)
            sums += tl.where(slots == 12, tl.sum(tl.where(counts, nats, 0.0), 0), 0.0)
        largest = tl.maximum(tl.max(tl.abs(ratio - 1.0), 0), tl.sum(sums * (slots == _MAX_SLOT), 0))
        sums = tl.where(slots == _MAX_SLOT, largest, sums)

    # The last program to arrive adds up what all have left, always in the same order.
    tl.store(partials + tl.program_id(0) * _NUM_SLOTS + slots, sums)
    tl.debug_barrier()
    arrived = tl.atomic_add(num_done, 1, sem="acq_rel", scope="gpu")
    if arrived == num_programs - 1:
        programs = tl.arange(0, MAX_PROGRAMS)[:, None]
        at = partials + programs * _NUM_SLOTS + slots[None, :]
        # Past the first-level cache, which may hold what lay there before.
        left = tl.load(at, mask=programs < num_programs, other=0.0, cache_modifier=".cg")
        sums = tl.where(slots == _MAX_SLOT, tl.max(left, 0), tl.sum(left, 0))
        tl.store(figures + slots, sums)
        tl.store(total_loss, tl.sum(tl.where(slots == 0, sums, 0.0), 0))
        tl.store(num_done, 0)
