#!/bin/bash
# bench_ab.sh: two builds of train_vivim against each other: --bench, A B A B .., medians and ratios
#   dev/bench_ab.sh [-n 3] BINARY_A BINARY_B [options of --bench, as --config b0]
set -eu
runs=3
[ "${1:-}" = -n ] && { runs=$2; shift 2; }
[ $# -ge 2 ] || { sed -n 2,3p "$0" >&2; exit 1; }
a=$1 b=$2; shift 2
out=$(mktemp); trap 'rm -f "$out"' EXIT
for _ in $(seq "$runs"); do
    for which in a b; do
        { echo -n "$which "; "${!which}" --bench "$@" | grep '^{"config"'; } >> "$out"
    done
done
median() {  # median which key
    sed -n "s/^$1 .*\"$2\": \([0-9.]*\).*/\1/p" "$out" | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}
for key in forward_ms step_ms forward_peak_mb step_peak_mb; do
    echo "$key $(median a $key) $(median b $key)"
done | awk '{ printf "%-16s %10.2f %10.2f   B/A %.3f\n", $1, $2, $3, $3 / $2 }'
