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
programs=evaluate
. "$root/dev/test_lib.sh"

refuses() {  # refuses CASE WORDS OPTIONS: evaluate does, and prints no table
    what=$1 words=$2
    shift 2
    refuse "$what" "$words" "$evaluate" "$@"
    check "$what: no table" [ ! -s stdout ]
}

accepts() {  # accepts CASE OPTIONS
    what=$1
    shift
    accept "$what" "$evaluate" "$@"
}

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
            accepts "$pred, $masks" --pred "$pred" --masks "$masks" --json out.json
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

    accepts "4 threads" --pred in/pred --masks in/masks.bin --threads 4 --json threads.json
    check "4 threads: the same table" cmp stdout first.txt
    accepts "perfect predictions" --pred in/masks --masks in/masks.bin --json perfect.json
    check "perfect: specificity" near "$(of perfect.json ultrasound specificity)" 1
    check "perfect: MAE" near "$(of perfect.json polyp mae)" 0
    accepts "flat folders" --pred in/flat_pred --masks in/flat_masks --json flat.json
    run "$evaluate" --pred in/pred --masks in/masks
    grep '^v10' stdout | sed 's/^v10 *//' > of_video
    run "$evaluate" --pred in/flat_pred --masks in/flat_masks
    grep '^flat_masks' stdout | sed 's/^flat_masks *//' > of_flat
    check "flat folders: the numbers of the same video" cmp of_video of_flat
    for protocol in ultrasound polyp released; do
        accepts "--protocol $protocol" --pred in/pred --masks in/masks --protocol $protocol --json one.json
        check "--protocol $protocol: its numbers" [ "$(of one.json $protocol dice)" = "$(of first.json $protocol dice)" ]
        check "--protocol $protocol: no other" [ "$(grep -c -E '"(ultrasound|polyp|released)": \{' one.json)" -le 5 ]
    done
    accepts "--keep-ends" --pred in/pred --masks in/masks --keep-ends --json ends.json
    check "--keep-ends: all frames count" [ "$(of ends.json overall polyp_frames)" = 14 ]
    check "--keep-ends: another maxDice" sh -c "[ $(of ends.json polyp max_dice) != $(of first.json polyp max_dice) ]"
    accepts "--help" --help
    for option in pred masks protocol json keep-ends threads help; do
        check "--help lists --$option" grep -q -e "--$option " stdout
    done

    # JPEG: a grey picture of 16 x 8, the right half white; other files and hidden ones are passed over
    mkdir -p jpeg/v && printf "$jpeg" > jpeg/v/1.jpg && cp jpeg/v/1.jpg jpeg/v/2.JPEG
    echo notes > jpeg/v/notes.txt && : > jpeg/v/.hidden.png
    accepts "JPEG" --pred jpeg --masks jpeg --json jpeg.json
    check "JPEG: Dice" near "$(of jpeg.json ultrasound dice)" 1
    check "JPEG: specificity" near "$(of jpeg.json ultrasound specificity)" 1

    # an older file is replaced as a whole: whoever has it open keeps it
    echo old > old.json && ln old.json link.json
    accepts "over an older JSON" --pred in/pred --masks in/masks --json old.json
    check "over an older JSON: the old bytes are left alone" [ "$(cat link.json)" = old ]
    check "over an older JSON: the new ones are there" grep -q per_video old.json
}

# ----------------------------------------------------------------------------------------------------------------------
# bad input

refuse_pair() {  # refuse_pair CASE WORDS PRED MASKS
    refuses "$1" "$2" --pred "$3" --masks "$4" --json new/j
}

fresh() { rm -rf bad && cp -R "in/$1" bad; }  # fresh WHAT: bad is a copy of in/WHAT

test_bad() {
    refuses "no options" "--pred"
    refuses "no masks" "--masks" --pred in/pred
    refuses "unknown option" "--mask" --pred in/pred --mask in/masks
    refuses "no value" "--masks" --pred in/pred --masks
    refuses "unknown protocol" "--protocol roc" --pred in/pred --masks in/masks --protocol roc
    refuses "threads" "--threads" --pred in/pred --masks in/masks --threads x
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
    # videos 0, 1 of one name; then 0, 2: which is which?
    cp in/masks.bin twice_pred.bin && cp in/masks.bin twice.bin
    for file in twice_pred.bin twice.bin; do put $file 1028 'x\000' && put $file 1092 'x\000' && put $file 1156 'y\000'; done
    accepts "two videos of one name, the same order" --pred twice_pred.bin --masks twice.bin
    put twice_pred.bin 1092 'y\000' && put twice_pred.bin 1156 'x\000'
    refuse_pair "two videos of one name, another order" "twice.bin 'x' twice_pred.bin order" twice_pred.bin twice.bin

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
    refuses "4 threads: the first damage is told" "bad/v10/f10.png" --pred in/pred --masks bad --threads 4 --json new/j
    for bytes in 3 40 100 120 158; do
        rm -rf bad && mkdir -p bad/v && cp jpeg/v/2.JPEG bad/v/2.jpg && cut_to jpeg/v/1.jpg $bytes bad/v/1.jpg
        refuse_pair "JPEG of $bytes bytes" "bad/v/1.jpg" bad jpeg
    done

    # masks of 0 and 1: all pixels of the shard's mask plane become 1
    planes=$((1024 + 4 * 64 + 14 * 37 * 45 * 3))
    cut_to in/masks.bin $planes ones.bin
    dd if=in/masks.bin bs=$planes skip=1 2> /dev/null | tr '\377' '\001' >> ones.bin
    refuse_pair "masks of 0 and 1" "ones.bin 127" in/pred ones.bin
    accepts "predictions of 0 and 1" --pred ones.bin --masks in/masks.bin
    check "predictions of 0 and 1: a note" grep -q '^note: ' stdout

    mkdir short && cp in/pred/short/* short
    refuses "polyp without a frame to keep" "--keep-ends" --pred short --masks short --protocol polyp --json new/j

    refuses "JSON in a missing folder" "--json missing/j" --pred in/pred --masks in/masks --json missing/j
    refuses "JSON is a folder" "--json empty" --pred in/pred --masks in/masks --json empty
    refuses "JSON is a pipe" "--json pipe" --pred in/pred --masks in/masks --json pipe
    cp in/pred.bin kept.bin
    refuses "JSON over the predictions" "--json kept.bin" --pred kept.bin --masks in/masks --json kept.bin
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
tally
