"""What needs a real GPU: a tensor of more than 2^31 elements, and the memory checker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_backends import gpu_only
from kernel_draws import draw_logits
from logprob_truth import check

from dapo_kernels import logprob

ROWS, COLUMNS = 15_000, 151_936


@gpu_only
@pytest.mark.slow
def test_trap_08_more_than_2_to_the_31_logits(device: str) -> None:
    """2.3e9 bfloat16 logits, gradient in place; rows around the limit against numpy."""
    needed = 3 * 2 * ROWS * COLUMNS
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")
    assert ROWS * COLUMNS > 2**31
    limit = 2**31 // COLUMNS
    places = torch.tensor([0, 1, limit - 1, limit, limit + 1, ROWS - 1])
    few = draw_logits(len(places), COLUMNS, dtype=torch.bfloat16)
    logits = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    logits[places.to(device)] = few.logits.to(device)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    upstream = torch.zeros(2, ROWS)
    ids[places], upstream[0, places] = few.token_ids, few.grad_logprobs
    upstream[1, places] = few.grad_entropy
    logits.requires_grad_()
    outputs = logprob(logits, ids.to(device), temperature=few.temperature)
    (gradient,) = torch.autograd.grad(outputs, logits, upstream.to(device).unbind())
    assert gradient.data_ptr() == logits.data_ptr()
    here = places.to(device)
    results = {
        "logprobs": outputs[0][here],
        "entropy": outputs[1][here],
        "grad_logits": gradient[here],
    }
    check(results, few.run_plain(device), few.truth())
    others = torch.ones(ROWS, dtype=torch.bool)
    others[places] = False
    uniform = torch.log(torch.tensor(float(COLUMNS)))
    torch.testing.assert_close(outputs[0].cpu()[others], -uniform.expand(len(others) - 6))
    assert not gradient[others.to(device).nonzero()[:, 0][:: ROWS // 100]].any()


SMALL_SHAPES = """
import torch
from dapo_kernels import dapo_loss, linear_dapo_loss, linear_logprob, logprob

for dtype in (torch.float32, torch.bfloat16):
    for tokens, columns in ((1, 5), (3, 4097), (130, 1187), (2, 20_000)):
        logits = torch.randn(tokens, columns, device="cuda", dtype=dtype).requires_grad_()
        ids = torch.randint(0, columns - 1, (tokens,), device="cuda")
        keep = torch.arange(tokens, device="cuda") % 3 != 1
        for odd in (0, 1):
            part = logits.clone()[:, odd:]
            valid = columns - 1
            outputs = logprob(part, ids, keep=keep, valid_vocab=valid)
            sum(output.sum() for output in outputs).backward()
        hidden = torch.randn(tokens, 16, device="cuda", dtype=dtype).requires_grad_()
        weight = torch.randn(columns, 16, device="cuda", dtype=dtype).requires_grad_()
        outputs = linear_logprob(hidden, weight, ids, chunk_tokens=64)
        sum(output.sum() for output in outputs).backward()
        per_token = [torch.randn(tokens, device="cuda") for _ in range(4)]
        clip = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
        linear_dapo_loss(hidden, weight, ids, *per_token, **clip)[0].backward()
        dapo_loss(*per_token, **clip)
torch.cuda.synchronize()
print("done")
"""


@gpu_only
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_memory_checker_finds_nothing(tool: str) -> None:
    """Reads and writes outside of tensors, and races within a program."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    result = subprocess.run(
        [*command, sys.executable, "-c", SMALL_SHAPES],
        cwd=Path(__file__).parents[2] / "kernels",
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "done" in result.stdout
