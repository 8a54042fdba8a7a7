#!/bin/sh
# Does the program for the GPU do what the one for the CPU does? Training, validation, prediction, --resume across the two.
#
#   dev/test_device.sh PROGRAM [LIMIT]   after `make train_vivim prepro`; PROGRAM: ./train_vivim_emu or ./train_vivimcu
#
# LIMIT: the largest relative difference of a loss [2e-5; of PRECISION=BF16 5e-2]. Prints what differs and a last line.
set -u
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
[ $# -ge 1 ] || { echo "usage: dev/test_device.sh PROGRAM [LIMIT]" >&2; exit 1; }
gpu=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") limit=${2:-2e-5}
cpu=$root/train_vivim phantom=$root/prepro/phantom affine=$root/prepro/affine
programs='train_vivim|train_vivimcu'
for program in "$cpu" "$gpu" "$phantom" "$affine"; do
    [ -x "$program" ] || { echo "test_device.sh: $program: not built; run make train_vivim prepro" >&2; exit 1; }
done
. "$root/dev/test_lib.sh"

# close WHAT A B: files of numbers, as many in both, differ by no more than LIMIT of the larger
close() {
    worst=$(paste -d' ' "$2" "$3" | awk -v n="$(wc -l < "$2")" 'NF == 2 { a = $1 < 0 ? -$1 : $1; b = $2 < 0 ? -$2 : $2
        d = $1 - $2; d = (d < 0 ? -d : d) / (a > b ? a : b > 0 ? b : 1); if (!(d <= worst)) worst = d; rows++ }
        END { print (n > 0 && rows == NR && rows == n ? worst + 0 : "nan") }')
    echo "$1: $worst"
    if awk -v d="$worst" -v limit="$limit" 'BEGIN { exit !(d != "nan" && d <= limit) }'; then pass
    else fail "$1" "differs by $worst, more than $limit"; fi
}
losses() { awk '/^train/ { print $5; print $6; print $7; print $8 } /^val/ { print $3 }' "$1/log.txt"; }

"$phantom" --out t.bin --videos 3 --frames 3 --size 32x32 --seed 1 > log && "$phantom" --out v.bin --videos 1 --frames 5 \
    --size 32x32 --seed 2 > log && "$affine" --shard t.bin --out f.safetensors --steps 20 > log || { cat log; exit 1; }
options="--train t.bin --val v.bin --affine f.safetensors --frames 3 --batch 2 --lr 5e-4 --epochs 1"  # 4 steps

for side in cpu gpu; do
    eval "program=\$$side"
    run "$program" $options --out "$side"
    [ "$status" -eq 0 ] && pass || fail "training, $side" "exit status $status"
    losses "$side" > "$side.losses"
done
close "losses" cpu.losses gpu.losses

# stopped on the GPU by a signal, after a step at least, and resumed on each side
"$gpu" $options --save-every 1 --out begun > stdout 2> stderr & pid=$!
while [ ! -s begun/resume.safetensors ] && kill -0 $pid 2> /dev/null; do sleep 0.05; done
kill -INT $pid 2> /dev/null
wait $pid
echo "stopped after $(grep -c '^train' begun/log.txt) of $(grep -c '^train' gpu/log.txt) steps"
for side in cpu gpu; do
    eval "program=\$$side"
    rm -rf moved && cp -r begun moved
    run "$program" $options --save-every 1 --out moved --resume
    [ "$status" -eq 0 ] && pass || fail "resumed, $side" "exit status $status"
    losses moved > moved.losses
    close "losses of a training that the GPU began, and then $side" cpu.losses moved.losses
done

# the same network on both sides, clip by clip: every pass of a plan after the second is replayed. Probabilities are bytes.
for stride in 0 1; do
    batch=; [ $stride = 1 ] || batch='--batch 1'  # with a stride there is one anyway
    for side in cpu gpu; do
        eval "program=\$$side"
        run "$program" --predict v.bin --checkpoint cpu/best.safetensors --out "$side.bin" --stride "$stride" $batch
        [ "$status" -eq 0 ] && pass || fail "prediction, $side" "exit status $status"
        od -An -v -t u1 -w1 "$side.bin" > "$side.bytes"
    done
    paste cpu.bytes gpu.bytes | awk '{ d = $1 > $2 ? $1 - $2 : $2 - $1; if (d > most) most = d; if ($2 != last) changes++; last = $2 }
                                     END { print NR, most + 0, changes }' > worst
    echo "bytes, largest difference, changes from one to the next, --stride $stride: $(cat worst)"
    if awk -v limit="$limit" '{ exit !($1 > 0 && $3 > 500 && $2 <= 1.01 + 255 * limit) }' worst; then pass
    else fail "prediction, --stride $stride" "differs"; fi
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
