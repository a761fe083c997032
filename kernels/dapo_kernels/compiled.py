"""What the compiler makes of each kernel, ahead of time and without a GPU.

    python -m dapo_kernels.compiled sm_90        # registers, spills, loads; needs Triton alone

One variant for each way the launchers in `triton_ops` call a kernel in production.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dapo_kernels import triton_kernels as kernels
from dapo_kernels import triton_ops as launch

ALIGNED = ":16"
"""Suffix of a type: a pointer or number that Triton may take for a multiple of 16."""
LOGITS = {"bf16": 8, "fp32": 4}
"""Dtype of logits, and how many are in 16 bytes."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with the types and constants of one kind of call."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    """A type such as "*bf16:16" or "i32"; anything else is a constant."""
    num_warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Of one compiled variant."""

    name: str
    target: str
    registers: int
    """Of one thread."""
    spilled_bytes: int
    """Of one thread, to local memory."""
    shared_bytes: int
    """Of one program."""
    wide_loads: int
    """Load instructions of 16 bytes a thread."""
    float64_instructions: int
    loop_instructions_per_logit: float | None
    """Machine instructions of the loop over whole blocks of a row, for each logit of a thread; the
    row kernels' limit beside memory. None for kernels without such a loop."""


def row_variants() -> Iterator[Variant]:
    """Statistics and gradient, of logits that are given (logprob) and of chunks (linear_*)."""
    for dtype, vector in LOGITS.items():
        unroll = launch.LOGITS_PER_LANE // vector
        shape: dict[str, Any] = {"LANES": launch.LANES, "VECTOR": vector, "UNROLL": unroll}
        shape |= {"vocab_start": "i32", "num_valid": "i32", "inverse_temperature": "fp32"}
        shape |= {"num_columns": "i32:16", "row_stride": "i32:16", "token_ids": "*i64:16"}
        shape |= {"num_splits": "i32", "split_columns": "i32:16", "logits": f"*{dtype}:16"}
        for keep in (None, "*i1:16"):
            name = f"{dtype}{'_keep' if keep else ''}"
            yield Variant(
                f"statistics_{name}",
                kernels.statistics_kernel,
                {**shape, "keep": keep, "out": "*fp32:16", "out_split_stride": "i32:16"},
                launch.ROW_WARPS,
            )
        results = {"logprobs": "*fp32:16", "entropy": "*fp32:16", "normalizer": "*fp32:16"}
        results |= {"grad_logprobs": "*fp32:16", "out_row_stride": "i32:16"}
        for out in sorted({dtype, "bf16"}):
            for grad_entropy in (None, "*fp32:16"):
                name = f"{dtype}_to_{out}{'_entropy' if grad_entropy else ''}"
                yield Variant(
                    f"gradient_{name}",
                    kernels.gradient_kernel,
                    {
                        **shape,
                        **results,
                        "keep": None,
                        "out": f"*{out}:16",
                        "grad_entropy": grad_entropy,
                    },
                    launch.ROW_WARPS,
                )


def token_variants() -> Iterator[Variant]:
    """Combination of statistics, and the loss with nothing and with everything that is optional."""
    yield Variant(
        "combine",
        kernels.combine_kernel,
        {
            "statistics": "*fp32:16",
            "part_stride": "i32:16",
            "logprobs": "*fp32:16",
            "entropy": "*fp32:16",
            "normalizer": "*fp32:16",
            "num_rows": "i32",
            "num_parts": "i32",
            "inverse_temperature": "fp32",
            "ROWS": launch.ROWS_PER_PROGRAM,
        },
        launch.COMBINE_WARPS,
    )
    optional = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")
    always = (
        "logprobs",
        "advantages",
        "token_weights",
        "slope",
        "partials",
        "total_loss",
        "figures",
    )
    numbers = ("clip_low", "clip_high", "dual_clip", "importance_cap", "kl_coef")
    for name, pointer in (("least", None), ("most", "*fp32:16")):
        yield Variant(
            f"loss_{name}",
            kernels.loss_kernel,
            {
                **dict.fromkeys(always, "*fp32:16"),
                **dict.fromkeys(optional, pointer),
                **dict.fromkeys(numbers, "fp32"),
                "num_done": "*i32:16",
                "num_tokens": "i32",
                "TOKENS": launch.TOKENS_PER_PROGRAM,
                "MAX_PROGRAMS": launch.MAX_LOSS_PROGRAMS,
            },
            launch.LOSS_WARPS,
        )


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile for `target`, such as sm_90, and look at what came out."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(variant.kernel.arg_names):
        value = variant.arguments[name]
        if isinstance(value, str):
            signature[name], aligned, _ = value.partition(ALIGNED)
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(place,)] = value
    built = triton.compile(
        ASTSource(variant.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={"num_warps": variant.num_warps},
    )
    ptx = str(built.asm["ptx"])
    usage = _resource_usage(built.asm["cubin"])
    return Resources(
        name=variant.name,
        target=target,
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=int(built.metadata.shared),
        wide_loads=len(re.findall(r"ld\.global\.\S*v4\.b32", ptx)),
        float64_instructions=len(re.findall(r"\.f64", ptx)),
        loop_instructions_per_logit=_loop_instructions(built.asm["cubin"]),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED of the one function in it."""
    text = _nvidia_tool("cuobjdump", "-res-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


def _loop_instructions(cubin: bytes) -> float | None:
    """Of the shortest loop with loads of 16 bytes, for each of a thread's logits."""
    blocks = re.split(r"^(\.L_x_\d+):$", _nvidia_tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    loops = [
        len(re.findall(r"/\*[0-9a-f]{4}\*/", block))
        for label, block in zip(blocks[1::2], blocks[2::2], strict=True)
        if "LDG.E.128" in block and re.search(rf"BRA.*{re.escape(label)}\)", block)
    ]
    return round(min(loops) / launch.LOGITS_PER_LANE, 1) if loops else None


def _nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    """What one of the tools in Triton's package prints."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [str(tool), option, file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def main(targets: list[str]) -> int:
    """One JSON line for each variant and target."""
    for target in targets or ["sm_90"]:
        for variant in (*row_variants(), *token_variants()):
            print(json.dumps(asdict(compile_variant(variant, target))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
