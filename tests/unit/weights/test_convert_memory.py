"""Neither direction of a conversion holds more than about a layer of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import transformers

from dapo_hpc.weights import names
from dapo_hpc.weights.directory import Spec, write_streaming
from dapo_hpc.weights.names import ModelShape
from dapo_hpc.weights.source import RandomSource

STATUS = Path("/proc/self/status")
MIB = 2**20
CONFIG = transformers.LlamaConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1024)
"""10 MiB; the model has 12 of them, and 8 MiB outside."""
OVERHEAD_BYTES = 12 * MIB
"""Python's own: twelve layers of Megatron modules for eight ranks, the index of the pieces."""

MEASURE = """
import sys, threading, time
from pathlib import Path
from safetensors.torch import load_file
from dapo_hpc.learner import convert

def held_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def everything(source, target):
    return [t.clone() for path in source.glob("*.safetensors") for t in load_file(path).values()]

what, source, target = sys.argv[1:]
verbs = {"import": convert.import_model, "export": convert.export_checkpoint, "all": everything}
peak, is_done, start = 0, False, held_bytes()

def watch():
    global peak
    while not is_done:
        peak = max(peak, held_bytes())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
kept = verbs[what](Path(source), Path(target))
is_done = True
thread.join()
print(peak - start)
"""


def peak_bytes(what: str, source: Path, target: Path) -> int:
    """Most anonymous memory of a process while it converts, beyond what it had before."""
    # Freed blocks go back at once, so that what is measured is what is held.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [sys.executable, "-c", MEASURE, what, str(source), str(target)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    CONFIG.save_pretrained(root / "config")
    shape = ModelShape.of(CONFIG)
    sizes, source = names.hf_shapes(shape), RandomSource(shape, 0.02, 0)
    specs = {name: Spec(size, torch.float32) for name, size in sizes.items()}
    tensors = ((name, source.read(name)) for name in sizes)
    write_streaming(root / "model", specs, tensors, root / "config", 2**30)
    return root / "model"


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc to see the memory of a process")
def test_conversion_holds_a_layer_and_not_the_model(model: Path, tmp_path: Path) -> None:
    limit = 2 * LAYER_BYTES + OVERHEAD_BYTES
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    found = {
        "import": peak_bytes("import", model, tmp_path / "imported"),
        "export": peak_bytes("export", tmp_path / "imported", tmp_path / "exported"),
        "all": peak_bytes("all", model, tmp_path),
    }
    print({what: f"{peak / MIB:.1f} MiB" for what, peak in found.items()})
    assert max(found["import"], found["export"]) < limit < total / 3
    assert found["all"] > 0.9 * total, "negative control: the whole model would be seen"
