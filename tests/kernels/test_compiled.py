"""What the compiler makes of each kernel, ahead of time: no GPU is needed.

Runs in processes of its own, because under Triton's interpreter nothing is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

Rows = dict[str, dict[str, Any]]

TARGETS = [
    "sm_90",
    pytest.param("sm_80", marks=pytest.mark.full),
    pytest.param("sm_100", marks=pytest.mark.full),
]


def run(code: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    words = [sys.executable, "-W", "ignore", *code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest) -> Rows:
    """Every variant, compiled for one architecture; registers are printed with `pytest -s`."""
    rows = [
        json.loads(line)
        for line in run(["-m", "dapo_kernels.compiled", request.param]).split("\n")
        if line
    ]
    for row in rows:
        print(f"{row['target']} {row['name']}: {row['registers']} registers", file=sys.stderr)
    return {row["name"]: row for row in rows}


def test_every_kernel_is_there(built: Rows) -> None:
    source = run(["-c", "import dapo_kernels.triton_kernels as k; print(open(k.__file__).read())"])
    kernels = set(re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE))
    assert kernels == {name.split("_")[0] for name in built}


def test_nothing_is_spilled(built: Rows) -> None:
    assert {name: row["spilled_bytes"] for name, row in built.items() if row["spilled_bytes"]} == {}


def test_trap_10_no_float64(built: Rows) -> None:
    """A Python float taken for a double makes a kernel many times slower."""
    assert [name for name, row in built.items() if row["float64_instructions"]] == []


def test_trap_29_rows_are_loaded_16_bytes_at_a_time(built: Rows) -> None:
    for name, row in built.items():
        if name.startswith(("statistics", "gradient")):
            # The loop over whole blocks, and the last block: every load of logits is wide.
            vector = 8 if "bf16" in name.split("_to_")[0] else 4
            assert row["wide_loads"] == 2 * 16 // vector, name


def test_enough_programs_fit_on_a_multiprocessor(built: Rows) -> None:
    """64 registers let four programs of 256 threads share the 65,536 of one."""
    for name, row in built.items():
        if name.startswith(("statistics", "gradient")):
            assert row["registers"] <= 64, name


WRONG = """
import dataclasses, json
from dapo_kernels import compiled
variants = {v.name: v for v in compiled.row_variants()}
changes = [
    ("statistics_bf16", 8, dict(row_stride="i32", num_columns="i32")),
    ("gradient_bf16_to_bf16", 8, dict(inverse_temperature="fp64")),
    ("statistics_bf16", 16, dict(LANES=512, UNROLL=16)),
]
for name, warps, change in changes:
    arguments = {**variants[name].arguments, **change}
    wrong = dataclasses.replace(variants[name], arguments=arguments, num_warps=warps)
    print(json.dumps(dataclasses.asdict(compiled.compile_variant(wrong, "sm_90"))))
"""


def test_the_assertions_above_can_fail() -> None:
    """The same kernel without hints of alignment, with a double, and with too much in flight."""
    unaligned, doubles, crowded = (json.loads(line) for line in run(["-c", WRONG]).splitlines())
    assert unaligned["wide_loads"] == 0
    assert doubles["float64_instructions"] > 0
    assert crowded["spilled_bytes"] > 0
