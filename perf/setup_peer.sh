#!/usr/bin/env bash
# .venv-peer: TRL at the version that the figures in perf/LOG.md name, with the torch of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv-peer/bin/python ] && exit 0
options=()
for place in $(.venv/bin/pip config list | sed -n "s/^[^=]*\.find-links='\(.*\)'\$/\1/p" | sort -u); do
    options+=(--find-links "$place")
done
torch=$(grep '^torch==' requirements/cpu.lock)
.venv/bin/uv venv --quiet --python "$(.venv/bin/python -c 'import sys; print(sys._base_executable)')" .venv-peer
install() { .venv/bin/uv pip install --quiet --compile-bytecode --python .venv-peer/bin/python "$@"; }
install "${options[@]}" --dry-run --no-deps "$torch" 2>/dev/null || options+=(--torch-backend cpu)
install "${options[@]}" "$torch" trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
