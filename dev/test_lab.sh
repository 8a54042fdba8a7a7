#!/bin/sh
# The kernel laboratory's CPU programs: every version of every ladder is right, planted errors are found and named, what is
# printed has the rows and columns it should, and bad input ends with exit status 1 and one line on stderr.
#
#   dev/test_lab.sh     after `make dev`; needs a C compiler ($CC or cc) for the planted errors
#
# POSIX sh and the usual tools. Only what fails is printed; the last line is the tally and the exit status the verdict.

root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
lab="scan_forward scan_backward dwconv3d layernorm attention matmul"
for program in $lab; do
    [ -x "$root/dev/$program" ] || { echo "test_lab.sh: dev/$program: not built; run make dev" >&2; exit 1; }
done
programs='scan_forward|scan_backward|dwconv3d|layernorm|attention|matmul|lab.sh'
. "$root/dev/test_lib.sh"

says() { check "$1: '$2'" grep -q -e "$2" stdout; }
says_not() { check "$1: no '$2'" [ "$(grep -c -e "$2" stdout)" -eq 0 ]; }
rows() { check_equal "$1: rows" "$(grep -c -E '^\| [0-9]+ \|' stdout)" "$2"; }

# ----------------------------------------------------------------------------------------------------------------------
# every version is right, on one thread and on several

for program in $lab; do
    for threads in 1 3; do
        accept "$program --check --threads $threads" "$root/dev/$program" --check --threads $threads
        says "$program" '^[1-9][0-9]* passed, 0 failed$'
    done
    accept "$program --help" "$root/dev/$program" --help
    says "$program --help" '^   0  ships'
done

# ----------------------------------------------------------------------------------------------------------------------
# planted errors: version 1 with a wrong number, a NaN, a number behind its last output

for broken in 1 2 3; do
    if ! ${CC:-cc} -std=c99 -O1 -DLAB_BREAK=$broken "$root/dev/layernorm.c" -o layernorm -lm > compiled 2>&1; then
        skip 8 "${CC:-cc} could not compile dev/layernorm.c: $(head -n 1 compiled)"
        continue
    fi
    run ./layernorm --check
    check_equal "planted error $broken: exit status" "$status" 1
    says "planted error $broken" '^40 passed, 10 failed$'
    named=$(grep -c '^FAILED layernorm_[a-z]* 1 (textbook' stderr)
    check_equal "planted error $broken: all five sizes of both ladders" "$named" 10
    check "planted error $broken: version 1 only" [ "$(grep -c -v '^FAILED layernorm_[a-z]* 1 ' stderr)" -eq 0 ]
    case $broken in
        1) check "wrong number" grep -q 'backward 1 .* at .*--channels 67: dbias: NMSE [0-9.e+-]*, the limit is 1e-10' stderr ;;
        2) check "NaN" grep -q 'backward 1 .* at .*--channels 67: dbias: NMSE -*nan, the limit is 1e-10' stderr ;;
        3) check "behind the output" grep -q 'backward 1 .* at .*--channels 67: writes before or behind' stderr ;;
    esac
    run ./layernorm all --only layernorm_backward --frames 1 --height 3 --width 5 --channels 7 --repeats 2
    check_equal "planted error $broken, timing: exit status" "$status" 1
    rows "planted error $broken, timing" 3
    says_not "planted error $broken, timing" '^| 1 |'
done

# ----------------------------------------------------------------------------------------------------------------------
# the kernel that README.md adds in ten lines: its first block of C is the function, its second the row

blocks() {
    awk -v want="$1" '$0 == "```c" { inside = 1; block++; next } /^```/ { inside = 0 } inside && block == want' \
        "$root/dev/README.md"
}
blocks 1 > function.c && blocks 2 > row.c
awk '/^static const LabKernel FORWARD/ { while ((getline line < "function.c") > 0) print line; in_ladder = 1 }
     in_ladder && /NULL, NULL, NULL/ { while ((getline line < "row.c") > 0) print line; in_ladder = 0 }
     { print }' "$root/dev/layernorm.c" > example.c
if ${CC:-cc} -std=c99 -pedantic -Wall -Wextra -Wno-unknown-pragmas -Werror -O1 -I"$root/dev" example.c -o example -lm \
    > compiled 2>&1; then
    accept "README's kernel" ./example 6 --check
    says "README's kernel" '^5 passed, 0 failed$'
else
    fail "README's kernel" "does not compile: $(grep error compiled | head -n 1)"
fi

# ----------------------------------------------------------------------------------------------------------------------
# tables

