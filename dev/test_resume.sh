#!/bin/sh
# Is a training that was killed and resumed the same, bit for bit, as one that never stopped? And does whatever it left at the
# moment of its death load?
#
#   dev/test_resume.sh [kills]        after `make train_vivim prepro`; `make test` calls it; kills: 50
#
# One training runs to its end. Others, with the same options, are killed (SIGKILL, which no program can handle) at random
# moments and resumed until they, too, end; then weights, state and log must be the same files. In between, every file that
# is there must load. Ends with a full disk. Prints what fails and a last line; the exit status is the verdict.
set -u
kills=${1:-50}
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
train=$root/train_vivim phantom=$root/prepro/phantom
for program in "$train" "$phantom"; do
    [ -x "$program" ] || { echo "test_resume.sh: $program: not built; run make train_vivim prepro" >&2; exit 1; }
done
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
cd "$work" || exit 1
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C
export OMP_NUM_THREADS OMP_WAIT_POLICY LC_ALL

bad=0
wrong() { echo "FAILED $*"; bad=$((bad + 1)); }

"$phantom" --out t.bin --videos 4 --frames 6 --size 32x32 --seed 1 > /dev/null || exit 1
"$phantom" --out v.bin --videos 2 --frames 3 --size 32x32 --seed 2 > /dev/null || exit 1
options="--train t.bin --val v.bin --affine none --frames 2 --batch 2 --epochs 5 --save-every 2 --seed 7 --out o"
start=$(date +%s%N)
"$train" $options > log 2>&1 || { cat log; exit 1; }
took=$((($(date +%s%N) - start) / 1000000))  # milliseconds
mv o whole

loads() {  # every checkpoint that is there
    for file in o/best.safetensors o/last.safetensors; do
        [ ! -e "$file" ] || "$train" --eval --val v.bin --checkpoint "$file" > log 2>&1 || { wrong "$file does not load"; cat log; }
    done
}

same() {  # same CASE
    for file in best.safetensors last.safetensors resume.safetensors log.txt; do
        cmp -s "whole/$file" "o/$file" || wrong "$1: $file is not what the training that never stopped wrote"
    done
}

killed=0 runs=0 resumed=0
seed=12345
while [ "$killed" -lt "$kills" ] && [ "$bad" -eq 0 ]; do
    runs=$((runs + 1)) alive=1
    while [ "$alive" -eq 1 ]; do
        go_on=
        [ -e o/resume.safetensors ] && go_on=--resume resumed=$((resumed + 1))
        "$train" $options $go_on > log 2>&1 &
        process=$!
        seed=$(((seed * 1103515245 + 12345) % 2147483648))
        pause=$((seed / 65536 % took * 3 / 4))
        sleep "$((pause / 1000)).$(printf %03d $((pause % 1000)))"
        if kill -9 "$process" 2> /dev/null; then killed=$((killed + 1)); fi
        wait "$process" 2> /dev/null
        status=$?
        if [ "$status" -ne 137 ]; then alive=0; fi
        if [ "$status" -ne 137 ] && [ "$status" -ne 0 ]; then wrong "run $runs ended with status $status"; cat log; fi
        loads
        [ "$bad" -eq 0 ] || break
        [ "$killed" -lt $((kills + 20)) ] || { "$train" $options $go_on > log 2>&1; alive=0; }
    done
    [ "$bad" -ne 0 ] || same "training $runs"
    rm -rf o
done

# stopped by Ctrl-C in the middle of an epoch
"$train" $options > log 2>&1 &
process=$!
sleep "0.$(printf %03d $((took / 3 % 1000)))"
kill -INT "$process" 2> /dev/null
wait "$process"
[ -e o/resume.safetensors ] && { "$train" $options --resume > log 2>&1 || { wrong "after Ctrl-C"; cat log; }; same "after Ctrl-C"; }

# the disk is full when the state is to be saved: one line, status 1, and the old state goes on
rm -rf o
"$train" $options > log 2>&1 &
process=$!
while [ ! -e o/resume.safetensors ] && kill -0 "$process" 2> /dev/null; do sleep 0.02; done
kill -9 "$process" 2> /dev/null
wait "$process" 2> /dev/null
cp o/resume.safetensors before
(trap '' XFSZ; ulimit -f 100; "$train" $options --resume) > log 2> errors
[ $? -eq 1 ] || wrong "a full disk: the exit status is not 1"
[ "$(wc -l < errors)" -eq 1 ] || { wrong "a full disk: not one line"; cat errors; }
cmp -s before o/resume.safetensors || wrong "a full disk: the old state is not what it was"
[ -z "$(ls o/*.tmp 2> /dev/null)" ] || wrong "a full disk: temporary files are left"
"$train" $options --resume > log 2>&1 || { wrong "after a full disk"; cat log; }
same "after a full disk"

# other options, no state, a damaged state
refused() {  # refused CASE WORD OPTION...
    case=$1 word=$2
    shift 2
    "$train" $options --resume "$@" > log 2> errors
    [ $? -eq 1 ] && [ "$(wc -l < errors)" -eq 1 ] && grep -q -e "$word" errors || { wrong "$case"; cat errors; }
}
refused "another learning rate" "--lr" --lr 0.5
refused "nothing to go on with" "none/resume.safetensors" --out none
head -c 1000 o/resume.safetensors > before && cp before o/resume.safetensors
refused "a truncated state" "o/resume.safetensors"

echo "test_resume.sh: $killed kills in $runs trainings of $took ms, $resumed resumed; $bad failed"
[ "$bad" -eq 0 ] && [ "$killed" -ge "$kills" ]
