"""What the figures depend on: the machine, the versions, the commit, the clocks."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from . import ROOT

CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
NAMES = ("sm_mhz", "memory_mhz", "temperature_c", "power_w", "slowed_by")
REASONS = "clocks_event_reasons.active"
"""A bit mask; 0 is none. Drivers before 535 do not know the field."""


def describe(device: torch.device, known_commit: str | None = None) -> dict[str, Any]:
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": known_commit or commit(),
        "device": device.type,
        "cpu": f"{_cpu()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
    }
    return {**found, **_gpu(device)} if device.type == "cuda" else found


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": total >> 20,
        "in_use_before_mib": (total - free - torch.cuda.memory_reserved(device)) >> 20,
        "driver": (_nvidia_smi("driver_version") or ["unknown"])[0],
        "cuda": torch.version.cuda,
    }


def clocks() -> dict[str, str]:
    """As nvidia-smi sees them now; empty without one."""
    values = _nvidia_smi(f"{CLOCKS},{REASONS}") or _nvidia_smi(CLOCKS)
    return dict(zip(NAMES, values, strict=False))


def _nvidia_smi(fields: str) -> list[str]:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [word.strip() for word in done.stdout.strip().splitlines()[0].split(",")]


def commit() -> str:
    """Short hash, marked where the tree has changes; `unknown` without git."""
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}{'-dirty' if _git('status', '--porcelain') else ''}" if head else "unknown"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    return triton.__version__


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
