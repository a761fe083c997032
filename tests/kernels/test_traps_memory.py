"""Traps of memory, launches and imports: addresses, strides, grids, synchronisation, sources."""

from __future__ import annotations

import ast
import dis
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from kernel_backends import DEVICE, IS_INTERPRETED, gpu_only, not_interpreted, torch_alone
from kernel_draws import (
    DapoInputs,
    LogitsInputs,
    draw_dapo,
    draw_linear,
    draw_logits,
    draw_tokens,
    stats_of,
)
from logprob_truth import array, check, stored
from loss_truth import loss_truth
from torch import Tensor

import dapo_kernels
from dapo_kernels import checks, dapo_loss, linear_logprob, logprob
from dapo_kernels.vocab import VocabShard

SOURCES = sorted(Path(dapo_kernels.__file__).parent.glob("*.py"))
FLOATS = [torch.float32, torch.bfloat16]

# ------------------------------------------------------------------ 8: offsets of 32 bits

STRIDE = 2**30 + 64
"""Elements from one row to the next: fits into 32 bits, and twice as many do not."""
WRAPPED = 2 * STRIDE - 2**32
"""Where the third row would be for somebody who multiplies in 32 bits."""
MAP_NORESERVE = 0x4000


def rows_far_apart(values: Tensor) -> tuple[Tensor, Tensor]:
    """Three rows in 9 GB of addresses of which a few pages are ever touched.

    And the place where the third lies for somebody who counts in 32 bits: also ours, so that the
    mistake is seen and not the end of the process.
    """
    columns = values.shape[1]
    size = 2 * (2 * STRIDE - WRAPPED + columns)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.bfloat16)
    except OSError as error:
        pytest.skip(f"this machine hands out no untouched memory: {error}")
    logits = memory.as_strided((3, columns), (STRIDE, 1), storage_offset=-WRAPPED)
    logits.copy_(values)
    return logits, memory[:columns][None]


@pytest.mark.skipif(DEVICE != "cpu", reason="of host memory; test_gpu has a real one")
def test_trap_08_rows_beyond_2_to_the_31() -> None:
    inputs = draw_logits(3, 100, dtype=torch.bfloat16)
    inputs.grad_logprobs += 1.0  # none is 0: no row is left out
    logits, mistaken = rows_far_apart(inputs.logits)
    logits.requires_grad_()
    outputs = logprob(logits, inputs.token_ids, temperature=inputs.temperature)
    (gradient,) = torch.autograd.grad(outputs, logits, (inputs.grad_logprobs, inputs.grad_entropy))
    results = {"logprobs": outputs[0], "entropy": outputs[1], "grad_logits": gradient}
    truth = inputs.truth()
    check(results, None, truth)
    assert gradient.data_ptr() == logits.data_ptr()
    assert (mistaken == 0).all()

    wrapped = torch.cat((inputs.logits[:2], mistaken))
    wrong, _ = logprob(wrapped, inputs.token_ids, temperature=inputs.temperature)
    with pytest.raises(AssertionError, match=r"logprobs\[2\]"):
        check({"logprobs": wrong}, None, {"logprobs": truth["logprobs"]})


# ------------------------------------------------------------------ 9: 65,535 programs


@not_interpreted
def test_trap_09_more_rows_than_a_grid_has_on_its_other_axes(device: str) -> None:
    inputs = draw_logits(70_000, 5, dtype=torch.bfloat16)
    results = inputs.run(device)
    check(results, None, inputs.truth())
    wrong = {"logprobs": results["logprobs"].clone()}
    wrong["logprobs"][65_535:] = 0.0
    with pytest.raises(AssertionError, match=r"logprobs\[65"):
        check(wrong, None, {"logprobs": inputs.truth()["logprobs"]})


@pytest.mark.parametrize("num_tokens", [65_536, 70_001])
def test_trap_09_more_tokens_than_that(device: str, num_tokens: int) -> None:
    """More than the programs of one launch take in one go, too."""
    logprobs = -torch.rand(num_tokens, generator=torch.Generator().manual_seed(0)) * 5
    tokens = draw_tokens(logprobs.double().numpy())
    rule = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.05}
    leaf = logprobs.to(device).requires_grad_()
    loss, stats = dapo_loss(leaf, **{k: v.to(device) for k, v in tokens.items()}, **rule)
    loss.backward()
    columns = {name: array(value) for name, value in tokens.items()}
    truth = loss_truth(array(logprobs), **columns, **rule)
    results = {"loss": loss, "grad": leaf.grad}
    check(results, None, {"loss": truth.loss, "grad": truth.slope})
    check(stats_of(stats, truth.statistics), None, truth.statistics)


# ------------------------------------------------------------------ 13, 17, 29: how tensors lie


