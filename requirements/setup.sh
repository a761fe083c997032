#!/usr/bin/env bash
# `make setup`: .venv with the tested versions of requirements/cpu.lock and this package, editable.
# A second run finds the stamp and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
STAMP=$VENV/.setup-stamp
LOCK=requirements/cpu.lock

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$PYTHON is $("$PYTHON" --version 2>&1); expected Python 3.11 or newer. Set PYTHON=<path>." >&2
    exit 1
}
wanted=$(cat "$LOCK" setup.py requirements/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
    echo "setup: .venv holds the versions of $LOCK already; nothing to install"
    exit 0
fi

# ---- Debian packages: only what is absent
packages=()
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
command -v git >/dev/null || packages+=(git)
/sbin/ldconfig -p | grep -q 'libnuma\.so\.1' || packages+=(libnuma1)   # the engine links to it
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing Debian packages: ${packages[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    else
        echo "setup: these packages are absent and only root can install them: ${packages[*]}" >&2
        echo "  Ask for: apt-get install ${packages[*]}. Going on without them." >&2
    fi
fi

# ---- where pip is configured to look, uv looks too
configured() { "$VENV/bin/pip" config list | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tr ' ' '\n' | sort -u; }
[ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/pip" install --quiet "$(grep '^uv==' "$LOCK")"
options=()
for place in $(configured find-links); do options+=(--find-links "$place"); done
for place in $(configured index-url); do options+=(--default-index "$place"); done
install() { "$VENV/bin/uv" pip install --python "$VENV/bin/python" "${options[@]}" "$@"; }

# ---- torch without CUDA: a wheel at hand, else the index that uv knows for it
install --quiet --dry-run --no-deps "$(grep '^torch==' "$LOCK")" 2>/dev/null || options+=(--torch-backend cpu)

echo "setup: installing $(grep -c '==' "$LOCK") packages of $LOCK"
# Compiled at once: processes that may not write bytecode would else spend 10 s on each start.
install --quiet --no-deps --compile-bytecode --requirements "$LOCK"
install --quiet --no-deps --no-build-isolation --editable .
echo "$wanted" >"$STAMP"
echo "setup: done. Next: make demo"
