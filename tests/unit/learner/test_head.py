"""The output layer's two jobs: only wanted places cost anything, and both see the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dapo_hpc.config import LossSection
from dapo_hpc.learner.forward import Row, forward_backward, forward_backward_dapo, log_probs, row
from dapo_hpc.learner.head import LossInputs
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Processes
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import VOCAB, make_model

LENGTHS = np.array([9, 20, 14])
NUM_TOKENS = int(LENGTHS.sum())
HIDDEN = 32
RULE = LossSection(clip_low=0.2, clip_high=0.28)


def build(directory: Path, here: Processes, dtype: torch.dtype = torch.float32) -> Policy:
    make_model(directory, tied=True)
    policy = Policy(directory, here, dtype=dtype, temperature=0.8)
    policy.load(SafetensorsSource(directory))
    return policy


def some_wanted() -> np.ndarray:
    """The second half of each sequence, as if the first were the prompt."""
    return np.concatenate([np.arange(n) >= n // 2 for n in LENGTHS])


def packed(policy: Policy, is_wanted: np.ndarray | None) -> Row:
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, VOCAB, (2, NUM_TOKENS))
    return row(policy, tokens, targets, LENGTHS, is_wanted)


def inputs(old: Tensor, is_wanted: np.ndarray, *, spread: float = 0.0) -> LossInputs:
    generator = torch.Generator().manual_seed(0)
    noise = spread * torch.randn(NUM_TOKENS, generator=generator)
    return LossInputs(
        old_logprobs=old + noise,
        rollout_logprobs=old + 2 * noise,
        ref_logprobs=None,
        advantages=torch.randn(NUM_TOKENS, generator=generator),
        token_weights=torch.from_numpy(is_wanted).float() / is_wanted.sum(),
        rule=RULE,
    )


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of every parameter; and a clean slate."""
    found = {name: p.main_grad.clone() for name, p in policy.module.named_parameters()}
    policy.ddp.zero_grad_buffer()
    return found


