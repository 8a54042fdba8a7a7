#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds in single precision and in bfloat16, tests the CUDA operations against the
# CPU's oracles and PyTorch's numbers, looks for errors of memory and races, trains the default run, times the model and the
# kernel laboratory. All it prints goes into one file, too.
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
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bad=0
step() { echo; echo "=== $* ($SECONDS s)"; }
check() { if timeout 240 "$@"; then echo "passed: $*"; else echo "FAILED ($?): $*"; bad=$((bad + 1)); fi; }

step "machine"
date
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
nvcc --version | tail -n 2

step "build"
jobs=$(nproc)
make -s -j "$jobs" train_vivim prepro data
for precision in FP32 BF16; do  # the two differ in every line that nvcc compiles, so each has a copy of the sources
    mkdir "$work/$precision"
    cp -rp Makefile train_vivim train_vivim.c train_vivim.cu test_vivim.c prepro dev data "$work/$precision"
    make -C "$work/$precision" -s -j "$jobs" PRECISION=$precision train_vivimcu test_vivimcu dev \
        > "$work/$precision.log" 2>&1 &
done
for precision in FP32 BF16; do
    wait -n || { cat "$work"/*.log; fail "the build failed"; }
done
cat "$work"/*.log
fp32=$work/FP32 bf16=$work/BF16

step "tests"
check "$fp32/test_vivimcu"
check "$bf16/test_vivimcu"
check dev/test_device.sh "$fp32/train_vivimcu"
check dev/test_device.sh "$bf16/train_vivimcu" 5e-2

sanitizing=
if [ -z "${QUICK:-}" ] && command -v compute-sanitizer > /dev/null; then
    step "compute-sanitizer: started, on test_vivimcu's operations and small models"
    for tool in memcheck racecheck initcheck; do
        (timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 1 "$fp32/test_vivimcu" op golden model.hash_odd \
             > "$work/$tool.txt" 2>&1; echo $? > "$work/$tool.status") &
        sanitizing="$sanitizing $tool"
    done
    wait
fi
for tool in $sanitizing; do
    step "compute-sanitizer, $tool"
    tail -n 5 "$work/$tool.txt"
    case $(cat "$work/$tool.status") in
        0) echo "passed: $tool" ;;
        124) echo "not finished in 200 s, no error until then: $tool" ;;
        *) echo "FAILED: $tool"; bad=$((bad + 1)) ;;
    esac
done

step "the default run"
for precision in FP32 BF16; do
    check "$work/$precision/train_vivimcu" --out "$work/run$precision" > "$work/run.log"
    tail -n 4 "$work/run.log"
done

step "times: one clip of 5 frames, then 4, then 8"
for precision in FP32 BF16; do
    for config in b0 b3; do
        for batch in 1 4 8; do
            echo "--- $precision, $config, $batch clips"
            timeout 60 "$work/$precision/train_vivimcu" --bench --config $config --batch $batch || true
        done
    done
done

step "times: longer clips, BF16, b3"
for frames in 32 64 150; do
    timeout 60 "$bf16/train_vivimcu" --bench --config b3 --frames $frames || true
done

step "the kernel laboratory"
for program in scan_forward scan_backward dwconv3d layernorm attention; do
    for preset in b3.1 b0.1; do
        check "$fp32/dev/${program}_cu" all --preset $preset
    done
done

step "ST-Mamba beside attention"
check "$fp32/dev/mixers_cu" --check
check "$fp32/dev/mixers_cu" --frames 5,32,150 --seconds 5 --csv

step "done: $bad failed"
mv "$file.tmp" "$file"
[ "$bad" -eq 0 ]