@pytest.mark.parametrize("lie", ["unaligned", "every-second"])
def test_trap_13_ids_and_columns_that_are_views(device: str, lie: str) -> None:
    """8 bytes from a multiple of 16, or not side by side: the values count, not where they lie."""

    def view(values: Tensor) -> Tensor:
        if lie == "unaligned":
            return torch.cat((values[:1], values)).to(device)[1:]
        return torch.stack((values, values.flip(0)), dim=1).to(device)[:, 0]

    inputs = draw_logits(6, 40)
    inputs.keep = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    leaf = inputs.logits.to(device, copy=True).requires_grad_()
    outputs = logprob(leaf.clone(), view(inputs.token_ids), temperature=0.7, keep=view(inputs.keep))
    torch.autograd.backward(outputs, (view(inputs.grad_logprobs), view(inputs.grad_entropy)))
    results = {"logprobs": outputs[0], "entropy": outputs[1], "grad_logits": leaf.grad}
    check(results, None, inputs.truth())

    dapo = draw_dapo(draw_linear(6, 8, 20))
    hidden, weight = dapo.linear.leaves(device)
    loss, _ = dapo_kernels.linear_dapo_loss(
        hidden,
        weight,
        view(dapo.linear.token_ids),
        **{name: view(value) for name, value in dapo.tokens.items()},
        **dapo.rule,
        temperature=0.7,
        rows=view(torch.arange(6)),
    )
    loss.backward()
    fused = {"loss": loss, "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    check(fused, None, dapo.truth()[0])


@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="transposed"),
        pytest.param(lambda x: torch.stack((x, x), 2)[..., 0], id="every-second-column"),
        pytest.param(lambda x: x[:, :1].expand(-1, 40), id="one-column-repeated"),
        pytest.param(lambda x: x.view(3, 2, 40), id="sequence-batch-vocabulary"),
    ],
)
def test_trap_17_columns_that_are_not_adjacent_are_refused(
    device: str, turn: Callable[[Tensor], Tensor]
) -> None:
    logits, ids = torch.randn(6, 40, device=device), torch.arange(6, device=device)
    logprob(logits, ids)
    with pytest.raises(ValueError, match=r"adjacent columns; got .* strides \[.*\.contiguous\(\)"):
        logprob(turn(logits), ids)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("first", [1, 2, 8], ids=str)
def test_trap_29_rows_that_start_anywhere(device: str, first: int, dtype: torch.dtype) -> None:
    """Also where loads of 16 bytes are not allowed."""
    inputs = draw_logits(5, 4100, dtype=dtype)
    wide = torch.zeros(5, 4100 + first, dtype=dtype, device=device)
    wide[:, first:] = inputs.logits.to(device)
    leaf = wide.requires_grad_()
    outputs = logprob(leaf.clone()[:, first:], inputs.token_ids.to(device), temperature=0.7)
    upstream = (inputs.grad_logprobs.to(device), inputs.grad_entropy.to(device))
    torch.autograd.backward(outputs, upstream)
    assert leaf.grad is not None
    gradient = leaf.grad[:, first:]
    results = {"logprobs": outputs[0], "entropy": outputs[1], "grad_logits": gradient}
    check(results, None, inputs.truth())
    assert (leaf.grad[:, :first] == 0).all()


@pytest.mark.parametrize("columns", [40, 4104], ids=str)
def test_trap_29_narrowed_gradient_lies_over_its_logits(
    device: str, ops: Any, columns: int
) -> None:
    """float32 logits of a bfloat16 model, somewhere in a larger tensor: the rest stays."""
    inputs = draw_logits(4, columns)
    inputs.grad_entropy.zero_()
    memory = torch.full((6, columns + 16), 7.0, device=device)
    logits = memory[1:5, 8 : columns + 8]
    logits.copy_(inputs.logits)
    ids, scale = inputs.token_ids.to(device), 1 / inputs.temperature
    shard = VocabShard(start=0, num_columns=columns, num_valid=columns, group=None)
    statistics = torch.empty(1, 4, 4, device=device)
    ops.write_statistics(statistics, logits, ids, shard, scale)
    gradient = ops.write_gradient(
        logits,
        ids,
        shard,
        scale,
        ops.combine(statistics, scale),
        inputs.grad_logprobs.to(device),
        None,
        torch.bfloat16,
    )
    assert gradient.dtype == torch.bfloat16
    if gradient.data_ptr() == logits.data_ptr():  # else it lies elsewhere
        assert all(gradient[row].data_ptr() == logits[row].data_ptr() for row in range(4))
    truth = inputs.truth()["grad_logits"]
    check({"grad": gradient}, None, {"grad": stored(truth, torch.bfloat16)})
    assert (memory[[0, 5]] == 7.0).all()
    assert (memory[:, :8] == 7.0).all()
    assert (memory[:, columns + 8 :] == 7.0).all()


# ------------------------------------------------------------------ 20: the host waits for nothing