class OutputLayerFlops(TorchDispatchMode):
    """Counts multiplications and additions of every matrix product that sees the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            (rows, inner), (_, columns) = (matrix.shape for matrix in args[-2:])
            if VOCAB in (rows, inner, columns):
                self.flops += 2 * rows * inner * columns
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_wanted", [some_wanted(), None], ids=["some", "all"])
def test_only_wanted_places_are_multiplied(
    is_wanted: np.ndarray | None, here: Processes, tmp_path: Path
) -> None:
    """One product to score, three to train, of K rows each; with all wanted, K is T."""
    policy = build(tmp_path, here)
    one_row = packed(policy, is_wanted)
    wanted = np.ones(NUM_TOKENS, bool) if is_wanted is None else is_wanted
    product = 2 * int(wanted.sum()) * HIDDEN * VOCAB
    with OutputLayerFlops() as counted:
        ((old, _),) = log_probs(policy, [one_row])
    assert counted.flops == product
    with OutputLayerFlops() as counted:
        forward_backward_dapo(policy, [one_row], lambda _: inputs(old, wanted))
    assert counted.flops == 3 * product
    with OutputLayerFlops() as counted:
        forward_backward(policy, [one_row], lambda _n, lp, _e: (lp.sum(), None))
    assert counted.flops == 4 * product


def test_wanted_places_have_the_numbers_they_had_and_the_others_none(
    here: Processes, tmp_path: Path
) -> None:
    policy = build(tmp_path, here)
    wanted = some_wanted()
    ((whole, whole_entropy),) = log_probs(policy, [packed(policy, None)])
    ((found, entropy),) = log_probs(policy, [packed(policy, wanted)])
    for part, complete in ((found, whole), (entropy, whole_entropy)):
        torch.testing.assert_close(part[wanted], complete[wanted], rtol=1e-5, atol=1e-6)
        assert not part[~wanted].any()
        assert complete[~wanted].all()

    weights = torch.from_numpy(wanted).float()
    found_gradients = []
    for one_row in (packed(policy, None), packed(policy, wanted)):
        forward_backward(policy, [one_row], lambda _n, lp, _e: ((lp * weights).sum(), None))
        found_gradients.append(gradients(policy))
    expected, found_here = found_gradients
    for name, value in expected.items():
        allowed = 1e-5 * float(value.abs().max())  # float32, summed in another order
        torch.testing.assert_close(found_here[name], value, rtol=0, atol=allowed)


def test_nothing_wanted_costs_nothing_and_trains_nothing(here: Processes, tmp_path: Path) -> None:
    policy = build(tmp_path, here)
    nothing = np.zeros(NUM_TOKENS, bool)
    one_row = packed(policy, nothing)
    with OutputLayerFlops() as counted:
        ((old, entropy),) = log_probs(policy, [one_row])
        no_weights = inputs(old, ~nothing)
        no_weights.token_weights.zero_()
        ((loss, stats),) = forward_backward_dapo(policy, [one_row], lambda _: no_weights)
    assert counted.flops == 0
    assert not old.any()
    assert not entropy.any()
    assert float(loss) == float(stats.tokens) == float(stats.ratio_max_diff) == 0.0
    assert not any(gradient.any() for gradient in gradients(policy).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sees_the_bits_that_scoring_saw(
    dtype: torch.dtype, here: Processes, tmp_path: Path
) -> None:
    policy = build(tmp_path, here, dtype)
    wanted = some_wanted()
    one_row = packed(policy, wanted)
    ((old, entropy),) = log_probs(policy, [one_row])
    ((_, stats),) = forward_backward_dapo(policy, [one_row], lambda _: inputs(old, wanted))
    assert float(stats.ratio_max_diff) == 0.0
    assert float(stats.logratio_sum) == 0.0
    assert float(stats.tokens) == wanted.sum()
    assert float(stats.entropy_sum) == pytest.approx(float(entropy.sum()), rel=1e-6)
    # Negative control: the smallest possible difference shows.
    off = torch.nextafter(old, torch.zeros(()))
    ((_, stats),) = forward_backward_dapo(policy, [one_row], lambda _: inputs(off, wanted))
    assert float(stats.ratio_max_diff) > 0.0


def test_statistics_belong_to_their_micro_batch(here: Processes, tmp_path: Path) -> None:
    policy = build(tmp_path, here)
    wanted = some_wanted()
    rows = [packed(policy, wanted), packed(policy, ~wanted)]
    scored = [old for old, _ in log_probs(policy, rows)]
    masks, spreads = (wanted, ~wanted), (0.0, 1.0)

    def each(i: int) -> LossInputs:
        return inputs(scored[i], masks[i], spread=spreads[i])

    together = forward_backward_dapo(policy, rows, each)
    summed = gradients(policy)
    alone = []
    for i in range(2):
        alone += forward_backward_dapo(policy, [rows[i]], lambda _, i=i: each(i))
    for (loss, stats), (own_loss, own_stats) in zip(together, alone, strict=True):
        assert torch.equal(loss, own_loss)
        assert stats == own_stats
    assert [int(stats.tokens) for _, stats in together] == [mask.sum() for mask in masks]
    assert float(together[0][1].ratio_max_diff) == 0.0 < float(together[1][1].ratio_max_diff)
    for name, value in gradients(policy).items():
        assert torch.equal(value, summed[name]), name


def test_every_forward_needs_a_job_of_its_own(here: Processes, tmp_path: Path) -> None:
    policy = build(tmp_path, here)
    one_row = packed(policy, None)
    log_probs(policy, [one_row])
    sequences = one_row.sequences.with_angles(policy.rotary)
    with pytest.raises(ValueError, match="needs a job before each forward"):
        policy.ddp(one_row.token_ids, None, None, packed_seq_params=sequences)
