"""Arguments that do not fit are refused with a sentence, before anything is computed or sent.

What a tensor is (dtype, shape, layout, device) is looked at always. What it holds is looked at on a
CPU, and on a GPU only inside `checked_values`, because the host would have to wait for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_checks_values: ContextVar[bool] = ContextVar("checks_values", default=False)

MATRIX_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@contextlib.contextmanager
def checked_values() -> Iterator[None]:
    """Debug mode: look at values on a GPU as well, at the price of a synchronisation each."""
    token = _checks_values.set(True)
    try:
        yield
    finally:
        _checks_values.reset(token)


def looks_at_values(tensor: Tensor) -> bool:
    """Whether its values may be looked at."""
    return _checks_values.get() or tensor.device.type == "cpu"


def check_matrix(caller: str, name: str, tensor: Tensor, letters: str) -> None:
    """[rows, columns] of a known dtype, the columns of a row side by side."""
    if tensor.dim() != 2 or tensor.dtype not in MATRIX_DTYPES or tensor.stride(-1) != 1:
        raise ValueError(
            f"{caller}: {name} must be bfloat16, float32 or float64 [{letters}] with adjacent "
            f"columns; got {_describe(tensor)}. Call .contiguous() where the tensor is made."
        )
    if tensor.shape[1] == 0:
        raise ValueError(f"{caller}: {name} has no column; got shape {list(tensor.shape)}.")


def check_contiguous(caller: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{caller}: {name} must be contiguous; got {_describe(tensor)}. Call .contiguous() "
            "where the tensor is made."
        )


def check_choice(caller: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in dict.fromkeys(allowed))
        raise ValueError(f"{caller}: {name} is {value}, expected one of {choices}.")


def check_length(caller: str, per_token: Tensor, num_tokens: int) -> None:
    if len(per_token) != num_tokens:
        raise ValueError(
            f"{caller}: the per-token inputs have {len(per_token)} entries, expected {num_tokens}, "
            "one for each token of hidden."
        )


def check_pair(caller: str, hidden: Tensor, weight: Tensor) -> None:
    """Both of a matrix product."""
    same = (
        hidden.dtype == weight.dtype
        and hidden.shape[1] == weight.shape[1]
        and hidden.device == weight.device
    )
    if not same:
        raise ValueError(
            f"{caller}: hidden is {_describe(hidden)}, weight is {_describe(weight)}; dtype, "
            "device and last dimension must agree."
        )


def check_token_ids(
    caller: str, token_ids: Tensor, num_tokens: int, device: torch.device, vocab: int
) -> None:
    """[T] int64 in [0, vocab)."""
    expected = f"must be int64 [{num_tokens}] on {device}, one for each token"
    if token_ids.dtype != torch.int64 or list(token_ids.shape) != [num_tokens]:
        raise ValueError(f"{caller}: token_ids {expected}; got {_describe(token_ids)}.")
    if token_ids.device != device:
        raise ValueError(f"{caller}: token_ids {expected}; got {_describe(token_ids)}.")
    if num_tokens and looks_at_values(token_ids):
        outside = (token_ids < 0) | (token_ids >= vocab)
        if outside.any():
            place = int(outside.nonzero()[0])
            raise ValueError(
                f"{caller}: token_ids[{place}] is {int(token_ids[place])}, expected 0 to "
                f"{vocab - 1} (the vocabulary has {vocab} tokens). Give tokens that do not train "
                "any id inside, and the weight 0."
            )


def check_temperature(caller: str, temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{caller}: temperature is {temperature}, expected a positive number.")


def check_per_token(caller: str, values: dict[str, Tensor], dtype: torch.dtype) -> None:
    """[T] each, of one length, dtype and device; weights finite."""
    first = next(iter(values.values()))
    for name, value in values.items():
        if value.shape != first.shape or value.dim() != 1:
            shapes = {name: list(value.shape) for name, value in values.items()}
            raise ValueError(f"{caller}: every per-token input must be [T], got {shapes}.")
        if value.dtype != dtype or value.device != first.device:
            raise ValueError(
                f"{caller}: {name} must be {dtype} on {first.device}; got {_describe(value)}."
            )
    weights = values["token_weights"]
    if weights.numel() and looks_at_values(weights) and not torch.isfinite(weights).all():
        place = int((~torch.isfinite(weights)).nonzero()[0])
        raise ValueError(
            f"{caller}: token_weights[{place}] is {float(weights[place])}, expected a finite "
            "number; was a denominator 0?"
        )


def check_selection(
    caller: str, name: str, selection: Tensor | None, num_tokens: int, device: torch.device
) -> None:
    """`keep`: [T] bool. `rows`: [K] int64, distinct, in [0, T)."""
    if selection is None:
        return
    is_mask = name == "keep"
    dtype = torch.bool if is_mask else torch.int64
    fits = selection.dim() == 1 and (not is_mask or len(selection) == num_tokens)
    if selection.dtype != dtype or not fits or selection.device != device:
        shape = f"[{num_tokens}]" if is_mask else "[K]"
        raise ValueError(
            f"{caller}: {name} must be {dtype} {shape} on {device}; got {_describe(selection)}."
        )
    if not is_mask and selection.numel() and looks_at_values(selection):
        ordered = selection.sort().values
        if ordered[0] < 0 or ordered[-1] >= num_tokens or (ordered.diff() == 0).any():
            raise ValueError(
                f"{caller}: rows must be distinct and in 0 to {num_tokens - 1}; got values from "
                f"{int(ordered[0])} to {int(ordered[-1])}, "
                f"{int((ordered.diff() == 0).sum())} of them repeated."
            )


def _describe(tensor: Tensor) -> str:
    return (
        f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}, on {tensor.device}"
    )
