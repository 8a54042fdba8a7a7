#!/bin/sh
# prepro/overlay and dev/report as a person uses them: good input gives the pictures and the page that are promised, to the
# pixel; bad input ends with exit status 1 and one line on stderr that names the file or option, and leaves no file behind.
#
#   dev/test_pictures.sh     after `make prepro/phantom prepro/overlay dev/report`
#
# POSIX sh and the usual tools; xmllint, and prepro/frames for pictures that others must be able to read, where they are.
# Only what fails is printed; the last line is the tally and the exit status the verdict.

root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
phantom=$root/prepro/phantom overlay=$root/prepro/overlay report=$root/dev/report frames=$root/prepro/frames
for program in "$phantom" "$overlay" "$report"; do
    [ -x "$program" ] && continue
    echo "test_pictures.sh: $program: not built; run make prepro/phantom prepro/overlay dev/report" >&2
    exit 1
done
programs='overlay|report'
. "$root/dev/test_lib.sh"

# ----------------------------------------------------------------------------------------------------------------------
# shards by hand

number() { printf "$(printf '\\%03o\\%03o\\%03o\\%03o' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24)))"; }
repeat() { dd if=/dev/zero bs="$1" count=1 2> /dev/null | tr '\000' "\\$2"; }  # repeat N VALUE (three octal digits)

