"""A rank reads its own parts of a model and no others; a directory that is no model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_hpc.learner.meta_model import as_rank
from dapo_hpc.learner.model import Policy
from dapo_hpc.learner.parallel import Layout, Processes
from dapo_hpc.weights import names
from dapo_hpc.weights.directory import Spec, write_streaming
from dapo_hpc.weights.names import ModelShape
from dapo_hpc.weights.source import RandomSource, SafetensorsSource
from tests.learner_parts import VOCAB, make_model

FLOAT32_BYTES = 4
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------ what a rank reads


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("family", "tied"), [("qwen2", False), ("qwen3", True)], ids=["biased", "tied"]
)
@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(1, 2), Layout(2, 2)], ids=str)
def test_every_rank_reads_its_own_bytes_and_no_others(
    layout: Layout, family: str, tied: bool, tmp_path: Path
) -> None:
    model = make_model(tmp_path, family, tied=tied)
    stored = load_file(tmp_path / "model.safetensors")
    total = 0
    for rank in range(layout.world):
        with as_rank(layout, rank) as meta:
            here = Processes(layout, rank, meta.store, torch.device("cpu"))
            policy = Policy(tmp_path, here, dtype=torch.float32, temperature=1.0)
            source = SafetensorsSource(tmp_path)
            policy.load(source)
            held = {name: p.detach() for name, p in policy.module.named_parameters()}
            padding = padding_numbers(held, here)
            numbers = sum(p.numel() for p in held.values()) - padding
            assert source.bytes_read == FLOAT32_BYTES * numbers
            check_parameters(held, policy, stored)
        total += source.bytes_read
    if layout.tensor == 1:
        copies = stored["model.embed_tokens.weight"].nbytes if tied and layout.pipeline > 1 else 0
        assert total == sum(t.nbytes for t in stored.values()) + copies
    else:
        whole = layout.tensor * sum(t.nbytes for t in stored.values())
        assert total < 0.6 * whole, "reading whole tensors on every rank would be twice as much"
    assert model.config.vocab_size == VOCAB


def padding_numbers(held: dict[str, Tensor], here: Processes) -> int:
    """Zeros on this rank that are in no file: 33 rows of vocabulary over two ranks are 17 each."""
    has_padding = here.layout.tensor == 2 and here.tensor_rank == 1
    tables = [held[name] for name in held if name.startswith(("embedding", "output_layer"))]
    return sum(t.shape[1] for t in tables) if has_padding else 0


def check_parameters(held: dict[str, Tensor], policy: Policy, stored: dict[str, Tensor]) -> None:
    """By hand for two kinds of matrices, whole heads of queries among them."""
    here, number = policy.processes, policy.first_layer
    prefix = f"model.layers.{number}."
    down = stored[f"{prefix}mlp.down_proj.weight"].chunk(here.layout.tensor, 1)[here.tensor_rank]
    assert torch.equal(held["decoder.layers.0.mlp.linear_fc2.weight"], down)
    query = stored[f"{prefix}self_attn.q_proj.weight"].chunk(2)  # one for each key-value head
    first_group = held["decoder.layers.0.self_attention.linear_qkv.weight"][: len(query[0])]
    assert torch.equal(first_group, query[here.tensor_rank])


def test_reading_whole_tensors_is_noticed(tmp_path: Path) -> None:
    """Negative control: the count grows by what is read, not by what is used."""
    make_model(tmp_path)
    source = SafetensorsSource(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    half = source.read(name, (slice(0, 32), slice(0, 24)))
    assert source.bytes_read == half.nbytes == 32 * 24 * FLOAT32_BYTES
    source.read(name)
    assert source.bytes_read == 3 * half.nbytes


def test_a_random_draw_is_the_same_in_every_layout(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)
    source, name = RandomSource(shape, 0.1, 3), "model.layers.1.mlp.up_proj.weight"
    whole = source.read(name)
    assert torch.equal(source.read(name, (slice(24, 48), slice(0, 32))), whole[24:])
    assert not torch.equal(RandomSource(shape, 0.1, 4).read(name), whole)
    assert RandomSource(shape, 0.1, 3).read("model.norm.weight").eq(1).all()


# ------------------------------------------------------------------ what is refused


def split(directory: Path) -> None:
    """The same model in several files with an index."""
    stored = load_file(directory / "model.safetensors")
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in stored.items()}
    write_streaming(directory.parent / "split", specs, iter(stored.items()), directory, 10_000)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def with_another(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            without("model.layers.1.mlp.up_proj.weight"),
            r"1 missing \(first: model\.layers\.1\.mlp\.up_proj\.weight\)\. Copy",
        ),
        (
            with_another("model.layers.2.mlp.up_proj.weight", torch.ones(2, 3)),
            r"1 not part of that model \(first: model\.layers\.2\.mlp\.up_proj\.weight \[2, 3\]\)",
        ),
        (
            with_another("model.norm.weight", torch.ones(31)),
            r"1 of another shape \(first: model\.norm\.weight \[31\] instead of \[32\]\)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_that_are_not_those_of_the_config_are_named(
    change: Callable[[dict[str, Tensor]], None], sentence: str, tmp_path: Path
) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)
    SafetensorsSource(tmp_path).check(shape)
    rewrite(tmp_path, change)
    source = SafetensorsSource(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        source.check(shape)
    assert source.bytes_read == 0


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.usefixtures("alone")
def test_the_learner_refuses_before_it_fills_anything(tmp_path: Path) -> None:
    make_model(tmp_path)
    rewrite(tmp_path, without("model.norm.weight"))
    with as_rank(Layout(), 0) as meta:
        here = Processes(Layout(), 0, meta.store, torch.device("cpu"))
        policy = Policy(tmp_path, here, dtype=torch.float32, temperature=1.0)
        source = SafetensorsSource(tmp_path)
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            policy.load(source)
        assert source.bytes_read == 0


def test_tied_models_may_repeat_the_embedding_but_not_contradict_it(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path, tied=True).config)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, with_another("lm_head.weight", embedding.clone()))
    SafetensorsSource(tmp_path).check(shape)
    rewrite(tmp_path, with_another("lm_head.weight", embedding + 1))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        SafetensorsSource(tmp_path).check(shape)


def test_buffers_of_old_files_are_passed_over(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path, "llama").config)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, with_another(name, torch.ones(4, dtype=torch.float64)))
    source = SafetensorsSource(tmp_path)
    source.check(shape)
    assert source.dtypes() == {"F32"}


@pytest.mark.parametrize("keep", [0, 4, 200, -1], ids=["empty", "length", "header", "last byte"])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    make_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off at \d+ bytes"):
        SafetensorsSource(tmp_path)


def test_an_index_and_its_files(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path / "one").config)
    split(tmp_path / "one")
    directory = tmp_path / "split"
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2
    one, many = SafetensorsSource(tmp_path / "one"), SafetensorsSource(directory)
    many.check(shape)
    assert all(torch.equal(one.read(n), many.read(n)) for n in names.hf_shapes(shape))
    # A file that the index does not name is none of the model's.
    (directory / "consolidated.safetensors").write_bytes(b"of another tool")
    SafetensorsSource(directory).check(shape)
    (directory / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"names {len(files)} files, 1 not there .*{files[1]}"):
        SafetensorsSource(directory)
    (directory / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json cannot be read \(KeyError"):
        SafetensorsSource(directory)


def test_a_directory_without_safetensors_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no safetensors files; expected a model"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin but no safetensors files"):
        SafetensorsSource(tmp_path)


def test_numbers_that_are_no_plain_floats_are_refused(tmp_path: Path) -> None:
    shape = ModelShape.of(make_model(tmp_path).config)
    rewrite(tmp_path, with_another("model.norm.weight", torch.ones(32, dtype=torch.int8)))
    source = SafetensorsSource(tmp_path)
    with pytest.raises(ValueError, match="norm.weight is of type I8; expected one of F32, BF16"):
        source.check(shape)
