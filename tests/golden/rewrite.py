"""Write anew what tests/golden compares with: `make golden`, then read the difference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dapo_hpc.config import dump, load, parse

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "config"
LEAST = {
    "run": {"name": "least", "total_steps": 1},
    "model": {"path": "model"},
    "prompts": {"train": "train.parquet", "eval": "eval.parquet"},
}
"""What every config has to say; the rest is profile and defaults."""


def resolved() -> Iterator[tuple[str, str]]:
    """Name and text of every record: each shipped config, and each profile by itself."""
    for path in sorted((ROOT / "configs").glob("*.toml")):
        yield path.stem, dump(load(path))
    for profile in ("paper", "verl", "default"):
        yield f"profile_{profile}", dump(parse({**LEAST, "profile": profile}))


def main() -> None:
    RECORDS.mkdir(exist_ok=True)
    for old in RECORDS.glob("*.toml"):
        old.unlink()
    for name, text in resolved():
        (RECORDS / f"{name}.toml").write_text(text)


if __name__ == "__main__":
    main()
