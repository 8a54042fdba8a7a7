#!/usr/bin/env bash
# Everything that needs a GPU, in steps: builds in single precision and in bfloat16, tests the CUDA operations against the
# CPU's oracles and PyTorch's numbers, times the model, trains the default run, looks for errors of memory and races, times
# every kernel of a step and the kernel laboratory. All that is printed goes into a file, too, as it comes.
#
#   dev/gpu.sh [STEP...]     build test bench clips run ranks sanitize kernels lab mixers; default: all, in this order
#
# OUT=DIR    where the file goes [dev/results]       LIMIT=S   seconds for all of it [570]; what has no time left is named
# Needs an NVIDIA GPU, its driver and the CUDA Toolkit; compute-sanitizer, Nsight Compute (ncu) and mpirun are used if found.
# A step may fail: the others still run, and the last lines say what failed. What was built stays in build/gpu, so that the
# GPU need not wait for it:     LIMIT=3000 NATIVE=0 CUDA_ARCH=90 dev/gpu.sh build      where there is nvcc, but no GPU
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
ALL="build test bench clips run ranks sanitize kernels lab mixers" LAB="scan_forward scan_backward dwconv3d layernorm attention"
fail() { echo "gpu.sh: $*" >&2; exit 1; }
steps=${*:-$ALL}
for step in $steps; do case " $ALL " in *" $step "*) ;; *) fail "no step $step; there are $ALL" ;; esac; done
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export GOMP_SPINCOUNT=50000  # else the program sets it by starting itself again, which profilers do not follow
name=
if [ "$steps" != build ]; then
    command -v nvidia-smi > /dev/null || fail "nvidia-smi: not found; install NVIDIA's driver"
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || name=
    [ -n "$name" ] || fail "nvidia-smi: no GPU can be used"
fi
out=${OUT:-dev/results} limit=${LIMIT:-570}
file=$out/$(echo "${name:-build}" | tr -c 'A-Za-z0-9\n' '_')-$(date +%F-%H%M%S).txt
work=$(mktemp -d) || exit 1
mkdir -p "$out" build/gpu || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 143' HUP INT TERM
fp32=build/gpu/FP32 bf16=build/gpu/BF16 mpi=build/gpu/MPI jobs=$(nproc)

# run SECONDS COMMAND...: not longer, and not longer than there is time for all; notes what became of it
run() {
    local most=$1 left=$((limit - SECONDS)) start=$SECONDS status=0 verdict
    shift
    [ "$left" -gt "$most" ] || most=$left
    if [ "$most" -le 0 ]; then verdict="NOT RUN, no time left"
    else
        timeout -k 5 "$most" "$@" || status=$?
        case $status in
            0) verdict="passed" ;;
            124 | 137) verdict="NOT FINISHED in $most s" status=1 ;;
            *) verdict="FAILED with status $status" ;;
        esac
    fi
    echo "$verdict ($((SECONDS - start)) s): $*" | tee -a "$work/verdicts"
    return $status
}
# the same beside others, its lines marked; wait for them
beside() { local mark=$1; shift; run "$@" 2>&1 | sed -u "s/^/[$mark] /" & }
missing() { echo "left out, $*" | tee -a "$work/verdicts"; }

# ---- the steps

