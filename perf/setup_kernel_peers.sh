#!/usr/bin/env bash
# The code that the kernel benchmarks compare with, at pinned versions, in a folder that git ignores.
#
#     bash perf/setup_kernel_peers.sh                   # .venv-kernel-peers, 15 MB
#     bash perf/setup_kernel_peers.sh --quack           # QuACK as well, and the CuTe DSL: 280 MB
#     bash perf/setup_kernel_peers.sh FOLDER            # elsewhere
#
# Wheels for Python 3.12 on Linux x86-64 whatever Python this is, unpacked and without what they
# depend on: the folder can be carried to a machine without network that has torch and Triton.
# Then `python perf/run_all.py --peers FOLDER`; the default folder is found without.
#
#     FOLDER/site/    packages that import as they are; goes on the import path
#     FOLDER/files/   trees of which single files are loaded by path
set -euo pipefail
cd "$(dirname "$0")/.."
quack=no
if [ "${1:-}" = --quack ]; then quack=yes; shift; fi
folder=${1:-.venv-kernel-peers}
python=${PYTHON:-.venv/bin/python}

site=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1 megatron-core==0.19.2)
files=(trl==1.16.0 verl==0.9.1)
sdist=flash-attn==2.8.3.post2
# NVIDIA's licence for the CuTe DSL allows measuring, not passing on.
cute=(nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core)
cute=("${cute[@]/%/==4.8.1}" nvidia-cutlass-dsl-libs-cu13==4.8.1)
cute+=(quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5)

wanted="quack: $quack; ${site[*]} ${files[*]} $sdist ${cute[*]}"
[ "$(cat "$folder/versions" 2>/dev/null)" = "$wanted" ] && exit 0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
options=(-qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
for platform in manylinux_2_{34,31,28,27,24,17}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    options+=(--platform "$platform")
done

fetch() {  # place, requirements
    local place=$1 file; shift
    "$python" -m pip download "${options[@]}" --dest "$wheels/$place" "$@"
    mkdir -p "$folder/$place"
    for file in "$wheels/$place"/*.whl; do
        "$python" -m zipfile -e "$file" "$folder/$place"
    done
}

fetch site "${site[@]}"
fetch files "${files[@]}"
[ $quack = no ] || fetch site "${cute[@]}"

# There is no wheel of flash-attn; one file of its sources needs no compiler. pip asks its setup.py
# for a name, which imports torch.
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "$python" -m pip download -qq --no-deps \
    --no-binary=:all: --no-build-isolation --dest "$wheels" "$sdist"
tar -xzf "$wheels"/flash_attn-*.tar.gz -C "$folder/files" --strip-components=1 --wildcards \
    '*/flash_attn/ops/triton/cross_entropy.py'
mkdir -p "$folder/files/flash_attn-${sdist#*==}.dist-info"
printf 'Name: flash-attn\nVersion: %s\n' "${sdist#*==}" \
    > "$folder/files/flash_attn-${sdist#*==}.dist-info/METADATA"

# Of TRL and verl only what is loaded; their tests and scripts would shadow other people's.
(
    cd "$folder/files"
    find trl -mindepth 1 -maxdepth 1 ! -name kernels -exec rm -rf {} +
    find verl -mindepth 1 -maxdepth 1 ! -name utils -exec rm -rf {} +
    find verl/utils -mindepth 1 -maxdepth 1 ! -name kernel ! -name experimental -exec rm -rf {} +
    find . -mindepth 1 -maxdepth 1 ! -name 'trl*' ! -name 'verl*' ! -name 'flash_attn*' \
        -exec rm -rf {} +
)
echo "$wanted" > "$folder/versions"
du -sh "$folder"
