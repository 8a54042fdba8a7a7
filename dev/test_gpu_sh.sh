#!/bin/sh
# dev/gpu.sh without a GPU: in a copy of the sources, with stand-ins for the programs that it builds and calls. They know the
# options that the real ones have, and say what these would. What fails or hangs must not keep the rest from being run.
#
#   dev/test_gpu_sh.sh     after `make train_vivim dev`
#
# Only what fails is printed; the last line is the tally and the exit status the verdict.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
for program in train_vivim test_vivim dev/scan_forward dev/mixers; do
    [ -x "$root/$program" ] || { echo "test_gpu_sh.sh: $program: not built; run make train_vivim test_vivim dev" >&2; exit 1; }
done
programs='gpu.sh'
. "$root/dev/test_lib.sh"
place=$work  # gpu.sh has a $work of its own
export root place

mkdir -p bin tree/dev tree/prepro
cp "$root/Makefile" "$root"/*.c "$root"/*.cu tree
cp "$root"/dev/*.[ch] "$root"/dev/*.cu "$root/dev/gpu.sh" tree/dev
cp "$root"/prepro/*.[ch] tree/prepro

# standin FILE: what follows on stdin is its shell script
standin() { { echo '#!/bin/sh'; cat; } > "$1" && chmod +x "$1"; }

standin bin/nvidia-smi << 'END'
case $1 in
    --query-gpu=name) echo "NVIDIA H200" ;;
    --query-gpu=compute_cap) echo 9.0 ;;
    *) echo "name, driver_version"; echo "NVIDIA H200, 580.159" ;;
esac
END
standin bin/nvcc << 'END'
case $1 in
    --version) echo "Cuda compilation tools, release 13.0" ;;
    --list-gpu-code) printf 'sm_80\nsm_90\n' ;;
    *) exit 1 ;;
esac
END
# make: the rules must be there, for this GPU; what they would build is a stand-in
standin bin/make << 'END'
rules=$(env -i PATH="$PATH" "$real_make" -n "$@" 2>&1) || { echo "$rules"; exit 1; }
to=. made=
while [ $# -gt 0 ]; do
    case $1 in
        -C) shift; to=$1 ;;
        *cu | dev/*_cu) cp "$place/program" "$to/$1" && made=1 ;;
        data) mkdir -p data && touch data/phantom_val.bin data/phantom_train.bin ;;
    esac
    shift
done
case $made$rules in 1*compute_90,code=sm_90*) ;; 1*) exit 1 ;; esac
END
# a program for the GPU: refuses options that the CPU's has not
standin program << 'END'
name=$(basename "$0") all=$*
case $0 in *"$BROKEN"*) echo "broken"; exit 3 ;; esac
case $name in
    test_vivimcu) ask="$root/test_vivim --list" ;;
    train_vivimcu) ask="$root/train_vivim --help" ;;
    *_cu) ask="$root/dev/${name%_cu} --help" ;;
esac
for o; do
    case $name$o in *cu--*) o="  $o " ;; test_vivimcu*) ;; *) continue ;; esac
    $ask | grep -q -e "^$o" || { echo "$name does not know $o"; exit 1; }
done
case $all in
    *--bench*) echo "training step              40.1 ms   4000.0 GFLOP"
        echo "  the host's part           4.5 ms  launches and copies, mean; the rest it waits"
        printf '{"config": "b3", "threads": 16, "forward_ms": 10.00, "step_ms": 40.00, '
        echo '"forward_peak_mb": 900, "step_peak_mb": 3000}' ;;
    *--eval*) [ -f data/phantom_val.bin ] && [ -f "${all##* }" ] && echo "1000.0 frames/s, peak memory 100 MB" ;;
    *--out*)
        [ -f data/phantom_train.bin ] && mkdir -p "${all##* }" && touch "${all##* }/best.safetensors" && echo "Dice 0.9" ;;
    *) echo "12 passed, 0 failed, 0 skipped" ;;
esac
END
standin bin/compute-sanitizer << 'END'
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
END
standin bin/ncu << 'END'
echo "==PROF== Connected to process 7"
echo '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Metric Name","Metric Unit","Metric Value"'
kernel='void elementwise_kernel<(int)1, float>(float *, const float *)'
for ns in 20,000,000 15,000,000; do
    echo '"0","7","train_vivimcu","127.0.0.1","'"$kernel"'","1","7","gpu__time_duration.sum","ns","'$ns'"'
done
END
standin bin/mpicc << 'END'
echo "gcc -I/usr/include/mpi -lmpi"
END
standin bin/mpirun << 'END'
shift 2
exec "$@"
END
standin tree/dev/test_device.sh << 'END'
[ -x "$1" ] && echo "14 passed, 0 failed"
END
real_make=$(command -v make)
PATH=$work/bin:$PATH BROKEN=nothing OUT=$work/results
export PATH BROKEN OUT real_make
cd tree || exit 1
said() { check "$1: '$2'" grep -q -e "$2" "$3"; }

run dev/gpu.sh
check_equal "all steps: exit status" "$status" 0
log=$(ls "$OUT"/NVIDIA_H200-*.txt)
check "the file holds what is printed" cmp -s "$log" "$work/tree/stdout"
said "all steps" 'passed, 0 failed, 0 not finished or not run, 0 left out$' "$log"
for tool in memcheck racecheck "memcheck BF16" "memcheck, program" "initcheck, program"; do said "sanitizer" "^\[$tool\] ========= ERROR SUMMARY: 0 errors" "$log"; done
said "table of times" '^| BF16 | b3 | 8 | 5 | 10.00 | 4000 | 40.00 | 200.00 | 4.5 | 900 | 3000 |$' "$log"
said "table of clips" '^| BF16 | b3 | 1 | 150 | 10.00 | 15000 | 40.00 |' "$log"
said "kernels" '^| void elementwise_kernel<(int)1, float> | 2 | 35.000 | 100.0 |$' "$log"
said "kernels" "^2 kernels, 35.00 ms; a step takes 40.00 ms: 12.5 % of it are launches and gaps" "$log"
check_equal "steps, each named" "$(grep -c '^=== ' "$log")" 11

rm -rf "$OUT"
BROKEN=BF16 run dev/gpu.sh build test run lab
check_equal "a broken program: exit status" "$status" 1
said "built once" '^\[FP32\] built before' stdout
said "a broken program" '^\[BF16\] FAILED with status 3 .*: build/gpu/BF16/test_vivimcu$' stdout
said "the next step" '^passed .*: build/gpu/FP32/dev/attention_cu all --preset b0.1' stdout
check "its end names it" [ "$(sed '1,/^=== done/d' stdout | grep -c '^FAILED')" -ge 3 ]

LIMIT=0 run dev/gpu.sh lab
said "no time" '^NOT RUN, no time left' stdout
check_equal "no time: exit status" "$status" 1

rm -rf "$OUT"
standin build/gpu/FP32/test_vivimcu << 'END'
echo "ok    op.matmul"
exec sleep 100
END
LIMIT=2 run dev/gpu.sh test
said "a program that hangs" '^\[FP32\] NOT FINISHED in [12] s .*test_vivimcu$' stdout
said "what it said before" '^\[FP32\] ok    op.matmul' "$(ls "$OUT"/*.txt)"
timeout 1 dev/gpu.sh test > stdout 2> stderr
check "killed: the file holds what was said" grep -q "op.matmul" "$OUT"/*.txt

input=/dev/null
refuse "a step that there is not" "no step tset" dev/gpu.sh tset
rm "$work/bin/nvidia-smi"
[ -n "$(command -v nvidia-smi)" ] || refuse "no driver" "nvidia-smi" dev/gpu.sh
tally