sources() { cat Makefile ./*.c ./*.cu dev/*.[ch] dev/*.cu prepro/*.[ch] | cksum; }
# build_one DIRECTORY, make's variables and targets: variants differ in all that nvcc compiles, so each has a copy. Nothing is
# done if it was built of these sources before, and finds its libraries.
build_one() {
    local to=$1
    shift
    if [ "$(cat "$to/sources" 2> /dev/null)" = "$(sources)" ]; then
        case $(ldd "$to"/*cu "$to"/dev/*_cu 2> /dev/null) in *'not found'*) ;; *) echo "built before"; return ;; esac
    fi
    rm -rf "$to" && mkdir -p "$to/dev" "$to/prepro" && cp -p Makefile ./*.c ./*.cu "$to" && cp -p prepro/*.[ch] "$to/prepro" &&
        cp -p dev/*.[ch] dev/*.cu "$to/dev" && make -C "$to" -s -j "$jobs" DATA= "$@" && sources > "$to/sources"
}
step_build() {
    local lab_cu=(dev/mixers_cu) program
    for program in $LAB; do lab_cu+=("dev/${program}_cu"); done
    export jobs; export -f build_one sources
    beside CPU "$limit" make -s -j "$jobs" train_vivim prepro data
    # the laboratory is in single precision whatever the program is
    beside FP32 "$limit" bash -c 'build_one "$@"' build "$fp32" PRECISION=FP32 train_vivimcu test_vivimcu "${lab_cu[@]}"
    beside BF16 "$limit" bash -c 'build_one "$@"' build "$bf16" PRECISION=BF16 train_vivimcu test_vivimcu
    if command -v mpicc > /dev/null; then
        beside MPI "$limit" bash -c 'build_one "$@"' build "$mpi" PRECISION=FP32 USE_MPI=1 NO_NCCL=1 train_vivimcu
    fi
    wait
    du -sh build/gpu
}

step_test() {
    beside FP32 240 "$fp32/test_vivimcu"
    beside BF16 240 "$bf16/test_vivimcu"
    beside "FP32 program" 120 dev/test_device.sh "$fp32/train_vivimcu"
    beside "BF16 program" 120 dev/test_device.sh "$bf16/train_vivimcu" 5e-2
    wait
}

# bench PRECISION CONFIG BATCH FRAMES: times of operations, and a row of the table
bench() {
    echo "--- $*"
    run 60 "build/gpu/$1/train_vivimcu" --bench --config "$2" --batch "$3" --frames "$4" > "$work/bench" 2>&1
    cat "$work/bench"
    awk -v OFS=' | ' -v head="| $1 | $2 | $3 | $4" -v clips="$3" -v frames="$4" '
        /^  the host/ { host = $4 }
        /^{"config"/ { gsub(/[",}]/, ""); for (i = 1; i < NF; i++) v[$i] = $(i + 1)
            print head, v["forward_ms:"], sprintf("%.0f", 1e3 * clips * frames / v["forward_ms:"]), v["step_ms:"],
                  sprintf("%.2f", 1e3 * clips / v["step_ms:"]), host, v["forward_peak_mb:"], v["step_peak_mb:"] " |" }' \
        "$work/bench" >> "$work/table"
}
bench_table() {
    echo
    echo "| precision | model | clips | frames | forward ms | frames/s | step ms | clips/s | host ms | peak MB forward | step |"
    echo "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    cat "$work/table"
}
step_bench() {
    local precision config batch
    : > "$work/table"
    for config in b3 b0; do for batch in 1 4 8; do for precision in BF16 FP32; do
        bench $precision $config $batch 5
    done; done; done
    bench_table
}
step_clips() {
    local frames
    : > "$work/table"
    for frames in 5 32 64 150; do bench BF16 b3 1 $frames; done
    bench_table
}

step_run() {
    local precision to
    for precision in FP32 BF16; do
        to=$work/run$precision
        run 90 "build/gpu/$precision/train_vivimcu" --out "$to"
        run 30 "build/gpu/$precision/train_vivimcu" --eval --val data/phantom_val.bin --checkpoint "$to/best.safetensors"
    done
}

step_ranks() {
    local options=(--epochs 1 --affine none --out "$work/ranks") ranks
    run 60 env RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=29500 "$fp32/train_vivimcu" "${options[@]}"
    if [ ! -x "$mpi/train_vivimcu" ] || ! command -v mpirun > /dev/null; then missing "mpirun: not found"; return; fi
    for ranks in 1 2; do run 60 mpirun -n $ranks "$mpi/train_vivimcu" "${options[@]}"; done  # on one GPU, sums over the host
}

step_sanitize() {
    local tool
    command -v compute-sanitizer > /dev/null || { missing "compute-sanitizer: not found"; return; }
    # the tests' memory is managed, so what is not initialised, and what arenas and pool do, is seen in an epoch of the program
    local epoch=(--train data/phantom_val.bin --val data/phantom_val.bin --affine data/phantom_train_affine.safetensors --epochs 1)
    for tool in memcheck racecheck; do
        beside $tool 240 compute-sanitizer --tool $tool --error-exitcode 9 "$fp32/test_vivimcu" op golden model.hash_odd
    done
    beside "memcheck BF16" 240 compute-sanitizer --tool memcheck --error-exitcode 9 "$bf16/test_vivimcu" op golden
    for tool in memcheck initcheck; do
        beside "$tool, program" 240 compute-sanitizer --tool $tool --error-exitcode 9 "$fp32/train_vivimcu" "${epoch[@]}" \
            --out "$work/$tool"
    done
    wait
}

# every kernel of one training step of b3: its time, and what all of them leave of the step that --bench measured
step_kernels() {
    local precision step
    command -v ncu > /dev/null || { missing "ncu: not found"; return; }
    for precision in BF16 FP32; do
        run 60 "build/gpu/$precision/train_vivimcu" --bench --config b3 > "$work/bench" 2>&1
        step=$(sed -n 's/.*"step_ms": \([0-9.]*\).*/\1/p' "$work/bench")
        run 150 ncu --profile-from-start off --clock-control none --cache-control none --metrics gpu__time_duration.sum \
            --print-units base --csv "build/gpu/$precision/train_vivimcu" --bench --config b3 > "$work/ncu" 2>&1
        grep -v '^"' "$work/ncu" | grep '==\|passed\|FAILED\|NOT ' | tail -n 5
        echo "| $precision: kernel | launches | ms | % |"
        echo "|:--|--:|--:|--:|"
        awk -F '","' -v step="${step:-0}" '
            /"Kernel Name"/ { for (i = 1; i <= NF; i++) if ($i == "Kernel Name") at = i }
            /^"[0-9].*gpu__time_duration.sum/ { name = $at; sub(/\([^()]*\)$/, "", name); ns = $NF; gsub(/[",]/, "", ns)
                sum[name] += ns / 1e6; count[name]++; all += ns / 1e6; launches++ }
            END { sort = "LC_ALL=C sort -t \"|\" -k 4 -nr"
                for (k in sum) printf "| %s | %d | %.3f | %.1f |\n", k, count[k], sum[k], 100 * sum[k] / all | sort
                close(sort)
                printf "%d kernels, %.2f ms; a step takes %.2f ms", launches, all, step
                if (step > 0 && launches > 0) printf ": %.1f %% of it are launches and gaps", 100 * (1 - all / step)
                printf "\n" }' "$work/ncu"
    done
}

step_lab() {
    local program preset
    for preset in b3.1 b0.1; do for program in $LAB; do
        run 60 "$fp32/dev/${program}_cu" all --preset $preset --seconds 0.2
    done; done
}

step_mixers() {
    run 60 "$fp32/dev/mixers_cu" --check
    run 120 "$fp32/dev/mixers_cu" --frames 5,32,150 --seconds 3 --csv
}

# ---- all of them

all() {
    local step
    echo "$name, $(date)"
    [ -z "$name" ] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    nvcc --version | tail -n 2
    : > "$work/verdicts"
    for step in $steps; do
        echo; echo "=== $step ($SECONDS s)"
        "step_$step"
    done
    echo; echo "=== done ($SECONDS s)"
    grep -v '^passed' "$work/verdicts"
    echo "$(grep -c '^passed' "$work/verdicts") passed, $(grep -c '^FAILED' "$work/verdicts") failed," \
         "$(grep -c '^NOT' "$work/verdicts") not finished or not run, $(grep -c '^left out' "$work/verdicts") left out"
    ! grep -q '^FAILED\|^NOT' "$work/verdicts"
}
all 2>&1 | tee "$file"
