"""Finding the peers' code: installed, or in a folder that setup_kernel_peers.sh made.

    FOLDER/site/    packages that import as they are
    FOLDER/files/   trees of which single files are loaded by path, because their package would
                    import half the world

Nothing of a peer is part of this repository.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import site
import sys
import types
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from . import ROOT
from .task import Absent

DEFAULT_FOLDER = ROOT / ".venv-kernel-peers"
DISTRIBUTIONS = {
    "Liger": "liger-kernel",
    "TRL": "trl",
    "verl": "verl",
    "Megatron": "megatron-core",
    "flash-attn": "flash-attn",
    "CCE": "cut-cross-entropy",
    "QuACK": "quack-kernels",
}

_folders: list[Path] = []


def use_folder(folder: Path | None) -> None:
    """Search there before what is installed. None: the default folder, if it is there."""
    folder = DEFAULT_FOLDER if folder is None else folder
    if folder.is_dir():
        files, packages = folder.resolve() / "files", folder.resolve() / "site"
        _folders[:] = [files, packages]
        sys.path.insert(0, str(packages))
        site.addsitedir(str(packages))  # for the .pth files of the CuTe DSL
        importlib.invalidate_caches()


def versions() -> dict[str, str]:
    """Peer to version, or why it is not there."""
    return {peer: _version(name) for peer, name in DISTRIBUTIONS.items()}


def _version(distribution: str) -> str:
    places = [str(folder) for folder in _folders]
    for found in metadata.distributions(name=distribution, path=[*places, *sys.path]):
        return found.version
    return f"absent: {distribution} is neither installed nor in the folder of the peers"


def runs_triton() -> bool:
    """On a GPU, or with CPU tensors under Triton's interpreter."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def need_triton() -> None:
    if not runs_triton():
        raise Absent("needs a GPU, or TRITON_INTERPRET=1")


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Absent("needs a GPU")


def module(name: str) -> ModuleType:
    """A peer's module, imported as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else the peer would like to find
            return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot import {name}: {error}") from error


def _find(path: str) -> Path:
    for place in [*_folders, *map(Path, sys.path)]:
        if (place / path).is_file():
            return place / path
    raise Absent(f"no {path} in the folder of the peers or on the import path")


def _load(name: str, path: str) -> ModuleType:
    """The file as module `name`, its packages being empty stubs."""
    if name in sys.modules:
        return sys.modules[name]
    file = _find(path)
    stub_packages(name.rpartition(".")[0], file.parent)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, f"{file} is no Python source"
    assert spec.loader is not None, f"{file} is no Python source"
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except ImportError as error:
        del sys.modules[name]
        raise Absent(f"cannot import {path}: {error}") from error
    return loaded


def stub_packages(name: str, folder: Path) -> None:
    """Empty packages for `name` and all above it; the last one finds its modules in `folder`."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            stub = types.ModuleType(package)
            stub.__path__ = []
            stub.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
            sys.modules[package] = stub
    sys.modules[name].__path__ = [str(folder)]


# ------------------------------------------------------------------ files loaded by path

# Under a name of their own: other libraries look for `trl` and `flash_attn` and believe them whole.


@functools.cache
def trl_logprob_entropy() -> ModuleType:
    need_triton()
    return _load("_peer_trl.kernels.logprob_entropy", "trl/kernels/logprob_entropy.py")


@functools.cache
def trl_chunked_logprob() -> ModuleType:
    loaded = _load("_peer_trl.kernels.chunked_logprob", "trl/kernels/chunked_logprob.py")
    # What its backward asks of TRL's trainer: a context that gathers ZeRO-3 shards.
    utils = types.ModuleType("_peer_trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
    stub_packages("_peer_trl.trainer", Path())
    sys.modules[utils.__name__] = utils
    return loaded


@functools.cache
def flash_attn_cross_entropy() -> ModuleType:
    need_gpu()
    return _load(
        "_peer_flash_attn.ops.triton.cross_entropy", "flash_attn/ops/triton/cross_entropy.py"
    )


@functools.cache
def verl_linear_cross_entropy() -> ModuleType:
    need_gpu()
    if "verl" not in sys.modules:
        _stub_verl_device()
    return _load(
        "verl.utils.kernel.linear_cross_entropy", "verl/utils/kernel/linear_cross_entropy.py"
    )


def _stub_verl_device() -> None:
    """The few functions that verl's kernels ask of `verl.utils.device`, which wants its plugins."""
    device = types.ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_name = lambda: "cuda"
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_torch_device = lambda: torch.cuda
    stub_packages("verl.utils", Path())
    sys.modules[device.__name__] = device


@functools.cache
def verl_torch_functional() -> ModuleType:
    return _load(
        "_peer_verl.utils.experimental.torch_functional",
        "verl/utils/experimental/torch_functional.py",
    )


@functools.cache
def one_rank_group(backend: str) -> dist.ProcessGroup:
    """A process group of this process alone, for peers that cannot do without one."""
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None, "init_process_group left no world group"
    return group
