"""linear_logprob against numpy in float64, beside plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from logprob_truth import Inputs, Truth, assert_no_worse_than_torch, draw
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dapo_kernels import linear_logprob, logprob

CASES = [
    pytest.param(1, 8, 5, 5, 2048, id="one-token"),
    pytest.param(7, 16, 33, 33, 3, id="chunk-divides-nothing"),
    pytest.param(64, 64, 264, 250, 16, id="padded-vocabulary"),
    pytest.param(130, 48, 1187, 1187, 64, id="prime-vocabulary"),
    pytest.param(40, 128, 32, 31, 2048, id="small-vocabulary-one-chunk"),
    pytest.param(9, 8, 4, 1, 4, id="only-one-real-token"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "size", "rows", "valid", "chunk"), CASES)
def test_no_worse_than_torch(
    num_tokens: int, size: int, rows: int, valid: int, chunk: int, dtype: torch.dtype
) -> None:
    inputs = draw(num_tokens, size, rows, valid=valid, dtype=dtype)
    results = inputs.run(chunk_tokens=chunk)
    assert_no_worse_than_torch(results, inputs.run_plain_torch(), Truth(inputs))
    assert results[0].dtype == results[1].dtype == torch.float32
    assert results[2].dtype == results[3].dtype == dtype


def test_bfloat16_values_need_no_allowance_for_torch() -> None:
    """Logits are float32 inside: the log-probs are as exact as from float32 inputs."""
    inputs = draw(64, 64, 264, valid=250, dtype=torch.bfloat16)
    truth = Truth(inputs)
    ours, plain = (np.abs(r[0].double().numpy() - truth.values[0]) for r in both(inputs))
    assert (ours <= truth.allowed[0]).all()
    assert plain.mean() > 100 * ours.mean()


def both(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return inputs.run(), inputs.run_plain_torch()


def _one_column_too_many(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.valid_vocab += 1
    return inputs.run()


def _one_column_too_few(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.token_ids = inputs.token_ids.clamp(max=inputs.valid_vocab - 2)
    inputs.valid_vocab -= 1
    return inputs.run()


def _logits_in_bfloat16(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.hidden, inputs.weight = inputs.hidden.bfloat16(), inputs.weight.bfloat16()
    return inputs.run()


def _gradient_without_temperature(inputs: Inputs) -> tuple[Tensor, ...]:
    logprobs, entropy, grad_hidden, grad_weight = inputs.run()
    return logprobs, entropy, grad_hidden * inputs.temperature, grad_weight


def _upstream_averaged(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.upstream = torch.full_like(inputs.upstream, float(inputs.upstream.mean()))
    return inputs.run()


@pytest.mark.parametrize(
    "wrong",
    [
        _one_column_too_many,
        _one_column_too_few,
        _logits_in_bfloat16,
        _gradient_without_temperature,
        _upstream_averaged,
    ],
)
def test_the_measure_rejects_wrong_results(wrong: Callable[[Inputs], tuple[Tensor, ...]]) -> None:
    inputs = draw(64, 64, 264, valid=250)
    inputs.token_ids.clamp_(max=248)
    plain, truth = inputs.run_plain_torch(), Truth(inputs)
    assert_no_worse_than_torch(inputs.run(), plain, truth)
    with pytest.raises(AssertionError, match=r"logprobs|grad"):
        assert_no_worse_than_torch(wrong(inputs), plain, truth)


def test_gradcheck() -> None:
    inputs = draw(6, 5, 8, valid=7, dtype=torch.float64)

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(
            hidden,
            weight,
            inputs.token_ids,
            temperature=0.7,
            vocab_start=0,
            valid_vocab=7,
            group=None,
            chunk_tokens=4,
        )[0]

    assert torch.autograd.gradcheck(logprobs, inputs.leaves())


def test_scoring_gives_the_bits_of_training() -> None:
    """Else the ratio before the first update would not be exactly 1."""
    inputs = draw(50, 32, 70, dtype=torch.bfloat16)
    logprobs, entropy, *_ = inputs.run(chunk_tokens=16)
    with torch.no_grad():
        scored, scored_entropy = linear_logprob(
            *inputs.leaves(),
            inputs.token_ids,
            temperature=0.7,
            vocab_start=0,
            valid_vocab=70,
            group=None,
            chunk_tokens=16,
        )
    assert torch.equal(scored, logprobs)
    assert torch.equal(scored_entropy, entropy)
    assert not scored.requires_grad


def test_repeated_calls_give_the_same_bits() -> None:
    inputs = draw(50, 32, 70)
    assert all(torch.equal(x, y) for x, y in zip(inputs.run(), inputs.run(), strict=True))


class _LargestTensor(TorchFunctionMode):
    numel = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_all_logits_never_exist() -> None:
    inputs = draw(96, 8, 500)
    with _LargestTensor() as seen:
        inputs.run(chunk_tokens=8)
    assert seen.numel == 8 * 500
    with _LargestTensor() as seen:
        inputs.run_plain_torch()
    assert seen.numel == 96 * 500


def test_statistics_combine_over_shards_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pure part of vocab parallelism, shards looped over in one process; one shard is empty."""
    inputs = draw(30, 16, 40, valid=33, dtype=torch.float64)
    plan = logprob._plan(inputs.hidden, inputs.weight, 0.7, 0, 33, None, 2048)
    pieces = []
    for start in (0, 10, 20, 30, 40):
        shard = logprob._Plan(
            inverse_temperature=plan.inverse_temperature,
            vocab_start=start,
            num_valid=min(max(33 - start, 0), 10),
            group=None,
            chunk_tokens=7,
            dtype=torch.float64,
        )
        monkeypatch.setattr(logprob, "_combine", lambda statistics: statistics)
        rows = inputs.weight[start : start + 10]
        pieces.append(logprob._forward(inputs.hidden, rows, inputs.token_ids, shard))
        monkeypatch.undo()
    together = logprob._combine(torch.cat(pieces))
    truth = Truth(inputs)
    np.testing.assert_allclose(together[0].numpy(), truth.values[0], rtol=1e-13)
    np.testing.assert_allclose(together[1].numpy(), truth.values[1], rtol=1e-12)
    wrong = torch.cat(pieces)
    wrong[..., 0] = wrong[..., 0].clamp_min(0.0)
    assert not np.allclose(logprob._combine(wrong)[0].numpy(), truth.values[0])
