"""Nobody else's compiled code is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dapo_hpc.caches import require_own_caches


def test_caches_are_made_for_this_user_alone(tmp_path: Path) -> None:
    require_own_caches({"TRITON_CACHE_DIR": str(tmp_path / "me" / "triton"), "HOME": "/nowhere"})
    assert (tmp_path / "me").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "me" / "triton").stat().st_mode & 0o777 == 0o700
    require_own_caches({"TRITON_CACHE_DIR": str(tmp_path / "me" / "triton")})


@pytest.mark.parametrize("where", ["me", "me/triton"])
def test_what_everybody_may_write_is_refused(tmp_path: Path, where: str) -> None:
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "me" / "triton")}
    require_own_caches(caches)
    (tmp_path / where).chmod(0o777)
    with pytest.raises(ValueError, match=r"TRITON_CACHE_DIR: .* written by everybody \(mode 777\)"):
        require_own_caches(caches)
    (tmp_path / where).chmod(0o1777)
    require_own_caches(caches)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_what_another_user_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    os.chown(tmp_path / "me", 1234, 1234)
    with pytest.raises(ValueError, match="belongs to user 1234, and this is user 0"):
        require_own_caches({"VLLM_CACHE_ROOT": str(tmp_path / "me" / "vllm")})
