#!/bin/sh
# Uses dev/evaluate as a person does. Shards and folders of the same videos must give the same numbers, those that plain
# loops give; refused input must end with exit status 1, one line on stderr that names what is wrong, and no file written.
#
#   dev/test_evaluate.sh          after `make dev/evaluate dev/test_metrics`
#
# POSIX sh and the usual tools. Only what fails is printed; the last line is the tally and the exit status the verdict.

root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
evaluate=$root/dev/evaluate test_metrics=$root/dev/test_metrics
[ -x "$test_metrics" ] || { echo "test_evaluate.sh: $test_metrics: not built; run make dev/test_metrics" >&2; exit 1; }
if [ ! -x "$evaluate" ]; then
    echo "skipped 1: dev/evaluate was not built (no libjpeg or libpng)"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
cd "$work" || exit 1
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C
export OMP_NUM_THREADS OMP_WAIT_POLICY LC_ALL

# ----------------------------------------------------------------------------------------------------------------------
# the machinery: run a command, judge it, count

passed=0 failed=0 skipped=0

pass() { passed=$((passed + 1)); }

fail() {  # fail CASE PROBLEM: the last command and what it said are shown with it
    failed=$((failed + 1))
    echo "FAILED $1: $2"
    echo "    command: $command"
    echo "    status:  $status"
    sed 's/^/    stdout:  /' stdout | tail -n 4
    sed 's/^/    stderr:  /' stderr | head -n 12
}

skip() {  # skip COUNT WHY
    skipped=$((skipped + $1))
    echo "skipped $1: $2"
}

run() {  # run COMMAND: sets status; output goes to the files stdout and stderr
    command=$*
    ("$@") > stdout 2> stderr < /dev/null
    status=$?
}

# refuse CASE WORDS OPTIONS: evaluate exits 1 with one line on stderr, "evaluate: ...", in which every one of WORDS stands,
# and nothing on stdout. The options may say --json new/j: new/ must hold no file afterwards.
refuse() {
    what=$1 words=$2 problem=
    shift 2
    rm -rf new && mkdir new
    run "$evaluate" "$@"
    [ "$status" -eq 1 ] || problem="the exit status is not 1"
    [ -n "$problem" ] || [ "$(wc -l < stderr)" -eq 1 ] || problem="stderr is not one line"
    [ -n "$problem" ] || grep -q '^evaluate: ' stderr || problem="stderr does not begin with the program's name"
    [ -n "$problem" ] || [ ! -s stdout ] || problem="it prints a table"
    for word in $words; do
        [ -n "$problem" ] || grep -q -F -e "$word" stderr || problem="stderr does not say '$word'"
    done
    [ -n "$problem" ] || [ -z "$(find new -type f)" ] || problem="it left $(find new -type f | head -n 1)"
    if [ -z "$problem" ]; then pass; else fail "$what" "$problem"; fi
}

accept() {  # accept CASE OPTIONS: evaluate exits 0 and says nothing on stderr
    what=$1
    shift
    run "$evaluate" "$@"
    if [ "$status" -ne 0 ]; then fail "$what" "the exit status is not 0"
    elif [ -s stderr ]; then fail "$what" "it complains"
    else pass; fi
}

check() {  # check CASE TEST: TEST is any command; its status decides
    checked=$1
    shift
    if "$@" > /dev/null 2>&1; then pass; else fail "$checked" "not so: $*"; fi
}

put() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2> /dev/null; }  # put FILE OFFSET BYTES (octal escapes)
cut_to() { dd if="$1" of="$3" bs="$2" count=1 2> /dev/null; }                 # cut_to FILE BYTES OUT
size() { wc -c < "$1" | tr -d ' '; }

# of JSON PROTOCOL KEY: a number of the overall scores, which come first in the file
of() {
    if [ "$2" = overall ]; then line=$(grep -m 1 '"overall"' "$1"); else line=$(grep -m 1 "^ *\"$2\": {" "$1"); fi
    printf '%s\n' "$line" | tr ',{}' '\n\n\n' | sed -n "s/^ *\"$3\": //p" | head -n 1
}

near() { awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; exit !(a != "" && b != "" && d < 1e-6 && d > -1e-6) }'; }

# ----------------------------------------------------------------------------------------------------------------------
# good input

