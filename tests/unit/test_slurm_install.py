"""`make slurm-install` says why it cannot, and asks for nothing that is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

INSTALL = Path(__file__).resolve().parents[2] / "slurm" / "mini" / "install.sh"


def install(programs: Path, **fakes: str) -> subprocess.CompletedProcess[str]:
    """Run it where only these programs exist, given as the shell text of each."""
    for name, text in fakes.items():
        file = programs / name.replace("_", "-")
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(INSTALL)],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_apt(tmp_path: Path) -> None:
    refused = install(tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("make slurm-install: there is no apt on this machine")


def test_not_root_and_something_missing(tmp_path: Path) -> None:
    lacks_slurmd = 'case "$*" in *slurmd) exit 1;; *) printf installed;; esac'
    refused = install(tmp_path, apt_get="exit 9", dpkg_query=lacks_slurmd, id="echo 1000")
    assert refused.returncode == 1
    assert "not root, and not installed: slurmd. Run it as root" in refused.stderr


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    done = install(tmp_path, apt_get="exit 9", dpkg_query="printf installed", id="echo 1000")
    assert done.returncode == 0
    assert done.stdout.startswith("everything is installed: slurmctld slurmd ")
