#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds, tests the CUDA operations against the CPU's oracles and PyTorch's numbers,
# looks for errors of memory and races, trains the default run, times the model. All it prints goes into one file, too.
#
#   dev/gpu.sh [FILE]        default: dev/results/GPU-DATE.txt; needs an NVIDIA GPU, its driver, and the CUDA Toolkit
#
# QUICK=1 leaves out compute-sanitizer, which takes most of the time.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "gpu.sh: $*" >&2; exit 1; }
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
command -v nvidia-smi > /dev/null || fail "nvidia-smi: not found; install NVIDIA's driver"
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || fail "nvidia-smi: no GPU can be used"
file=${1:-dev/results/$(echo "$name" | tr -c 'A-Za-z0-9\n' '_')-$(date +%F).txt}
mkdir -p "$(dirname "$file")"
exec > >(tee "$file.tmp") 2>&1

bad=0
step() { echo; echo "=== $* ($SECONDS s)"; }
check() { if "$@"; then echo "passed: $*"; else echo "FAILED: $*"; bad=$((bad + 1)); fi; }

step "machine"
date
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
nvcc --version | tail -n 2

step "build"
make -s train_vivim train_vivimcu test_vivimcu

step "tests"
check ./test_vivimcu

if [ -z "${QUICK:-}" ]; then
    for tool in memcheck racecheck initcheck; do
        step "compute-sanitizer, $tool"
        check compute-sanitizer --tool "$tool" --error-exitcode 1 ./test_vivimcu op golden model.hash_tiny model.hash_odd
    done
fi

step "the default run"
check ./train_vivimcu --out "$(mktemp -d)/run"

step "times"
for config in b0 b3; do
    for frames in 5 32; do ./train_vivimcu --bench --config "$config" --frames "$frames"; done
done

step "done: $bad failed"
mv "$file.tmp" "$file"
[ "$bad" -eq 0 ]
