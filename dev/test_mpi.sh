#!/bin/sh
# Do several processes train what one trains?
#
#   dev/test_mpi.sh [PROGRAM]        after `make USE_MPI=1 train_vivim prepro`; the program: train_vivim
#
# 2 and 3 ranks against 1, augmentation, dropout and drop path on, with and without the affine constraint: the same losses,
# the same weights and moments to rounding; all ranks' weights are the same bits at the end of every epoch (the program ends
# itself if not: that is tried, too). Then: resumed after a killed rank and after a signal, the same bits; mistakes end all
# ranks with one line; output is written once. Without mpirun all is skipped. Prints what fails and a last line; the exit
# status is the verdict.
set -u
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
train=${1:-$root/train_vivim} phantom=$root/prepro/phantom affine=$root/prepro/affine
command -v mpirun > /dev/null || { echo "test_mpi.sh: skipped: there is no mpirun"; exit 0; }
for program in "$train" "$phantom" "$affine"; do
    [ -x "$program" ] || { echo "test_mpi.sh: $program: not built; run make USE_MPI=1 train_vivim prepro" >&2; exit 1; }
done
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
cd "$work" || exit 1
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C
export OMP_NUM_THREADS OMP_WAIT_POLICY LC_ALL
# Open MPI: as root, more ranks than cores, waiting ranks give way; other MPIs do not read these
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM OMPI_MCA_rmaps_base_oversubscribe OMPI_MCA_mpi_yield_when_idle
mpirun -n 2 "$train" --help 2>&1 | grep -q "built for one process" && { echo "test_mpi.sh: $train: built without USE_MPI=1" >&2; exit 1; }

bad=0 good=0 worst_loss=0 worst_weight=0
wrong() { echo "FAILED $*"; bad=$((bad + 1)); tail -n 5 log errors 2> /dev/null; }
right() { good=$((good + 1)); }
must() { what=$1; shift; if "$@"; then right; else wrong "$what"; fi; }  # must WHAT COMMAND...
ranks() {  # ranks N OPTION...: sets status
    n=$1; shift
    mpirun -n "$n" "$train" "$@" > log 2> errors < /dev/null
    status=$?
}

"$phantom" --out t.bin --videos 5 --frames 5 --size 32x32 --seed 1 > log && "$phantom" --out v.bin --videos 4 --frames 4 \
    --size 32x32 --seed 2 > log && "$affine" --shard t.bin --out f.safetensors --steps 20 > log || { cat log; exit 1; }
options="--train t.bin --val v.bin --frames 3 --batch 6 --epochs 3 --lr 5e-4 --drop-path 0.3 --dropout 0.3"  # 12 steps

# the largest relative difference of a loss, of 4 a step; the log holds six digits: the last may differ in the small ones
losses() {
    grep '^train' "$1/log.txt" | cut -d' ' -f5- > a && grep '^train' "$2/log.txt" | cut -d' ' -f5- > b || return 1
    paste -d' ' a b | awk '{ for (i = 1; i <= 4; i++) { d = $i - $(i + 4); d = d < 0 ? -d : d
                             if (i == 1 || !(d <= 1.01e-6)) { d /= $i > 1e-9 ? $i : 1e-9; if (!(d <= worst)) worst = d } } }
                           END { print NR < 8 ? "nan" : worst + 0 }'
}

# The largest |a - b|^2 / |a|^2 of a tensor in two files; not of biases whose gradient is zero by mathematics: keys', the
# decoder's linears', and the last of stage 4. Names and places come from the header: {"name":{.. "data_offsets":[begin,end]},..
weights() {
    for file in "$1" "$2"; do
        length=$(od -An -t u8 -N 8 "$file" | tr -d ' ')
        tail -c +9 "$file" | head -c "$length" | tr '{' '\n' | awk -F'"' '
            /data_offsets/ { match($0, /\[[0-9]+, *[0-9]+\]/); split(substr($0, RSTART + 1, RLENGTH - 2), at, ",")
                             if (/F32/) print "tensor", name, at[1] / 4, at[2] / 4 }
            NF > 1 { name = $(NF - 1) }' > "table.$(basename "$(dirname "$file")")"
        tail -c +$((length + 9)) "$file" | od -An -v -t f4 -w4 > "values.$(basename "$(dirname "$file")")"
    done
    table=table.$(basename "$(dirname "$1")")
    paste -d' ' "values.$(basename "$(dirname "$1")")" "values.$(basename "$(dirname "$2")")" | awk -v table="$table" '
        BEGIN { while ((getline line < table) > 0) {
                    split(line, t, " ")
                    if (t[2] ~ /attention.self.key.bias|linear_c.*proj.bias|stages.3.*mlp.fc2.bias/) continue
                    for (i = t[3]; i < t[4]; i++) of[i] = t[2]
                    tensors++ } }
        (NR - 1) in of { k = of[NR - 1]; d[k] += ($1 - $2) ^ 2; s[k] += $1 ^ 2
                         if (sub(/running_var/, "running_mean", k)) variance[k] += $1 }
        END { for (k in variance) s[k] = variance[k]  # a mean may be near 0: it is measured by what it is the mean of
              for (k in d) { e = s[k] > 0 ? d[k] / s[k] : d[k]; if (!(e <= worst)) worst = e }
              print tensors < 4 ? "nan" : worst + 0 }'
}

less() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a != "nan" && a + 0 <= b + 0) }'; }
larger() { if less "$1" "$2"; then echo "$2"; else echo "$1"; fi; }

for constraint in none f.safetensors; do
    rm -rf one
    "$train" $options --affine "$constraint" --out one > log 2> errors || wrong "one process"
    for n in 2 3; do
        rm -rf "several$n"
        ranks "$n" $options --affine "$constraint" --out "several$n"
        must "$n ranks, --affine $constraint: status $status" [ "$status" -eq 0 ]
        must "$n ranks: the last line is not there once" [ "$(grep -c '^best val Dice' log)" -eq 1 ]
        must "$n ranks: other files than one's" [ "$(ls one)" = "$(ls "several$n")" ]
        loss=$(losses one "several$n") weight=$(weights one/last.safetensors "several$n/last.safetensors")
        must "$n ranks, --affine $constraint: losses differ by $loss" less "$loss" 1e-5
        must "$n ranks, --affine $constraint: weights differ by $weight" less "$weight" 1e-7
        moment=$(weights one/resume.safetensors "several$n/resume.safetensors")  # weights do not tell: Adam divides scales out
        must "$n ranks, --affine $constraint: Adam's moments differ by $moment" less "$moment" 1e-6
        worst_loss=$(larger "$loss" "$worst_loss") worst_weight=$(larger "$weight" "$worst_weight")
    done
done

ranks 2 $options --affine none --sync-bn 0 --out unsynchronised
must "--sync-bn 0: status $status" [ "$status" -eq 0 ]
less "$(losses one unsynchronised)" 1e-5 && wrong "--sync-bn 0 changes nothing"

# scores and predictions of the same weights
"$train" --eval --val v.bin --checkpoint one/last.safetensors 2>&1 | grep Dice > scores
ranks 3 --eval --val v.bin --checkpoint one/last.safetensors
must "--eval: other scores" [ "$(grep Dice log)" = "$(cat scores)" ]
"$train" --predict v.bin --checkpoint one/last.safetensors --out p1.bin > log 2>&1
ranks 2 --predict v.bin --checkpoint one/last.safetensors --out p2.bin
must "--predict: another shard" cmp -s p1.bin p2.bin

# mistakes: a line of ours, and all ends
refused() {  # refused CASE WORDS
    [ "$status" -ne 0 ] || { wrong "$1: the exit status is 0"; return; }
    if [ "$(grep -c '^train_vivim: ' errors)" -ne 1 ] || ! grep -q -e "^train_vivim: .*$2" errors; then
        wrong "$1: not the line"
        return
    fi
    right
}
ranks 3 $options --batch 4 --out new
refused "a batch that cannot be shared" "--batch 4.*multiple of 3"
must "a refused training writes" [ ! -e new ]
ranks 3 --no-such-option
refused "a wrong option" "no-such-option"
mpirun -n 1 "$train" $options --affine none --out new : -n 1 "$train" $options --train none.bin --out new > log 2> errors
status=$?
refused "a rank that fails alone" "none.bin"
mpirun -n 1 "$train" $options --affine none --out new : -n 1 "$train" $options --affine none --seed 2 --out new > log 2> errors
status=$?
refused "ranks with different seeds" "have become different"

# a rank killed, then resumed; stopped by a signal, then resumed: what a training makes that never stopped
options="$options --affine none --epochs 12 --save-every 2"
ranks 2 $options --out "$work/o"
mv o whole
same() {
    for file in best.safetensors last.safetensors resume.safetensors; do
        must "$1: $file is not what the training that never stopped wrote" cmp -s "whole/$file" "$work/o/$file"
    done
    must "$1: the log is another" [ "$(grep -v '^#' whole/log.txt)" = "$(grep -v '^#' o/log.txt)" ]
}
for how in kill signal; do
    rm -rf o
    mpirun -n 2 "$train" $options --out "$work/o" > log 2> errors &
    job=$!
    while [ ! -e o/resume.safetensors ] && kill -0 "$job" 2> /dev/null; do sleep 0.05; done
    if [ "$how" = kill ]; then
        rank=$(ps -A -o pid= -o args= | awk -v p="$train" -v o="$work/o" '$2 == p && index($0, o) { i = $1 } END { print i }')
        kill -9 "$rank"
    else
        kill -USR1 "$job"
    fi
    wait "$job"
    status=$?
    must "$how: the exit status is 0" [ "$status" -ne 0 ]
    must "$how: mpirun says nothing" [ -s errors ]
    [ "$how" = kill ] || must "signal: not stopped cleanly" grep -q "stopped by a signal" log
    ranks 2 $options --out "$work/o" --resume
    must "$how: --resume: status $status" [ "$status" -eq 0 ]
    same "resumed after a $how"
done

# what another launcher started is not several independent trainings
WORLD_SIZE=2 "$train" $options --out "$work/alone" > log 2> errors < /dev/null
must "WORLD_SIZE=2 without mpirun" [ $? -eq 1 ]
must "WORLD_SIZE=2 without mpirun: says why" grep -q "WORLD_SIZE=2 .*mpirun" errors

echo "test_mpi.sh: losses within $worst_loss, weights within $worst_weight (NMSE); $good passed, $bad failed"
[ "$bad" -eq 0 ]
