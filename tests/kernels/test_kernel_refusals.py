"""What does not fit is refused by a sentence that has the values and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_backends import cpu_checks_only, gpu_only
from torch import Tensor

from dapo_kernels import checked_values, dapo_loss, linear_dapo_loss, linear_logprob, logprob

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
Change = dict[str, Any]


def call(function: Callable[..., Any], device: str, change: Change) -> Any:
    """With arguments that fit, but for the change; float32 tensors [6] stand for one a token."""
    per_token = torch.zeros(6)
    arguments: dict[str, Any] = {
        logprob: {"logits": torch.zeros(6, 9), "token_ids": torch.zeros(6, dtype=torch.int64)},
        linear_logprob: {
            "hidden": torch.zeros(6, 4),
            "weight": torch.zeros(9, 4),
            "token_ids": torch.zeros(6, dtype=torch.int64),
        },
        linear_dapo_loss: {
            "hidden": torch.zeros(6, 4),
            "weight": torch.zeros(9, 4),
            "token_ids": torch.zeros(6, dtype=torch.int64),
            "old_logprobs": per_token,
            "rollout_logprobs": per_token,
            "advantages": per_token,
            "token_weights": per_token,
            **CLIP,
        },
        dapo_loss: {
            "logprobs": per_token,
            "old_logprobs": per_token,
            "advantages": per_token,
            "token_weights": per_token,
            **CLIP,
        },
    }[function]
    moved = {
        name: value.to(device)
        if isinstance(value, Tensor) and value.device.type != "meta"
        else value
        for name, value in {**arguments, **change}.items()
    }
    return function(**moved)


FUNCTIONS = [logprob, linear_logprob, linear_dapo_loss, dapo_loss]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_fits_is_taken(device: str, function: Callable[..., Any]) -> None:
    """Negative control of all that follows."""
    call(function, device, {})


OF_LOGITS = [
    ({"logits": torch.zeros(6, 9, dtype=torch.float16)}, r"float16 \[6, 9\]"),
    ({"logits": torch.zeros(6, 9, dtype=torch.int64)}, "bfloat16, float32 or float64"),
    ({"logits": torch.zeros(2, 3, 9)}, r"got torch.float32 \[2, 3, 9\]"),
    ({"logits": torch.zeros(6, 0)}, r"no column; got shape \[6, 0\]"),
    ({"keep": torch.ones(5, dtype=torch.bool)}, r"keep must be torch.bool \[6\]"),
    ({"keep": torch.ones(6, dtype=torch.int64)}, "keep must be torch.bool"),
    ({"valid_vocab": 10}, r"valid_vocab is 10, expected 1 to 9"),
    ({"valid_vocab": 0}, "valid_vocab is 0, expected 1 to 9"),
    ({"temperature": 0.0}, "temperature is 0.0, expected a positive"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
]
OF_TOKEN_IDS = [
    ({"token_ids": torch.zeros(6, dtype=torch.int32)}, r"int64 \[6\].*int32"),
    ({"token_ids": torch.zeros(5, dtype=torch.int64)}, r"int64 \[6\].*\[5\]"),
    ({"token_ids": torch.zeros(6, 1, dtype=torch.int64)}, r"int64 \[6\].*\[6, 1\]"),
    ({"token_ids": torch.zeros(6, dtype=torch.int64, device="meta")}, "on meta"),
]
OF_HIDDEN = [
    ({"hidden": torch.zeros(4, 6).t()}, r"hidden .* adjacent columns; .* strides \[1, 6\]"),
    ({"hidden": torch.zeros(6, 8)[:, :4]}, r"hidden must be contiguous; .* strides \[8, 1\]"),
    ({"weight": torch.zeros(4, 9).t()}, r"weight .* adjacent columns"),
    ({"weight": torch.zeros(9, 8)[:, :4]}, "weight must be contiguous"),
    ({"weight": torch.zeros(9, 4, dtype=torch.bfloat16)}, "dtype, device and last dimension"),
    ({"weight": torch.zeros(9, 4, device="meta")}, "on meta; dtype, device"),
    ({"weight": torch.zeros(9, 5)}, r"weight is torch.float32 \[9, 5\].* must agree"),
    ({"hidden": torch.zeros(6, 4, 1)}, r"\[6, 4, 1\]"),
    ({"rows": torch.ones(6, dtype=torch.bool)}, r"rows must be torch.int64 \[K\]"),
    ({"rows": torch.zeros(2, 2, dtype=torch.int64)}, r"\[2, 2\]"),
    ({"valid_vocab": 10}, "valid_vocab is 10, expected 1 to 9"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"chunk_tokens": 0}, "chunk_tokens is 0, expected at least 1"),
    ({"hidden_grad": "sum"}, "hidden_grad is sum, expected one of partial, all_reduce, reduce"),
    ({"logits_dtype": torch.bfloat16}, "logits_dtype is torch.bfloat16, expected one of None"),
]
OF_TOKENS = [
    ({"advantages": torch.zeros(4)}, r"must be \[T\], got .*'advantages': \[4\]"),
    ({"old_logprobs": torch.zeros(6, 1)}, r"must be \[T\], got .*'old_logprobs': \[6, 1\]"),
    (
        {"rollout_logprobs": torch.zeros(6, dtype=torch.bfloat16)},
        "rollout_logprobs must be torch.f",
    ),
    ({"ref_logprobs": torch.zeros(6, device="meta")}, "ref_logprobs must be .*on meta"),
    ({"token_weights": torch.zeros(6, dtype=torch.float64)}, "token_weights must be torch.float32"),
    ({"kl_coef": 0.1}, "kl_coef = 0.1 needs ref_logprobs"),
    ({"clip_low": 0.0}, "clip_low = 0.0 must lie in"),
    ({"clip_low": 1.2}, "clip_low = 1.2"),
    ({"clip_high": -0.28}, "clip_high = -0.28"),
    ({"dual_clip": 1.0}, "dual_clip is 1.0, expected above 1, or 0"),
    ({"importance_cap": 0.0}, "importance_cap is 0.0, expected above 0"),
]
OF_LOGPROBS = [
    ({"logprobs": torch.zeros(6, dtype=torch.bfloat16)}, "logprobs must be torch.float32"),
    ({"logprobs": torch.zeros(6, 1)}, r"'logprobs': \[6, 1\]"),
    ({"entropy": torch.zeros(7)}, r"'entropy': \[7\]"),
]
OF_LENGTHS = [
    (dict.fromkeys(("old_logprobs", "rollout_logprobs", "advantages", "token_weights"),
                   torch.zeros(7)), "have 7 entries, expected 6"),
]  # fmt: skip
TABLE = [
    *((logprob, *row) for row in OF_LOGITS + OF_TOKEN_IDS),
    *((linear_logprob, *row) for row in OF_HIDDEN + OF_TOKEN_IDS),
    *((linear_dapo_loss, *row) for row in OF_HIDDEN + OF_TOKEN_IDS + OF_TOKENS + OF_LENGTHS),
    *((dapo_loss, *row) for row in OF_TOKENS + OF_LOGPROBS),
]


def name_of(value: object) -> str | None:
    if callable(value):
        return value.__name__
    return "-".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("function", "change", "sentence"), TABLE, ids=name_of)
def test_refused_with_a_sentence(
    device: str, function: Callable[..., Any], change: Change, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        call(function, device, change)
    text = str(refusal.value)
    assert text.startswith(function.__name__)
    assert text.endswith(".")


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


BAD_VALUES = [
    *(
        (function, {"token_ids": ids(0, 1, bad, 3, 4, 5)}, rf"ids\[2\] is {bad}, expected 0 to 8")
        for function in (logprob, linear_logprob, linear_dapo_loss)
        for bad in (-100, -1, 9, 2**40)
    ),
    (logprob, {"token_ids": ids(0, 0, 0, 7, 0, 0), "valid_vocab": 7}, "is 7, expected 0 to 6"),
    *(
        (function, {"token_weights": torch.tensor([0.0, 1.0, bad, 1.0, 1.0, 1.0])}, sentence)
        for function in (linear_dapo_loss, dapo_loss)
        for bad, sentence in (
            (math.nan, r"token_weights\[2\] is nan, expected a finite number"),
            (math.inf, r"token_weights\[2\] is inf"),
        )
    ),
    *(
        (function, {"rows": rows}, sentence)
        for function in (linear_logprob, linear_dapo_loss)
        for rows, sentence in (
            (ids(0, 6), "0 to 5; got values from 0 to 6, 0 of them repeated"),
            (ids(-1, 3), "got values from -1 to 3"),
            (ids(2, 3, 2), "1 of them repeated"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "change", "sentence"), BAD_VALUES, ids=name_of)
def test_values_are_looked_at_in_debug_mode(
    device: str, function: Callable[..., Any], change: Change, sentence: str
) -> None:
    with checked_values(), pytest.raises(ValueError, match=sentence):
        call(function, device, change)


@cpu_checks_only
@pytest.mark.parametrize(("function", "change", "sentence"), BAD_VALUES, ids=name_of)
def test_values_are_always_looked_at_on_a_cpu(
    device: str, function: Callable[..., Any], change: Change, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(function, device, change)


@gpu_only
def test_values_are_not_looked_at_on_a_gpu(device: str) -> None:
    """An id outside is impossible there instead: log-prob -inf."""
    logprobs, _ = call(logprob, device, {"token_ids": ids(0, 1, -100, 3, 2**40, 5)})
    assert logprobs.isneginf().tolist() == [False, False, True, False, True, False]


def test_main_grad_of_low_precision_is_refused(device: str) -> None:
    """On either path, before anything is added to it."""
    hidden = torch.zeros(6, 4, device=device)
    weight = torch.zeros(9, 4, device=device, requires_grad=True)
    weight.main_grad = torch.zeros(9, 4, device=device, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    logprobs, _ = call(linear_logprob, device, {"hidden": hidden, "weight": weight})
    with pytest.raises(ValueError, match=r"bfloat16; expected torch.float32.*grad_reduce_in_fp32"):
        logprobs.sum().backward()
    with pytest.raises(ValueError, match=r"bfloat16; expected torch.float32"):
        call(linear_dapo_loss, device, {"hidden": hidden, "weight": weight})