test_numbers() {  # test_numbers EXPECTED PRED...: every pair of PRED and masks gives the numbers of EXPECTED, and the same
    expected=$1
    shift
    rm -f first.txt
    for pred in "$@"; do
        for masks in in/masks.bin in/masks; do
            accept "$pred, $masks" --pred "$pred" --masks "$masks" --json out.json
            grep -v '"pred"' out.json > numbers.json
            [ -e first.txt ] || { cp stdout first.txt; cp numbers.json first.json; }
            check "$pred, $masks: the same table" cmp stdout first.txt
            check "$pred, $masks: the same JSON" cmp numbers.json first.json
        done
    done
    while read -r protocol key value; do
        check "$expected: $protocol $key $value" near "$(of first.json "$protocol" "$key")" "$value"
    done < "$expected"
}

test_good() {
    test_numbers in/expected_small.txt in/small.bin in/small
    check "smaller predictions are resized" grep -q '14 predictions resized' first.txt
    test_numbers in/expected.txt in/pred.bin in/pred in/pred/
    check "frames empty in both are told" grep -q '^4 videos, 14 frames, 1 of them empty in both' first.txt
    check "a video of two frames has no polyp scores" grep -q '^short *0 *0 *- *-' first.txt
    check "nor in the JSON" grep -q '"polyp": null' first.json
    check "JSON: every bracket is closed" [ "$(tr -cd '{[' < out.json | wc -c)" -eq "$(tr -cd ']}' < out.json | wc -c)" ]
    check "JSON: no NaN, no infinity" sh -c '! grep -q -i -E ": *-?(nan|inf)" out.json'
    if command -v python3 > /dev/null 2>&1; then
        check "JSON: Python reads it" python3 -c 'import json; j = json.load(open("out.json")); assert len(j["per_video"]) == 4'
    else
        skip 1 "JSON in Python: there is no python3"
    fi
    check "no temporary file" [ ! -e out.json.tmp ]

    accept "4 threads" --pred in/pred --masks in/masks.bin --threads 4 --json threads.json
    check "4 threads: the same table" cmp stdout first.txt
    accept "perfect predictions" --pred in/masks --masks in/masks.bin --json perfect.json
    check "perfect: specificity" near "$(of perfect.json ultrasound specificity)" 1
    check "perfect: MAE" near "$(of perfect.json polyp mae)" 0
    accept "flat folders" --pred in/flat_pred --masks in/flat_masks --json flat.json
    run "$evaluate" --pred in/pred --masks in/masks
    grep '^v10' stdout | sed 's/^v10 *//' > of_video
    run "$evaluate" --pred in/flat_pred --masks in/flat_masks
    grep '^flat_masks' stdout | sed 's/^flat_masks *//' > of_flat
    check "flat folders: the numbers of the same video" cmp of_video of_flat
    for protocol in ultrasound polyp released; do
        accept "--protocol $protocol" --pred in/pred --masks in/masks --protocol $protocol --json one.json
        check "--protocol $protocol: its numbers" [ "$(of one.json $protocol dice)" = "$(of first.json $protocol dice)" ]
        check "--protocol $protocol: no other" [ "$(grep -c -E '"(ultrasound|polyp|released)": \{' one.json)" -le 5 ]
    done
    accept "--keep-ends" --pred in/pred --masks in/masks --keep-ends --json ends.json
    check "--keep-ends: all frames count" [ "$(of ends.json overall polyp_frames)" = 14 ]
    check "--keep-ends: another maxDice" sh -c "[ $(of ends.json polyp max_dice) != $(of first.json polyp max_dice) ]"
    accept "--help" --help
    for option in pred masks protocol json keep-ends threads help; do
        check "--help lists --$option" grep -q -e "--$option " stdout
    done

    # JPEG: a grey picture of 16 x 8, the right half white; other files and hidden ones are passed over
    mkdir -p jpeg/v && printf "$jpeg" > jpeg/v/1.jpg && cp jpeg/v/1.jpg jpeg/v/2.JPEG
    echo notes > jpeg/v/notes.txt && : > jpeg/v/.hidden.png
    accept "JPEG" --pred jpeg --masks jpeg --json jpeg.json
    check "JPEG: Dice" near "$(of jpeg.json ultrasound dice)" 1
    check "JPEG: specificity" near "$(of jpeg.json ultrasound specificity)" 1

    # an older file is replaced as a whole: whoever has it open keeps it
    echo old > old.json && ln old.json link.json
    accept "over an older JSON" --pred in/pred --masks in/masks --json old.json
    check "over an older JSON: the old bytes are left alone" [ "$(cat link.json)" = old ]
    check "over an older JSON: the new ones are there" grep -q per_video old.json
}