def everything(device: str, logits: LogitsInputs, dapo: DapoInputs) -> list[Tensor]:
    """All four functions with their backward; what comes out is still on the device."""
    hidden, weight = dapo.linear.leaves(device)
    leaf, ids = logits.logits.to(device).requires_grad_(), logits.token_ids.to(device)
    tokens, keep = dapo.tokens_on(device), torch.ones(4, dtype=torch.bool, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        logprobs, entropy = logprob(leaf, ids, keep=keep, inplace_backward=False)
        loss, stats = dapo_loss(logprobs, **tokens, **dapo.rule, entropy=entropy.detach())
        (loss + entropy.sum()).backward()
        linear_logprob(hidden, weight, ids, rows=ids[:0])[0].sum().backward()
        fused, more = dapo_kernels.linear_dapo_loss(hidden, weight, ids, **tokens, **dapo.rule)
        fused.backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [loss, fused, stats.tokens, more.ratio_max_diff]


@torch_alone
def test_trap_20_nothing_is_moved_to_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU values are checked; without that nobody looks at one."""

    def refuse(*_: Any) -> None:
        raise AssertionError("moved a value to the host")

    inputs = draw_logits(4, 30), draw_dapo(draw_linear(4, 8, 30))
    if device == "cpu":
        monkeypatch.setattr(checks, "looks_at_values", lambda _: False)
    with monkeypatch.context() as refusing:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            refusing.setattr(Tensor, name, refuse)
        results = everything(device, *inputs)
        with pytest.raises(AssertionError, match="host"):
            float(results[0])
    assert all(torch.isfinite(result) for result in results)


@gpu_only
def test_trap_20_debug_mode_does_look(device: str) -> None:
    """Negative control of the one above."""
    with dapo_kernels.checked_values(), pytest.raises(RuntimeError, match="synchroniz"):
        everything(device, draw_logits(4, 30), draw_dapo(draw_linear(4, 8, 30)))


# ------------------------------------------------------------------ 25: tied weights


def test_trap_25_one_parameter_as_embedding_and_output(device: str) -> None:
    """Its gradient is the sum of both parts; the weight is an argument, no module is called."""
    linear, ids = draw_linear(9, 8, 20), torch.arange(9) * 2
    linear.hidden = linear.weight[ids]
    inputs = draw_dapo(linear)
    table = linear.weight.to(device, copy=True).requires_grad_()
    truth, _ = inputs.truth()
    loss, _ = dapo_kernels.linear_dapo_loss(
        torch.nn.functional.embedding(ids.to(device), table),
        table,
        inputs.linear.token_ids.to(device),
        **inputs.tokens_on(device),
        **inputs.rule,
        **inputs.linear.options(device),
    )
    loss.backward()
    expected = truth["grad_weight"]
    expected.value[ids] += truth["grad_hidden"].value
    expected.allowed[ids] += truth["grad_hidden"].allowed
    assert table.grad is not None
    check({"grad_weight": table.grad}, None, {"grad_weight": expected})


# ------------------------------------------------------------------ 26: import


def run_python(code: str, **environment: str) -> str:
    """What it prints; its own process, with the kernels and nothing else of ours on its path."""
    path = str(Path(dapo_kernels.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


USE = """
import sys
{before}
import torch, dapo_kernels
logprobs, _ = dapo_kernels.logprob(torch.zeros(2, 4), torch.tensor([0, 3]))
assert not torch.cuda.is_initialized()
print(f"{{float(logprobs.exp().sum()):.3f}}", "triton" in sys.modules and sys.modules["triton"])
"""


@torch_alone
def test_trap_26_import_needs_neither_gpu_nor_triton() -> None:
    """Nor does the CPU path."""
    code = USE.format(before="sys.modules['triton'] = None")
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == "0.500 None"


# ------------------------------------------------------------------ 11, 12, 27, 28: sources


def words_in(pattern: str, sources: list[Path] = SOURCES) -> list[str]:
    """Where code, comments and docstrings left out, has a name that matches."""
    found = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = (getattr(node, key, None) for key in ("id", "attr", "arg", "name"))
            found += [source.name for name in names if name and re.search(pattern, str(name))]
    return found


@torch_alone
@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        pytest.param("autotune", "a trial run of an in-place kernel destroys its input", id="11"),
        pytest.param("descriptor|set_allocator", "autograd's threads have no allocator", id="27"),
        pytest.param("warp_specialize", "wrong results and crashes on sm_90", id="28"),
    ],
)
def test_traps_11_27_28_are_not_used(pattern: str, why: str) -> None:
    assert not words_in(pattern), why
    assert words_in("program_id"), "found nothing in the sources at all"


def plain_numbers_read(function: FunctionType) -> list[str]:
    """Globals a kernel reads that newer Triton refuses: they must be constexpr."""
    names = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return [name for name, value in values.items() if isinstance(value, (int, float, str, tuple))]


_A_PLAIN_NUMBER = 2.0


def _wrong_kernel(x: float) -> float:
    return x * _A_PLAIN_NUMBER


def test_trap_12_kernels_read_no_plain_global() -> None:
    if DEVICE == "cpu" and not IS_INTERPRETED:
        pytest.importorskip("triton", reason="Triton is not installed")
    from dapo_kernels import triton_kernels

    kernels = [value.fn for value in vars(triton_kernels).values() if hasattr(value, "fn")]
    assert len(kernels) > 4
    assert [name for kernel in kernels for name in plain_numbers_read(kernel)] == []
    assert plain_numbers_read(_wrong_kernel) == ["_A_PLAIN_NUMBER"]
