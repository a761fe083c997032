"""`dapo import` and `dapo export`: the same bytes come back, a training checkpoint comes out whole,
and what is damaged or not there is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
import transformers
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_hpc import cli
from dapo_hpc.config import dump
from dapo_hpc.learner import cpu
from dapo_hpc.learner.checkpoint import Checkpoints, Progress
from dapo_hpc.learner.checkpoint_state import sharded_state
from dapo_hpc.learner.convert import export_checkpoint, import_model
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Layout, connect, disconnect
from dapo_hpc.weights.source import SafetensorsSource
from tests.learner_parts import make_config, make_model
from tests.unit.learner.test_checkpoint import build, cut, disturb, flip_byte

CASES = [("qwen2", False), ("qwen2", True), ("qwen3", True), ("llama", False)]

pytestmark = pytest.mark.usefixtures("alone")


def tensors(directory: Path) -> dict[str, Tensor]:
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def same_bytes(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


def halve(directory: Path) -> None:
    """The model in bfloat16, as most are published."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_exporting_an_import_gives_the_same_bytes(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", family, tied=tied)
    if dtype == torch.bfloat16:
        halve(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    import_model(tmp_path / "model", tmp_path / "imported")
    done = export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    stored = tensors(tmp_path / "model")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert same_bytes(tensors(tmp_path / "exported"), stored)
    assert (done.num_tensors, done.num_bytes) == (
        len(stored),
        sum(t.nbytes for t in stored.values()),
    )
    copied = {path.name for path in (tmp_path / "exported").iterdir()}
    assert copied == {path.name for path in (tmp_path / "model").iterdir()}
    for name in copied - {"model.safetensors"}:
        assert (tmp_path / "exported" / name).read_text() == (tmp_path / "model" / name).read_text()


def test_one_changed_bit_is_noticed() -> None:
    """Negative control for the equality above: the sign of a zero."""
    stored = {"a": torch.zeros(3)}
    assert torch.equal(stored["a"], -stored["a"])
    assert not same_bytes(stored, {"a": -stored["a"]})
    assert not same_bytes(stored, {"a": stored["a"].bfloat16()})


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_learner_of_an_import_and_transformers_of_an_export_agree(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """Megatron's own loader reads the import; transformers reads what is exported from it."""
    model = make_model(tmp_path / "model", family, tied=tied)
    import_model(tmp_path / "model", tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", attn_implementation="eager"
    )
    tokens = torch.arange(3, 30)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    policy = Policy(
        tmp_path / "imported", connect(Layout(), 0, None), dtype=torch.float32, temperature=1.0
    )
    load_by_megatron(policy, tmp_path / "imported")
    found = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    policy.load(SafetensorsSource(tmp_path / "model"))
    expected = dict(policy.module.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def load_by_megatron(policy: Policy, checkpoint: Path) -> None:
    for parameter in policy.module.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with cpu.cuda_calls_on_cpu():
        state = dist_checkpointing.load({"model": sharded_state(policy.module)}, str(checkpoint))
        policy.module.load_state_dict(state["model"])


def test_a_type_can_be_chosen(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    import_model(tmp_path / "model", tmp_path / "imported", dtype=torch.bfloat16)
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    found, expected = tensors(tmp_path / "exported"), model.state_dict()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in found)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["dtype"] == "bfloat16", "transformers would round or widen what it loads"


def test_a_mixture_of_types_needs_a_choice(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    stored = tensors(tmp_path / "model")
    stored["model.norm.weight"] = stored["model.norm.weight"].bfloat16()
    save_file(stored, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"several types \(BF16, F32\).*--dtype"):
        import_model(tmp_path / "model", tmp_path / "imported")
    import_model(tmp_path / "model", tmp_path / "imported", dtype=torch.float32)


# ------------------------------------------------------------------ from training


def train_and_save(root: Path, steps: tuple[int, ...], *, sft: bool = False) -> dict[str, Tensor]:
    """A run directory with checkpoints of these steps; the weights of the last one."""
    make_model(root / "model", "qwen3", tied=True)
    config = make_config(root / "model", root)
    config.run_dir.mkdir()
    (config.run_dir / "config.toml").write_text(dump(config))
    policy, optimizer = build(root / "model", connect(Layout(), 0, None))
    directory = config.run_dir / "checkpoints"
    checkpoints = Checkpoints(directory / "sft" if sft else directory, policy.processes, keep=3)
    for step in steps:
        disturb(policy, optimizer, step)
        checkpoints.save(policy, optimizer, Progress(step=step))
    exported = {name: tensor.clone() for name, tensor in policy.export()}
    disconnect()
    return exported


@pytest.mark.parametrize("sft", [False, True], ids=["train", "sft"])
def test_the_newest_checkpoint_of_a_run_is_exported(sft: bool, tmp_path: Path) -> None:
    expected = train_and_save(tmp_path, (1, 2), sft=sft)
    export_checkpoint(tmp_path / "run", tmp_path / "newest")
    assert same_bytes(tensors(tmp_path / "newest"), expected)
    export_checkpoint(tmp_path / "run", tmp_path / "first", step=1)
    assert not same_bytes(tensors(tmp_path / "first"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "newest")
    assert same_bytes({n: t for n, t in model.state_dict().items() if n in expected}, expected)


def test_a_checkpoint_alone_needs_to_be_told_its_model(tmp_path: Path) -> None:
    expected = train_and_save(tmp_path, (1,))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    export_checkpoint(checkpoint, tmp_path / "inside")
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    with pytest.raises(ValueError, match="lies in no run directory.*--model DIR"):
        export_checkpoint(moved, tmp_path / "outside")
    export_checkpoint(moved, tmp_path / "outside", model=tmp_path / "model")
    for name in ("inside", "outside"):
        assert same_bytes(tensors(tmp_path / name), expected)


@pytest.mark.parametrize("damage", [flip_byte, cut, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "files.json"])
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    train_and_save(tmp_path, (1, 2))
    damage(tmp_path / "run" / "checkpoints" / "step_000002" / name)
    with pytest.raises(ValueError, match=r"step_000002 is damaged.*--step"):
        export_checkpoint(tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    export_checkpoint(tmp_path / "run", tmp_path / "exported", step=1)


@pytest.mark.parametrize(
    ("family", "tied", "sentence"),
    [
        ("qwen3", False, "holds no output_layer.weight; the checkpoint is of another model"),
        ("qwen2", True, r"linear_qkv\.weight is \[2, 128, 32\].*json makes it \[2, 64, 32\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    family: str, tied: bool, sentence: str, tmp_path: Path
) -> None:
    train_and_save(tmp_path, (1,))
    make_model(tmp_path / "other", family, tied=tied)
    with pytest.raises(ValueError, match=sentence):
        export_checkpoint(tmp_path / "run", tmp_path / "exported", model=tmp_path / "other")


# ------------------------------------------------------------------ the command line


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model", "llama")
    model, imported, exported = (str(tmp_path / n) for n in ("model", "imported", "exported"))
    assert cli.main(["import", model, imported, "--dtype", "bfloat16"]) == 0
    assert cli.main(["export", imported, exported]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"21 tensors, 0.00 GiB of bfloat16: {imported}",
        f"21 tensors, 0.00 GiB of bfloat16: {exported}",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "imported", "model"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["import", "model", "model"], "model exists already. Name another directory"),
        (["import", "nothing", "out"], "nothing holds no config.json"),
        (["import", "refused", "out"], "the learner does not compute it: mlp_bias is True"),
        (["export", "nothing", "out"], "neither a run directory (it holds no config.toml)"),
        (["export", "imported", "out", "--step", "3"], "--step chooses among the checkpoints"),
        (["export", "run", "out"], "checkpoints holds no checkpoint yet"),
        (["export", "run", "out", "--step", "7"], "no checkpoint of step 7; it holds those of"),
    ],
)
def test_what_is_not_there_is_told_and_nothing_is_written(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", "llama")
    config = make_model(tmp_path / "refused", "llama").config
    config.mlp_bias = True
    config.save_pretrained(tmp_path / "refused")
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / ".metadata").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").touch()
    if "7" in words:
        (tmp_path / "run" / "checkpoints" / "step_000002").mkdir()
    assert cli.main(words) == cli.BAD_INPUT
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
