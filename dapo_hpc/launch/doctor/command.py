"""What `dapo doctor --site SITE` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dapo_hpc.launch.doctor import diagnose
from dapo_hpc.launch.doctor.findings import as_json, has_problems, line, summary
from dapo_hpc.launch.site import load_site


def run(site: Path, *, with_job: bool, wait_s: float, for_program: bool) -> int:
    """The exit code: 1 if there is a problem, else 0."""
    findings = []
    for found in diagnose(load_site(site), with_job=with_job, wait_s=wait_s, tell=_tell):
        findings.append(found)
        if not for_program:
            print(line(found), flush=True)
    print(json.dumps(as_json(findings), indent=1) if for_program else summary(findings))
    return int(has_problems(findings))


def _tell(text: str) -> None:
    """What is being waited for; beside the findings, not among them."""
    print(text, file=sys.stderr, flush=True)
