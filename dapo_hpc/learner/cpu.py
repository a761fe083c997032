"""Lets Megatron-Core, which is written for CUDA devices, run on a host without one.

Two pieces, both without effect where CUDA is available, so that learner code is the same file on
NCCL and on gloo:

* `install` rebinds the name `torch` inside the few Megatron modules that spell a CUDA device
  literally. torch itself is untouched; every other library sees it as it is.
* `cuda_calls_on_cpu` is a context in which `tensor.cuda()`, `device="cuda"` and the type names that
  Megatron compares against mean the CPU. It is entered where models, optimizers and checkpoints are
  built, never in the forward and backward passes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MEGATRON_MODULES = (
    "utils",
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.utils",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "distributed.param_and_grad_buffer",
    "transformer.utils",
    "models.common.embeddings.rotary_pos_embedding",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.exchange_utils",
)
"""Modules of megatron.core that name a CUDA device literally."""

FACTORIES = frozenset({"empty", "zeros", "ones", "tensor", "full", "arange"})
"""torch functions that those modules call with `device="cuda"`."""


def install() -> None:
    """Prepare Megatron for this host. Safe to repeat; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    proxy = _Torch()
    for name in MEGATRON_MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = proxy  # type: ignore[attr-defined]


def use_plain_random_state() -> None:
    """On a CPU host, let Megatron draw from torch's generator instead of CUDA's tracked ones.

    Recomputed layers draw what they drew before, so Megatron keeps the generators' states and goes
    back to them: here there is one generator. To be called after `initialize_model_parallel`. Sound
    because every dropout is 0, so nothing is drawn after the weights are initialised.
    """
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random

    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    random._get_all_rng_states = lambda: (torch.get_rng_state(), None, None)
    random._set_all_rng_states = lambda state, _cuda, _tracked: torch.set_rng_state(state)


def cuda_calls_on_cpu() -> AbstractContextManager[object]:
    """The context described at the top of this file."""
    return nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


class _Cuda:
    """`torch.cuda` as those modules see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, *_: Any) -> None:
        return None


class _Torch:
    """`torch` as those modules see it."""

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _on_cpu(value) if name in FACTORIES else value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        return factory(*args, **_without_cuda(kwargs))

    return create


def _without_cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    device = kwargs.get("device")
    is_cuda = device is not None and str(device).startswith("cuda")
    return {**kwargs, "device": "cpu"} if is_cuda else kwargs


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = _without_cuda(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)
