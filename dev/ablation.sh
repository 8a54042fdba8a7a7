#!/usr/bin/env bash
# The paper's Table III on synthetic clips: trains the tiny model with every part left out in turn, several seeds each, and
# prints a table of the validation measures at the epoch of the best Dice, mean and standard deviation over the seeds.
#
#   make train_vivim && dev/ablation.sh [option of train_vivim ...]        e.g. dev/ablation.sh --epochs 6
#
# SEEDS="1 2 3"       seeds of each row         JOBS=2          runs at a time, of one thread each (all processors)
# OUT=out/ablation    where the runs go         ROWS="C3 C3+constraint"   only these rows
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x ./train_vivim ] || { echo "ablation.sh: ./train_vivim: not built; run make train_vivim" >&2; exit 1; }

out=${OUT:-out/ablation} seeds=${SEEDS:-1 2 3} rows=${ROWS:-basic C1 C2 C3 C3+edge C3+constraint}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}

options() {  # of a row
    case $1 in
        basic)         echo --scans none --edge 0 ;;   # no Mamba layers
        C1)            echo --scans f --edge 0 ;;      # forward scan
        C2)            echo --scans fb --edge 0 ;;     # and backward
        C3)            echo --scans fbs --edge 0 ;;    # and spatial
        C3+edge)       echo --scans fbs --affine none ;;  # and the boundary head, without the affine constraint
        C3+constraint) echo --scans fbs ;;             # and the affine constraint: the whole
        *) echo "ablation.sh: ROWS: there is no row '$1'" >&2; return 1 ;;
    esac
}

for row in $rows; do options "$row" > /dev/null; done
mkdir -p "$out"
for row in $rows; do
    for seed in $seeds; do
        # shellcheck disable=SC2046  # options are words without spaces
        printf '%q ' ./train_vivim $(options "$row") --threads 1 --seed "$seed" --out "$out/${row}_$seed" "$@"
        printf '> %q && echo %q\n' "$out/${row}_$seed.txt" "done: $row, seed $seed" # bash runs this line
    done
done | xargs -d '\n' -P "$jobs" -n 1 bash -c >&2

# log.txt: "val epoch loss dice jaccard precision recall empty"
measures() {
    for seed in $seeds; do grep '^val ' "$out/$1_$seed/log.txt" | sort -k4,4nr -s | head -n 1; done |
        awk '{ n++; for (i = 4; i <= 7; i++) { sum[i] += $i; squares[i] += $i * $i } }
             END { for (i = 4; i <= 7; i++) {
                       mean = sum[i] / n; variance = n > 1 ? (squares[i] - n * mean * mean) / (n - 1) : 0
                       printf " %.4f ± %.4f |", mean, sqrt(variance > 0 ? variance : 0) } print "" }'
}
echo "| model | Dice | Jaccard | Precision | Recall |"
echo "|---|---|---|---|---|"
for row in $rows; do echo "| $row |$(measures "$row")"; done