small="--frames 2 --height 3 --width 5 --repeats 2"
accept "one version" "$root/dev/scan_forward" 3 $small --channels 19
rows "one version" 1
says "one version" '^scan_forward, --batch 1 --frames 2 --height 3 --width 5 --channels 19 --states 16 --directions 3; limit '
accept "two versions" "$root/dev/scan_backward" 0,2 $small --states 3 --directions 2 --warm
rows "two versions" 2
says "two versions" 'warm caches$'
accept "all versions" "$root/dev/dwconv3d" all $small --batch 2 --only dwconv3d_forward
rows "all versions" 8
accept "no version: all" "$root/dev/attention" $small --channels 12 --heads 3 --keys 5
rows "no version: all" 8
accept "preset" "$root/dev/layernorm" 0 --preset b0.4 --repeats 1
says "preset" '^layernorm_forward, --batch 1 --frames 5 --height 8 --width 8 --channels 256; '
says "preset" "of $(getconf _NPROCESSORS_ONLN); "
says "preset" "$(date -u +%Y-%m-%d)"
accept "csv" "$root/dev/matmul" 0,2,4 --rows 20 --outputs 6 --inputs 9 --repeats 1 --csv
check_equal "csv: rows" "$(grep -c '^matmul,layer ' stdout)" 9
check_equal "csv: columns" "$(grep -v '^#' stdout | awk -F , '{ print NF }' | sort -u)" 15
accept "all products of a stage" "$root/dev/matmul" 0 --preset tiny.4 --repeats 1 --csv
check_equal "all products of a stage" "$(grep -c -E '^matmul,.* (forward|dX|dW) ' stdout)" 27
check_equal "all products of a stage: columns" "$(grep -v '^#' stdout | awk -F , '{ print NF }' | sort -u)" 15

accept "lab.sh" env RESULTS="$work/results/cpu.md" THREADS=1 OPTIONS="$small" "$root/dev/lab.sh" layernorm attention
cp results/cpu.md before
accept "lab.sh, a part anew" env RESULTS="$work/results/cpu.md" THREADS=1 OPTIONS="$small" "$root/dev/lab.sh" scan_forward
check_equal "lab.sh: parts" "$(grep '^## ' results/cpu.md | tr '\n' ' ')" '## scan_forward ## layernorm ## attention '
check "lab.sh: the other parts stay" [ "$(grep -c -x -F -f before results/cpu.md)" -ge "$(wc -l < before)" ]

# ----------------------------------------------------------------------------------------------------------------------
# bad input

for program in $lab; do
    refuse "$program: option" "--frobnicate --help" "$root/dev/$program" 0 --frobnicate 3
    refuse "$program: version" "99 from --help" "$root/dev/$program" 99
    refuse "$program: preset" "--preset b9.9 tiny.1 --help" "$root/dev/$program" --preset b9.9
done
refuse "version: a word" "three from" "$root/dev/scan_forward" three
refuse "version: two commas" "0,,1 from" "$root/dev/scan_forward" 0,,1
refuse "version: negative" "-1 from" "$root/dev/scan_forward" -1
refuse "only" "--only backwards ladder" "$root/dev/dwconv3d" --only backwards
refuse "negative size" "--batch -2 number" "$root/dev/scan_forward" --batch -2
refuse "broken size" "--height 1.5 number" "$root/dev/dwconv3d" --height 1.5
refuse "no number" "--channels many number" "$root/dev/layernorm" --channels many
refuse "value missing" "--seconds value" "$root/dev/layernorm" all --seconds
refuse "too many tokens" "tokens --help" "$root/dev/scan_forward" --batch 256 --frames 4096 --height 4096 --width 4096
refuse "too large" "GiB smaller" "$root/dev/layernorm" --batch 200 --frames 1000 --height 64 --width 64 --channels 65536
refuse "too large a product" "GiB smaller" "$root/dev/matmul" --rows 10000000 --outputs 1000000 --inputs 10
refuse "heads" "--heads 7 divide" "$root/dev/attention" --heads 7
refuse "lab.sh: part" "frobnicate scan_forward" "$root/dev/lab.sh" frobnicate
# a kernel's own memory: the textbook's arrays of all (token, channel, state)
if (ulimit -v 1500000) 2> /dev/null; then
    refuse "out of memory" "out of memory smaller" \
        sh -c "ulimit -v 1500000; exec '$root/dev/scan_forward' 1 --frames 80 --directions 1"
else
    skip 1 "this shell cannot limit memory"
fi

tally
