"""Write anew what tests/golden compares with: `make golden`, then read the difference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from dapo_hpc.config import dump, load, parse
from dapo_hpc.launch.jobs import JobSpec, Origin, job_specs
from dapo_hpc.launch.sbatch import file_name, script_text
from dapo_hpc.launch.site import Site, load_site

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "config"
SCRIPTS = Path(__file__).parent / "sbatch"
SITES = Path(__file__).parent / "sites"
SHIPPED = ROOT / "slurm"
EXAMPLE = SHIPPED / "sites" / "example.toml"
EXAMPLE_CONFIG = ROOT / "configs" / "qwen2.5_32b_dapo.toml"
DEMO = ROOT / "configs" / "demo.toml"
LEAST = {
    "run": {"name": "least", "total_steps": 1},
    "model": {"path": "model"},
    "prompts": {"train": "train.parquet", "eval": "eval.parquet"},
}
"""What every config has to say; the rest is profile and defaults."""
CONFIGS = {
    "whole_nodes": {"learner": {"tensor_parallel": 8}, "hardware": {"gpus_per_node": 4}},
    "apptainer": {"learner": {"data_parallel": 4}, "rollout": {"num_actors": 6}},
    "successors": {
        "learner": {"tensor_parallel": 4, "data_parallel": 2},
        "rollout": {"num_actors": 3, "tensor_parallel": 2},
    },
    "processors": {"learner": {"data_parallel": 2}, "hardware": {"gpus_per_node": 0}},
}
"""Site to what its config says beyond LEAST: another layout for each."""
CONFIGS["whole_nodes"]["rollout"] = {"num_actors": 8}


def resolved() -> Iterator[tuple[str, str]]:
    """Name and text of every record: each shipped config, and each profile by itself."""
    for path in sorted((ROOT / "configs").glob("*.toml")):
        yield path.stem, dump(load(path))
    for profile in ("paper", "verl", "default"):
        yield f"profile_{profile}", dump(parse({**LEAST, "profile": profile}))


def scripts() -> Iterator[tuple[str, str]]:
    """File name and text of the batch scripts of each site in SITES, and of the mini cluster."""
    for path in (*sorted(SITES.glob("*.toml")), SHIPPED / "sites" / "mini.toml"):
        site = load_site(path)
        is_mini = path.parent != SITES
        config = load(DEMO) if is_mini else parse({**LEAST, **CONFIGS[path.stem]})
        run = Path(site.storage.runs or ROOT / "runs") / config.run.name
        origin = Origin(directory=ROOT, site=path)
        for spec in job_specs(config, site, run, origin):
            yield f"{path.stem}.{file_name(spec)}", script_text(spec)


def shipped_scripts() -> Iterator[tuple[str, str]]:
    """File name and text of the scripts in slurm/; those of the example site."""
    for spec in [*example_specs(load_site(EXAMPLE)), *_example_buffer()]:
        yield file_name(spec), script_text(spec)


def example_specs(site: Site) -> list[JobSpec]:
    config = load(EXAMPLE_CONFIG)
    origin = Origin(directory=ROOT, config=EXAMPLE_CONFIG, site=EXAMPLE)
    return job_specs(config, site, ROOT / config.run_dir, origin)


def _example_buffer() -> list[JobSpec]:
    specs = example_specs(example_with_buffer())
    return [spec for spec in specs if spec.kind == "buffer"]


def example_with_buffer() -> Site:
    """The example site after a user has taken the comment signs off its [buffer] table."""
    before, mark, after = EXAMPLE.read_text().partition("# [buffer]")
    assert mark, "the example site has a [buffer] table in comments"
    table, blank, rest = f"{mark}{after}".partition("\n\n")
    uncommented = "\n".join(line.removeprefix("# ") for line in table.splitlines())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "example.toml"
        path.write_text(before + uncommented + blank + rest)
        return load_site(path)


def _write_all(directory: Path, pattern: str, texts: dict[str, str]) -> None:
    directory.mkdir(exist_ok=True)
    for old in directory.glob(pattern):
        old.unlink()
    for name, text in texts.items():
        (directory / name).write_text(text)


def main() -> None:
    _write_all(RECORDS, "*.toml", {f"{name}.toml": text for name, text in resolved()})
    _write_all(SCRIPTS, "*.sbatch", dict(scripts()))
    for name, text in shipped_scripts():
        (SHIPPED / name).write_text(text)


if __name__ == "__main__":
    main()
