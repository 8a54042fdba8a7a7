#!/bin/sh
# dev/mixers: its four layers are what a textbook says, a planted error is noticed, the tables and curves come out, what takes
# too long is left out, and bad input ends with exit status 1 and one line on stderr.
#
#   dev/test_mixers.sh     after `make dev/mixers`; needs a C compiler ($CC or cc) for the planted error
#
# POSIX sh and the usual tools; xmllint where it is. Only what fails is printed; the last line is the tally and the exit status
# the verdict.

root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
mixers=$root/dev/mixers
[ -x "$mixers" ] || { echo "test_mixers.sh: $mixers: not built; run make dev/mixers" >&2; exit 1; }
programs=mixers
. "$root/dev/test_lib.sh"

says() { check "$1: '$2'" grep -q -e "$2" stdout; }

# ----------------------------------------------------------------------------------------------------------------------
# right, and known to be

accept check "$mixers" --check
says check '^77 tensors compared with the textbook, 0 wrong$'

if ${CC:-cc} -std=c99 -O1 -DMIXERS_BREAK "$root/dev/mixers.c" -o broken -lm > compiled 2>&1; then
    run ./broken --check
    check_equal "planted error: exit status" "$status" 1
    says "planted error" '^FAILED M2: gradient of the input: '
    says "planted error" '^FAILED M3: gradient of the input: '
    check "planted error: only the gradients of M2 and M3 are wrong" \
        [ "$(grep FAILED stdout | grep -c -v '^FAILED M[23]: ')" -eq 0 ]
    check "planted error: the output is right" [ "$(grep -c forward stdout)" -eq 0 ]
else
    skip 5 "${CC:-cc} could not compile dev/mixers.c: $(head -n 1 compiled)"
fi

# ----------------------------------------------------------------------------------------------------------------------
# tables and curves

accept measuring "$mixers" --csv --config tiny --stage 3 --size 64 --frames 1,3
cp stdout a.csv
says measuring '^# tiny, stage 3: 4 x 4 tokens of 40 channels per frame, 5 heads, 1 thread$'
for mixer in mamba M1 M2 M3; do
    for training in 0 1; do
        rows=$(grep -c "^$mixer,[13],$training,[0-9.]*,[0-9.]*," a.csv)
        check_equal "measuring: rows of $mixer, training $training" "$rows" 2
    done
done
check_equal "measuring: lines" "$(wc -l < a.csv | tr -d ' ')" 18
# what the probabilities of 3 frames would take: 5 heads x 48 x 48 x 4 bytes; the window is the clip; 5 x 48 x (16 + 3) x 4
check_equal "probabilities" "$(grep ',3,1,' a.csv | cut -d, -f7 | tr '\n' ' ')" "0.000 0.044 0.044 0.017 "

accept "one more" "$mixers" --csv --config tiny --stage 3 --size 64 --frames 9 --mixers mamba,M2
cat stdout >> a.csv
accept "from two runs" "$mixers" --from a.csv --svg a.svg --md a.md
check "no frame is missing from the table" grep -q '^| 9 | [0-9.]* | - | [0-9.]* | - |$' a.md
check_equal "tables" "$(grep -c '^| frames: ' a.md)" 5
check_equal "curves: solid and dotted" "$(grep -c '<path class="curve' a.svg)" 16
check_equal "curves: dots, the legend's included" "$(grep -c '<circle class="c0"' a.svg)" 7
for colour in light dark; do check "$colour" grep -q "$colour" a.svg; done
if command -v xmllint > /dev/null; then check "the SVG is well-formed" xmllint --noout a.svg; else skip 1 "no xmllint"; fi

accept "one number of frames" "$mixers" --config tiny --stage 4 --size 32 --frames 2 --svg b.svg
check "no coordinate is nan or inf" [ "$(grep -c -i -e nan -e '[^a-z]inf' b.svg)" -eq 0 ]

accept "too long" "$mixers" --config tiny --stage 1 --size 64 --frames 1,400,800 --mixers M1 --seconds 1
check_equal "too long: left out" "$(grep -c 'M1 global.* -$' stdout)" 4
check_equal "too long: not left out" "$(grep -c 'M1 global.* MB$' stdout)" 2

# ----------------------------------------------------------------------------------------------------------------------
# bad input

small="--config tiny --stage 4 --size 32 --frames 1 --mixers M2"
refuse "no such stage" "--stage 5" "$mixers" --stage 5
refuse "no such config" "--config b9" "$mixers" --config b9
refuse "no such mixer" "--mixers M1,M4 mamba" "$mixers" --mixers M1,M4
refuse "no mixer" "--mixers" "$mixers" --mixers M1,
refuse "frames: zero" "--frames 0" "$mixers" --frames 0
refuse "frames: text" "--frames 5,x" "$mixers" --frames 5,x
refuse "frames: descending" "--frames 8,5" "$mixers" --frames 8,5
refuse "frames: too small" "--size 31" "$mixers" --size 31
refuse "too much at once" "fewer --frames" "$mixers" --config b3 --stage 1 --size 4096 --frames 64
refuse "no such option" "--fast" "$mixers" --fast
refuse "no such file" "none.csv" "$mixers" --from none.csv
refuse "no such folder" "new/none/a.svg folder" "$mixers" $small --svg new/none/a.svg
: > empty.csv
refuse "empty" "empty.csv" "$mixers" --from empty.csv --svg new/a.svg
sed 's/^M1,3,1,[0-9.]*/M1,3,1,nan/' a.csv > bad.csv
refuse "not a number" "bad.csv:1" "$mixers" --from bad.csv --svg new/a.svg
sed '$s/.*/M9,1,1,1,1,1,1/' a.csv > bad.csv
refuse "unknown mixer in a file" "bad.csv:" "$mixers" --from bad.csv --svg new/a.svg
{ cat a.csv; echo "# b3, stage 1"; } > bad.csv
refuse "two conditions" "other conditions" "$mixers" --from bad.csv --md new/a.md
grep -v ',1,[0-9.]*,[0-9.]*,[0-9.]*,[0-9.]*$' a.csv > evaluation.csv
run "$mixers" --from evaluation.csv --svg c.svg
check_equal "nothing in training: exit status" "$status" 1
check "nothing in training" grep -q 'nothing was measured in training' stderr
if [ -w /dev/full ]; then refuse "full disk" "/dev/full disk" "$mixers" --from a.csv --svg /dev/full
else skip 1 "no /dev/full"; fi

tally