# ----------------------------------------------------------------------------------------------------------------------
# bad input

refuse_pair() {  # refuse_pair CASE WORDS PRED MASKS
    refuse "$1" "$2" --pred "$3" --masks "$4" --json new/j
}

fresh() { rm -rf bad && cp -R "in/$1" bad; }  # fresh WHAT: bad is a copy of in/WHAT

test_bad() {
    refuse "no options" "--pred"
    refuse "no masks" "--masks" --pred in/pred
    refuse "unknown option" "--mask" --pred in/pred --mask in/masks
    refuse "no value" "--masks" --pred in/pred --masks
    refuse "unknown protocol" "--protocol roc" --pred in/pred --masks in/masks --protocol roc
    refuse "threads" "--threads" --pred in/pred --masks in/masks --threads x
    refuse_pair "missing prediction" "missing.bin --pred" missing.bin in/masks
    refuse_pair "missing masks" "missing --masks" in/pred missing
    refuse_pair "not a shard" "expected.txt shard" in/expected.txt in/masks
    mkfifo pipe
    refuse_pair "a pipe" "pipe" pipe in/masks

    cut_to in/pred.bin 900 bad.bin && refuse_pair "shard of 900 bytes" bad.bin bad.bin in/masks
    cut_to in/pred.bin $(($(size in/pred.bin) - 1)) bad.bin && refuse_pair "shard too short" "bad.bin promises" bad.bin in/masks
    cut_to in/pred.bin $((1024 + 4 * 64 + 14 * 37 * 45 * 3)) nomasks.bin && put nomasks.bin 28 '\000'
    refuse_pair "prediction shard without masks" "nomasks.bin masks --pred" nomasks.bin in/masks
    refuse_pair "shard without masks" "nomasks.bin masks --masks" in/pred nomasks.bin
    cp in/pred.bin bad.bin && put bad.bin 1028 'x10'
    refuse_pair "shard, another video" "bad.bin v10" bad.bin in/masks.bin
    cp in/pred.bin bad.bin && put bad.bin 1028 'v\377\060'
    refuse_pair "shard, a name that is not UTF-8" "bad.bin UTF-8" bad.bin in/masks.bin

    mkdir empty && refuse_pair "empty folder" "empty" empty in/masks
    refuse_pair "empty folder of masks" "empty" in/pred empty
    fresh pred && rm bad/v2/*
    refuse_pair "empty video" "bad/v2" bad in/masks
    fresh pred && rm -r bad/v2
    refuse_pair "video missing" "bad v2 in/masks" bad in/masks
    refuse_pair "video missing, shard" "bad v2 in/masks.bin" bad in/masks.bin
    refuse_pair "video too many" "bad v2 in/pred" in/pred bad
    fresh pred && rm bad/v2/f9.png
    refuse_pair "frame missing" "in/masks/v2/f9.png bad" bad in/masks
    refuse_pair "frame missing, shard" "bad v2 3 4 in/masks.bin" bad in/masks.bin
    refuse_pair "frame too many" "in/pred/v2/f9.png bad" in/pred bad
    fresh pred && mv bad/v2/f9.png bad/v2/g9.png
    refuse_pair "frame renamed" "v2/f9.png bad" bad in/masks
    fresh pred && cp bad/v2/f9.png bad/v2/f9.jpg
    refuse_pair "two pictures of one name" "bad/v2/f9" bad in/masks
    fresh pred && cp bad/v2/f9.png bad/top.png
    refuse_pair "pictures beside folders" "bad top" bad in/masks
    refuse_pair "flat against several videos" "in/masks" in/flat_pred in/masks
    fresh pred && mv bad/v2/f9.png "$(printf 'bad/v2/f9\n.png')"
    refuse_pair "a line break in a name" "bad/v2" bad in/masks

    for bytes in 1 7 8 20 33 60 500 $(($(size in/pred/v2/f9.png) - 1)) $(($(size in/pred/v2/f9.png) - 12)); do
        fresh pred && cut_to in/pred/v2/f9.png "$bytes" bad/v2/f9.png
        refuse_pair "PNG of $bytes bytes" "bad/v2/f9.png" bad in/masks
    done
    fresh pred && : > bad/v2/f9.png
    refuse_pair "PNG of no bytes" "bad/v2/f9.png empty" bad in/masks
    fresh pred && put bad/v2/f9.png 80 '\001\002\003\004'
    refuse_pair "damaged PNG" "bad/v2/f9.png PNG" bad in/masks
    fresh pred && echo text > bad/v2/f9.png
    refuse_pair "text called PNG" "bad/v2/f9.png PNG" bad in/masks
    fresh masks && cut_to in/masks/v10/f10.png 90 bad/v10/f10.png
    refuse_pair "damaged mask" "bad/v10/f10.png" in/pred bad
    refuse "4 threads: the first damage is told" "bad/v10/f10.png" --pred in/pred --masks bad --threads 4 --json new/j
    for bytes in 3 40 100 120 158; do
        rm -rf bad && mkdir -p bad/v && cp jpeg/v/2.JPEG bad/v/2.jpg && cut_to jpeg/v/1.jpg $bytes bad/v/1.jpg
        refuse_pair "JPEG of $bytes bytes" "bad/v/1.jpg" bad jpeg
    done

    # masks of 0 and 1: all pixels of the shard's mask plane become 1
    planes=$((1024 + 4 * 64 + 14 * 37 * 45 * 3))
    cut_to in/masks.bin $planes ones.bin
    dd if=in/masks.bin bs=$planes skip=1 2> /dev/null | tr '\377' '\001' >> ones.bin
    refuse_pair "masks of 0 and 1" "ones.bin 127" in/pred ones.bin
    accept "predictions of 0 and 1" --pred ones.bin --masks in/masks.bin
    check "predictions of 0 and 1: a note" grep -q '^note: ' stdout

    mkdir short && cp in/pred/short/* short
    refuse "polyp without a frame to keep" "--keep-ends" --pred short --masks short --protocol polyp --json new/j

    refuse "JSON in a missing folder" "--json missing/j" --pred in/pred --masks in/masks --json missing/j
    refuse "JSON is a folder" "--json empty" --pred in/pred --masks in/masks --json empty
    refuse "JSON is a pipe" "--json pipe" --pred in/pred --masks in/masks --json pipe
    cp in/pred.bin kept.bin
    refuse "JSON over the predictions" "--json kept.bin" --pred kept.bin --masks in/masks --json kept.bin
    check "JSON over the predictions: they are whole" cmp kept.bin in/pred.bin
    check "no temporary file anywhere" [ -z "$(find . -name '*.tmp')" ]
    if (trap "" XFSZ; ulimit -f 1 && dd if=in/masks.bin of=limited bs=8192 count=1) > /dev/null 2>&1; then
        skip 1 "JSON on a full disk: this shell cannot limit file sizes"
    else
        echo old > kept.json
        run sh -c 'trap "" XFSZ; ulimit -f 1; "$0" "$@"' "$evaluate" --pred in/pred --masks in/masks --json kept.json
        check "JSON on a full disk: refused" [ "$status" -eq 1 ]
        check "JSON on a full disk: the older one is whole" [ "$(cat kept.json)" = old ]
        check "JSON on a full disk: no temporary file" [ ! -e kept.json.tmp ]
    fi
}

# ----------------------------------------------------------------------------------------------------------------------

jpeg='\377\330\377\340\000\020\112\106\111\106\000\001\001\000\000\001\000\001\000\000\377\333\000\103\000'
for i in 1 2 3 4; do jpeg=$jpeg'\001\001\001\001\001\001\001\001\001\001\001\001\001\001\001\001'; done
jpeg=$jpeg'\377\300\000\013\010\000\010\000\020\001\001\021\000\377\304\000\024\000\001\000\000\000\000\000\000\000'
jpeg=$jpeg'\000\000\000\000\000\000\000\000\013\377\304\000\024\020\001\000\000\000\000\000\000\000\000\000\000\000\000'
jpeg=$jpeg'\000\000\000\000\000\377\332\000\010\001\001\000\000\077\000\077\363\374\077\377\331'

"$test_metrics" --write in || { echo "test_evaluate.sh: dev/test_metrics writes no files"; exit 1; }
test_good
test_bad
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
