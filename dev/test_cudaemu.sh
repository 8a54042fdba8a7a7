#!/usr/bin/env bash
# Does dev/cudaemu.h report or expose what it says? Builds dev/test_cudaemu.cu under it (g++, no CUDA needed) and runs its
# cases, each in three schedules: one line per case, the exit status is the verdict.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ASAN_OPTIONS=detect_leaks=0
passed=0 failed=0

flags="-std=c++17 -g -O1 -Wall -Wno-sign-compare -include dev/cudaemu.h"
sed -f dev/cudaemu.sed dev/test_cudaemu.cu > "$work/test.cpp" &&
${CXX:-g++} $flags -fsanitize=address,undefined -fno-sanitize-recover=all "$work/test.cpp" -o "$work/test" &&
${CXX:-g++} $flags -fsanitize=thread -fno-pie -fno-threadsafe-statics -c "$work/test.cpp" -o "$work/test.o" &&
${CXX:-g++} -no-pie "$work/test.o" -o "$work/races" || exit 1
program=$work/test

verdict() {  # case, 0 if it is as it should be
    if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "ok    $1"; return; fi
    failed=$((failed + 1))
    echo "FAIL  $1"
    sed 's/^/      /' "$work/out" | head -20
}

run() { { CUDAEMU_ORDER=$2 "$program" "$1" > "$work/out" 2>&1; } 2> /dev/null; }     # the shell need not say that it aborted

right() {  # case: the same right result in every schedule
    local bad=0
    for order in forward reverse 7; do run "$1" "$order" && grep -qx right "$work/out" || { bad=1; break; }; done
    verdict "$1: right in every schedule" $bad
}

reported() {  # case, words of the report: in every schedule the program dies with it
    local bad=0
    for order in forward reverse 7; do ! run "$1" "$order" && grep -q -- "$2" "$work/out" || { bad=1; break; }; done
    verdict "$1: reported" $bad
}

exposed() {  # case: in one schedule at least the result is wrong
    local bad=1
    for order in forward reverse 7; do run "$1" "$order"; grep -qx wrong "$work/out" && bad=0; done
    verdict "$1: exposed" $bad
}

for name in twice row_sums warp_sums managed much_shared gemm atomic_add bf16 wmma lt graph; do right $name; done
exposed missing_barrier
exposed unwritten
exposed shared_unwritten
exposed block_race
exposed lane_race
exposed bf16_truncated
exposed wmma_ld
exposed wmma_no_sync_before
exposed wmma_no_sync_after
exposed graph_host_work
reported global_past "AddressSanitizer: use-after-poison"
reported shared_past "AddressSanitizer: heap-buffer-overflow"
reported static_shared_past "AddressSanitizer: global-buffer-overflow\|out of bounds"
reported copy_past "AddressSanitizer: use-after-poison"
reported use_after_free "AddressSanitizer: use-after-poison"
reported host_touches_device "AddressSanitizer: SEGV"
reported managed_too_early "AddressSanitizer: SEGV"
reported divergent_barrier "not all threads of a block reach"
reported different_barriers "wait at different __syncthreads"
reported exited_lane "has exited"
reported deadlock "deadlock"
reported too_many_threads "invalid launch"
reported empty_grid "invalid launch"
reported too_much_shared "invalid launch"
reported copy_kind "its kind does not fit"
reported free_twice "or twice"
reported gemm_past "cuBLAS: C"
reported wmma_past "AddressSanitizer: heap-buffer-overflow"
reported wmma_unaligned "must begin on 32 bytes"
reported lt_host_bias "cuBLAS: bias"
reported lt_short_bias "cuBLAS: bias"
reported graph_freed "AddressSanitizer: use-after-poison"
reported graph_own_freed "AddressSanitizer: use-after-poison"
reported graph_waits "waits while a stream is captured"
reported graph_takes "takes memory by cudaMalloc while"
reported graph_gives "gives back memory of before while"

program=$work/races  # with the line of the second access
for name in twice row_sums warp_sums managed atomic_add wmma graph; do right $name; done
reported plain_add "race: .* global memory"
reported block_race "race: .* global memory"
reported lane_race "race: .* global memory"
reported missing_barrier "race: .* shared memory"
reported wmma_no_sync_before "race: .* shared memory"
reported wmma_no_sync_after "race: .* shared memory"
run plain_add forward
grep -q 'test.cpp:[0-9]' "$work/out"
verdict "races: the line of the source is named" $?

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