# shard H W MASKS NAME FRAMES...: header and table; the pixels must follow
shard_head() {
    H=$1 W=$2 masks=$3 videos=0 total=0
    shift 3
    : > table
    while [ $# -gt 0 ]; do
        { number "$2"; printf '%s' "$1"; repeat $((60 - ${#1})) 000; } >> table
        videos=$((videos + 1)) total=$((total + $2))
        shift 2
    done
    for field in 1297503830 1 $videos $total "$H" "$W" 3 "$masks"; do number "$field"; done
    repeat 992 000
    cat table
}

mask() { printf '%s' "$1" | tr '.?#-' '\000\177\377\200'; }  # 0, 127, 128, 255 as . ? - #

pixel() {  # pixel RAW W X Y: its three bytes
    od -A n -t u1 -j $((3 * ($4 * $2 + $3))) -N 3 "$1" | tr -s ' ' | sed 's/^ //'
}

png_size() {  # "WxH kind" from the header of a PNG; kind 2 is RGB, 0 is grey
    set -- $(od -A n -t u1 -j 16 -N 10 "$1")
    echo "$((($1 * 256 + $2) * 65536 + $3 * 256 + $4))x$((($5 * 256 + $6) * 65536 + $7 * 256 + $8)) ${10}"
}

# ----------------------------------------------------------------------------------------------------------------------
# prepro/overlay

test_pixels() {
    # 5 x 6, grey 40; predicted: rows 1-2, columns 1-2; true: rows 1-2, columns 1-3 (levels 128 are object, 127 are not)
    { shard_head 5 6 1 tiny 1; repeat 90 050; mask '.......#-....--.....?.......??'; } > p.bin
    { shard_head 5 6 1 tiny 1; repeat 90 144; mask '.......###...###..............'; } > m.bin
    "$overlay" --pred p.bin --masks m.bin --raw > raw 2> said
    check_equal "--raw: status" $? 0
    check_equal "--raw: bytes" "$(size raw)" 90
    check_equal "--raw: lines of messages" "$(wc -l < said | tr -d ' ')" 1
    check "--raw: tells ffmpeg's -s" grep -q -F -e "-s 6x5" said
    # an outline stands on a pixel that differs from its right or lower neighbour
    check_equal "outside: the prediction's frame" "$(pixel raw 6 5 4)" "40 40 40"
    check_equal "above both: yellow" "$(pixel raw 6 1 0)" "255 255 0"
    check_equal "above the true mask only: green" "$(pixel raw 6 3 0)" "0 255 0"
    check_equal "left of both: yellow" "$(pixel raw 6 0 1)" "255 255 0"
    check_equal "inside both: untouched" "$(pixel raw 6 1 1)" "40 40 40"
    check_equal "the predicted mask's right side: red" "$(pixel raw 6 2 1)" "255 0 0"
    check_equal "the true mask's right side: green" "$(pixel raw 6 3 1)" "0 255 0"
    check_equal "below both: yellow" "$(pixel raw 6 2 2)" "255 255 0"
    check_equal "levels of 127 are no object" "$(pixel raw 6 1 3)" "40 40 40"
    "$overlay" --pred p.bin --raw > raw 2> said
    check_equal "without --masks: red only" "$(pixel raw 6 1 0) $(pixel raw 6 3 0)" "255 0 0 40 40 40"
    "$overlay" --pred p.bin --masks m.bin --alpha 0.5 --raw > raw 2> said
    check_equal "--alpha: inside both, yellow at a half" "$(pixel raw 6 1 1)" "148 148 20"
    check_equal "--alpha: outside, untouched" "$(pixel raw 6 5 4)" "40 40 40"
    accept "--out" "$overlay" --pred p.bin --masks m.bin --out tiny
    check_equal "--out: the files" "$(find tiny -type f)" "tiny/tiny/00001.png"
    check_equal "--out: size and kind" "$(png_size tiny/tiny/00001.png)" "6x5 2"
    accept "--mask-only" "$overlay" --pred p.bin --out grey --mask-only
    accept "--probability" "$overlay" --pred p.bin --out probability --mask-only --probability
    check_equal "--mask-only: size and kind" "$(png_size grey/tiny/00001.png)" "6x5 0"
    check_equal "--probability: size and kind" "$(png_size probability/tiny/00001.png)" "6x5 0"
}

test_overlay() {
    accept "--out of a phantom" "$overlay" --pred pred.bin --masks val.bin --out all
    check_equal "--out: pictures" "$(find all -name '*.png' | wc -l | tr -d ' ')" 15
    check_equal "--out: folders" "$(ls all | tr '\n' ' ')" "phantom-1-00000 phantom-1-00001 phantom-1-00002 "
    check_equal "--out: names" "$(ls all/phantom-1-00002 | tr '\n' ' ')" "00001.png 00002.png 00003.png 00004.png 00005.png "
    accept "--out, once more" "$overlay" --pred pred.bin --out all --alpha 0.4
    check_equal "--out: no temporary file" "$(find all ! -type d ! -name '*.png')" ""
    accept "--out of one video" "$overlay" --pred pred.bin --out one --video phantom-1-00001
    check_equal "--video: folders" "$(ls one)" "phantom-1-00001"
    "$overlay" --pred pred.bin --raw --video phantom-1-00001 > raw 2> said
    check_equal "--raw: bytes" "$(size raw)" $((5 * 33 * 40 * 3))
    # another program reads the same pixels back; levels.bin's masks are of all grey levels
    if [ -x "$frames" ]; then
        rm -rf grey probability
        accept "--mask-only" "$overlay" --pred levels.bin --out grey --mask-only
        accept "--mask-only --probability" "$overlay" --pred levels.bin --out probability --mask-only --probability
        run "$frames" --size 33x40 --out again.bin all grey
        check_equal "prepro/frames reads --out and --mask-only" $status 0
        "$overlay" --pred pred.bin --alpha 0.4 --raw > raw 2> said
        tail -c $((4 * pixels)) again.bin | head -c $((3 * pixels)) > again
        check "--out: the pixels of --raw" cmp again raw
        tail -c $pixels levels.bin | tr '\000-\177\200-\377' '[\000*128][\377*128]' > expected
        tail -c $pixels again.bin > again
        check "--mask-only: 255 above 127, else 0" cmp again expected
        run "$frames" --size 33x40 --out again.bin all probability
        tail -c $pixels levels.bin > expected && tail -c $pixels again.bin > again
        check "--probability: the levels" cmp again expected
    else
        skip 6 "decoding of pictures: prepro/frames was not built"
    fi
    # frames of 40 are enlarged six times
    for case in "16 4 960x792" "5 4 960x396" "3 8 720x198" "1 1 240x198" "1000 5 1200x594"; do
        set -- $case
        accept "--sheet --count $1 --columns $2" \
            "$overlay" --pred pred.bin --masks val.bin --sheet s.png --count "$1" --columns "$2"
        check_equal "--sheet --count $1 --columns $2: size" "$(png_size s.png)" "$3 2"
    done
    accept "--sheet of one video" "$overlay" --pred pred.bin --sheet s.png --video phantom-1-00001
    check_equal "--sheet of one video: size" "$(png_size s.png)" "960x396 2"
    # large frames are shrunk: 600 x 1200 to 256 x 512; of 65 frames to 128 x 256; 16384 x 2 to 512 x 1
    { shard_head 600 1200 1 large 2; repeat $((2 * 720000 * 4)) 100; } > large.bin
    accept "--sheet of large frames" "$overlay" --pred large.bin --masks large.bin --sheet s.png
    check_equal "--sheet of large frames: size" "$(png_size s.png)" "1024x256 2"
    { shard_head 300 600 1 many 65; repeat $((65 * 180000 * 4)) 100; } > large.bin
    accept "--sheet of 65 frames" "$overlay" --pred large.bin --sheet s.png --count 65 --columns 13
    check_equal "--sheet of 65 frames: size" "$(png_size s.png)" "3328x640 2"
    { shard_head 16384 2 1 long 1; repeat $((16384 * 2 * 4)) 100; } > large.bin
    accept "--sheet of the longest frames" "$overlay" --pred large.bin --sheet s.png
    check_equal "--sheet of the longest frames: size" "$(png_size s.png)" "1x512 2"
    # videos in another order; with names twice these would be anyone's guess
    { shard_head 1 1 1 b 1 a 2 c 1; repeat 12 000; mask '###.'; } > x.bin
    { shard_head 1 1 1 a 2 c 1 b 1; repeat 12 000; mask '##.#'; } > y.bin
    accept "videos in another order" "$overlay" --pred x.bin --masks y.bin --sheet s.png
    accept "videos in another order: report" "$report" --pred x.bin --masks y.bin --out r.html
    check "videos are matched by name" grep -q '<dt>Dice</dt><dd>0.7500<' r.html
    { shard_head 1 1 1 b 1 a 1 a 1; repeat 9 000; mask '##.'; } > x.bin
    { shard_head 1 1 1 a 1 b 1 a 1; repeat 9 000; mask '##.'; } > y.bin
    refuse "two videos of one name, another order" "x.bin y.bin 'a' order" "$overlay" --pred x.bin --masks y.bin --sheet new/s.png
    refuse "two videos of one name, another order: report" "x.bin y.bin 'a' order" "$report" --pred x.bin --masks y.bin --out new/r.html
    accept "two videos of one name, the same order: report" "$report" --pred x.bin --masks x.bin --out r.html
    refuse "--video, two videos of this name" "--video x.bin several" "$overlay" --pred x.bin --sheet new/s.png --video a
    refuse "--out, two videos of one name" "x.bin 'a'" "$overlay" --pred x.bin --out new/o
    "$overlay" --help > stdout 2> stderr
    check "--help explains the colours" grep -q "red predicted, green true, yellow" stdout
}

test_bad_overlay() {
    refuse "no prediction" "--pred" "$overlay" --out new/o
    refuse "no way out" "--out --sheet --raw" "$overlay" --pred pred.bin
    refuse "two ways out" "--out --sheet --raw" "$overlay" --pred pred.bin --out new/o --sheet new/s.png
    refuse "unknown option" "--mask" "$overlay" --pred pred.bin --mask val.bin --out new/o
    refuse "option without value" "--out" "$overlay" --pred pred.bin --out
    for option in "columns 0" "columns 101" "count 0" "count 1001" "alpha 1.5" "alpha x"; do
        refuse "--$option" "--${option% *}" "$overlay" --pred pred.bin --sheet new/s.png --${option% *} ${option#* }
    done
    refuse "--mask-only with --sheet" "--mask-only" "$overlay" --pred pred.bin --sheet new/s.png --mask-only
    refuse "--mask-only with --masks" "--mask-only" "$overlay" --pred pred.bin --masks val.bin --out new/o --mask-only
    refuse "--probability alone" "--probability" "$overlay" --pred pred.bin --out new/o --probability
    refuse "no such video" "--video none pred.bin" "$overlay" --pred pred.bin --out new/o --video none
    for way in "$overlay --sheet new/s.png" "$overlay --out new/o" "$report --out new/r.html"; do
        name=$(basename "${way%% *}")
        refuse "$name: no file" "missing.bin" $way --pred missing.bin --masks val.bin
        refuse "$name: no masks" "missing.bin" $way --pred pred.bin --masks missing.bin
        refuse "$name: a folder" "somewhere" $way --pred somewhere --masks val.bin
        refuse "$name: not a shard" "words" $way --pred words --masks val.bin
        for bytes in 1 1023 1024 1500 $(($(size pred.bin) - 1)); do
            cut_to pred.bin "$bytes" bad.bin
            refuse "$name: prediction of $bytes bytes" "bad.bin" $way --pred bad.bin --masks val.bin
            refuse "$name: masks of $bytes bytes" "bad.bin" $way --pred pred.bin --masks bad.bin
        done
        refuse "$name: a prediction without masks" "nomasks.bin --predict" $way --pred nomasks.bin --masks val.bin
        refuse "$name: masks without masks" "nomasks.bin prepro/frames" $way --pred pred.bin --masks nomasks.bin
        refuse "$name: frames of another size" "other_size.bin 34x40 33x40" $way --pred pred.bin --masks other_size.bin
        refuse "$name: other videos" "pred.bin other_names.bin phantom-1-00000" $way --pred pred.bin --masks other_names.bin
        refuse "$name: more videos" "pred.bin more.bin phantom-1-00003" $way --pred pred.bin --masks more.bin
        refuse "$name: fewer videos" "pred.bin more.bin phantom-1-00003" $way --pred more.bin --masks pred.bin
        refuse "$name: other frames" "longer.bin 6 5" $way --pred pred.bin --masks longer.bin
    done
    refuse "--out where a file is" "words" "$overlay" --pred pred.bin --out words
    refuse "--out in a missing folder" "missing/o" "$overlay" --pred pred.bin --out missing/o
    refuse "--out below a file" "words/o" "$overlay" --pred pred.bin --out words/o
    mkdir -p taken && : > taken/phantom-1-00000
    refuse "--out: a file where a video's folder should be" "taken/phantom-1-00000" "$overlay" --pred pred.bin --out taken
    mkdir -p dirs/phantom-1-00000/00001.png
    refuse "--out: a folder where a picture should be" "dirs/phantom-1-00000/00001.png" "$overlay" --pred pred.bin --out dirs
    check_equal "--out: a folder in the way, nothing beside it" "$(find dirs ! -type d)" ""
    refuse "--sheet where a folder is" "somewhere" "$overlay" --pred pred.bin --sheet somewhere
    for file in pred.bin val.bin; do
        cp $file before
        refuse "--sheet is $file" "--sheet $file" "$overlay" --pred pred.bin --masks val.bin --sheet $file
        check "--sheet is $file: it is as before" cmp $file before
    done
    refuse "--sheet in a missing folder" "missing/s.png" "$overlay" --pred pred.bin --sheet missing/s.png
    # the reader of a pipe goes away, with more to come than any pipe holds
    { shard_head 1000 1000 1 large 3; repeat 12000000 100; } > large.bin
    rm -rf new && mkdir new
    command="overlay --raw | head -c 100"
    { "$overlay" --pred large.bin --raw 2> stderr; echo $? > code; } | head -c 100 > stdout
    status=$(cat code) what="--raw into a closed pipe" words="--raw pipe"
    judge_refusal && pass
}

test_full_disk() {
    if (trap '' XFSZ; ulimit -f 1; dd if=/dev/zero of=limited bs=4096 count=1) > /dev/null 2>&1; then
        skip 9 "a full disk: this shell cannot limit file sizes"
        return
    fi
    limited() { (trap '' XFSZ; ulimit -f 4; "$@"); }  # no file grows beyond 2 KiB (4 KiB where blocks are larger)
    refuse "--sheet, disk full" "new/s.png" limited "$overlay" --pred large.bin --sheet new/s.png
    refuse "--out, disk full" "00001.png" limited "$overlay" --pred large.bin --out new/o
    # the first picture, of one colour, fits; the second, of noise, does not: the first is whole, the older second stays
    { shard_head 40 40 1 half 2; repeat 4800 100; awk 'BEGIN { for (i = 0; i < 4800; i++) printf "%c", 33 + int(94 * rand()) }'
      repeat 3200 000; } > half.bin
    mkdir -p fills/half && echo old > fills/half/00002.png
    refuse "--out, the disk fills up" "fills/half/00002.png" limited "$overlay" --pred half.bin --out fills
    check_equal "--out, the disk fills up: no half picture" "$(ls -A fills/half | tr '\n' ' ')" "00001.png 00002.png "
    check_equal "--out, the disk fills up: the older picture stays" "$(cat fills/half/00002.png)" old
    accept "--out, with room" "$overlay" --pred half.bin --out new/o
    check "--out, the disk fills up: the first picture is whole" cmp fills/half/00001.png new/o/half/00001.png
    echo old > kept.html
    refuse "report, disk full" "kept.html" limited "$report" --pred pred.bin --masks val.bin --out kept.html
    check_equal "report, disk full: the older page stays" "$(cat kept.html)" old
}

# ----------------------------------------------------------------------------------------------------------------------
# dev/report

page() {  # page CASE OPTIONS: writes new/r.html, which is well-formed, without script, outside address, or not-a-number
    what=$1
    shift
    rm -rf new && mkdir new
    accept "report, $what" "$report" --out new/r.html "$@"
    check_equal "report, $what: one file" "$(ls new)" "r.html"
    if $have_xmllint; then check "report, $what: well-formed" xmllint --noout new/r.html; else skip 1 "xmllint is not here"; fi
    grep -E ' (d|x|y|x1|x2|y1|y2)="|<dd>|--part' new/r.html > drawn
    check "report, $what: every number is one" [ "$(grep -c -i -E '(nan|inf)' drawn)" -eq 0 ]
    check "report, $what: no script" [ "$(grep -c -i '<script' new/r.html)" -eq 0 ]
    check "report, $what: nothing from elsewhere" [ "$(grep -c -E '(src|href)="[^d]|url\(|@import' new/r.html)" -eq 0 ]
}

write_log() {  # write_log STEPS VALIDATIONS
    printf '# --train some <file> & "more"\n# --epochs 9\n# --init \n# parameters 1234\n# train: epoch step lr loss\n'
    awk -v steps="$1" -v validations="$2" 'BEGIN {
        for (i = 1; i <= steps; i++) printf "train 1 %d 0.001 %.6f %.6f %.6f %.6f\n", i, 1 / i + 0.2, 1 / i, 0.1, 0.1
        for (i = 1; i <= validations; i++) printf "val %d 0.5 %.6f %.6f 0.7 0.8 0\n", i, 0.5 + i / 100, 0.4 + i / 100 }'
}

test_report() {
    write_log 500 9 > log.txt
    page "all parts" --log log.txt --pred pred.bin --masks val.bin --title 'A <b>title</b> & "more"'
    for video in 0 1 2; do check "report: video $video" grep -q -F "phantom-1-0000$video" new/r.html; done
    check "report: the title is escaped" grep -q -F '<h1>A &lt;b&gt;title&lt;/b&gt; &amp; &quot;more&quot;</h1>' new/r.html
    check "report: options are escaped" grep -q -F 'some &lt;file&gt; &amp; &quot;more&quot;' new/r.html
    check "report: options" grep -q -F '<span>--epochs</span><b>9</b>' new/r.html
    check_equal "report: curves" "$(grep -c 'class="curve' new/r.html)" 6
    check "report: the best Dice" grep -q '<b>0.5900</b> at epoch 9' new/r.html
    check "report: the last step" grep -q '<dd>500</dd>' new/r.html
    check "report: worst frames" grep -q '<h2>Worst frames' new/r.html
    check "report: best frames" grep -q '<h2>Best frames' new/r.html
    check_equal "report: pictures, three for each" "$(($(grep -c '<img ' new/r.html) % 3))" 0
    # scores by hand: half of the predicted and of the true pixels agree; all of them; nothing in either mask
    { shard_head 1 6 1 half 1 all 1 none 1; repeat 54 100; mask '####...-#...?.....'; } > p.bin
    { shard_head 1 6 1 half 1 all 1 none 1; repeat 54 100; mask '..####.#-....?....'; } > m.bin
    page "scores" --pred p.bin --masks m.bin
    grep 'scope="row"' new/r.html | sed 's/<[^>]*>/ /g' | tr -s ' \n' ' ' > rows
    check_equal "scores, worst first" "$(cat rows)" " All frames 3 0.5000 0.4444 0.5000 0.5000 \
none 1 0.0000 0.0000 0.0000 0.0000 half 1 0.5000 0.3333 0.5000 0.5000 all 1 1.0000 1.0000 1.0000 1.0000 "
    check "scores: frames without object are counted" grep -q '1 of 3 frames hold no object' new/r.html
    check_equal "scores: and are no examples" "$(grep -c '<img ' new/r.html)" 6
    page "no examples" --pred pred.bin --masks val.bin --examples 0
    check_equal "no examples: pictures" "$(grep -c '<img ' new/r.html)" 0
    page "log only" --log log.txt
    check_equal "log only: no scores" "$(grep -c '<table' new/r.html)" 0
    # logs of all kinds
    for case in "0 0" "1 0" "1 1" "0 1" "2 2" "241 1" "20000 3"; do
        write_log ${case% *} ${case#* } > log.txt
        page "log of $case lines" --log log.txt
    done
    { write_log 50 1; printf 'train 1 51 0.001 nan nan -nan inf\ntrain 1 52 0.001 1e300 1 1 1\n'; } > log.txt
    echo 'val 2 nan nan nan 0 0 0' >> log.txt
    page "log with NaN" --log log.txt
    check "log with NaN: says so" grep -q '2 of 52 values are not a number' new/r.html
    printf 'train 1 1 0.1 nan nan nan nan\nval 1 nan nan nan nan nan 0\n' > log.txt
    page "log of NaN only" --log log.txt
    { write_log 50 2; printf 'train 1 51 0.00'; } > log.txt
    page "log with half a line" --log log.txt
    check "log with half a line: says so" grep -q 'last line is incomplete' new/r.html
    { write_log 50 2; write_log 60 1 | tail -n +30; } > log.txt
    page "log of a resumed run" --log log.txt
    check "log of a resumed run: the last step" grep -q '<dd>60</dd>' new/r.html
    printf 'train 1 1 0.1 0.5\ntrain 1 2 0.1 -0.5\n' > log.txt
    page "log without edge and affine, a negative loss" --log log.txt
    printf '# --title \377\300\257\355\240\200 \342\202\254 \001\n' > log.txt
    page "log with bytes that are no text" --log log.txt

    refuse "report of nothing" "--log --pred" "$report" --out new/r.html
    refuse "report, --pred alone" "--pred --masks" "$report" --pred pred.bin --out new/r.html
    refuse "report, --masks alone" "--log --pred" "$report" --masks val.bin --out new/r.html
    refuse "report, no log" "missing.txt" "$report" --log missing.txt --out new/r.html
    refuse "report, log is a folder" "somewhere" "$report" --log somewhere --out new/r.html
    : > empty.txt
    for file in empty.txt words pred.bin; do refuse "report, log is $file" "$file" "$report" --log $file --out new/r.html; done
    { write_log 3 1; echo 'train 1 4 x'; write_log 3 1; } > bad.txt
    refuse "report, damaged line" "bad.txt 10" "$report" --log bad.txt --out new/r.html
    write_log 9 1 > log.txt
    refuse "report, --examples x" "--examples" "$report" --log log.txt --examples x --out new/r.html
    refuse "report, --out is a folder" "somewhere" "$report" --log log.txt --out somewhere
    refuse "report, --out in a missing folder" "missing/r.html" "$report" --log log.txt --out missing/r.html
    for file in log.txt pred.bin val.bin; do
        cp $file before
        refuse "report, --out is $file" "--out $file" "$report" --log log.txt --pred pred.bin --masks val.bin --out $file
        check "report, --out is $file: it is as before" cmp $file before
    done
}

# ----------------------------------------------------------------------------------------------------------------------

"$phantom" --out val.bin --videos 3 --frames 5 --size 33x40 > stdout 2> stderr &&
"$phantom" --out second.bin --videos 3 --frames 5 --size 33x40 --seed 2 > stdout 2> stderr &&
"$phantom" --out other_size.bin --videos 3 --frames 5 --size 34x40 > stdout 2> stderr &&
"$phantom" --out more.bin --videos 4 --frames 5 --size 33x40 > stdout 2> stderr &&
"$phantom" --out longer.bin --videos 3 --frames 6 --size 33x40 > stdout 2> stderr ||
    { echo "test_pictures.sh: phantom does not work:"; cat stderr; exit 1; }
# the prediction: the frames of val.bin with the masks of second.bin, which are of other lesions
pixels=$((15 * 33 * 40)) head=$((1024 + 3 * 64))
{ head -c $((head + 3 * pixels)) val.bin; tail -c $pixels second.bin; } > pred.bin
{ head -c $((head + 3 * pixels)) val.bin; tail -c $((4 * pixels)) val.bin | head -c $pixels; } > levels.bin
{ head -c 28 val.bin; number 0; head -c $((head + 3 * pixels)) val.bin | tail -c +33; } > nomasks.bin
cp second.bin other_names.bin
mkdir somewhere
echo "words and words" > words
have_xmllint=false
command -v xmllint > /dev/null 2>&1 && have_xmllint=true

test_pixels
test_overlay
test_bad_overlay
test_full_disk
test_report

tally
