#!/bin/sh
# Uses the programs as a person does, mostly wrongly. Refused input must end with exit status 1, one line on stderr that
# names the file or the option, and nothing left behind; good input must end with what README.md promises.
#
#   dev/test_cli.sh [GROUP...]     after `make train_vivim prepro`; `make test` calls it; the groups are at the end of this file
#
# POSIX sh and the usual tools. Only what fails is printed, with command, status and output; the last line is the tally
# and the exit status the verdict. What cannot be tested here is counted as skipped: prepro/frames where it was not built
# (no libjpeg or libpng), limits that this shell cannot set, memory limits under AddressSanitizer.

root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
train=$root/train_vivim phantom=$root/prepro/phantom frames=$root/prepro/frames affine=$root/prepro/affine
for program in "$train" "$phantom" "$affine"; do
    [ -x "$program" ] || { echo "test_cli.sh: $program: not built; run make train_vivim prepro" >&2; exit 1; }
done
programs='train_vivim|phantom|frames|affine'
. "$root/dev/test_lib.sh"

# ----------------------------------------------------------------------------------------------------------------------
# bytes, pictures, limits

number() {  # number N: the int32 N as four escaped bytes, little-endian
    printf '\\%03o\\%03o\\%03o\\%03o' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24 & 255))
}

field() { od -A n -t d4 -j $((4 * $2)) -N 4 "$1" | tr -d ' '; }       # field SHARD I: number I of the header
byte() { od -A n -t u1 -j "$2" -N 1 "$1" | tr -d ' '; }               # byte FILE OFFSET
text() { dd if="$1" bs=1 skip="$2" count="$3" 2> /dev/null | tr -d '\000'; }  # text FILE OFFSET COUNT

shape() {  # shape SHARD: "videos frames HxW masks"
    echo "$(field "$1" 2) $(field "$1" 3) $(field "$1" 4)x$(field "$1" 5) $(field "$1" 7)"
}

tensor_offset() {  # tensor_offset SAFETENSORS NAME: where its data begin
    header=$(od -A n -t d8 -N 8 "$1" | tr -d ' ')
    first=$(dd if="$1" bs=$((header + 8)) count=1 2> /dev/null | tr '}' '\n' |
            sed -n "s/.*\"$2\":{.*\"data_offsets\":\[\([0-9]*\),.*/\1/p")
    [ -n "$first" ] && echo $((8 + header + first))
}

all_finite() {  # all_finite SAFETENSORS: it is not there, or holds only finite numbers (all of ours are F32)
    [ ! -e "$1" ] && return 0
    od -A n -t f4 -v -j $((8 + $(od -A n -t d8 -N 8 "$1"))) "$1" > numbers
    [ -s numbers ] && ! grep -q -i -E 'nan|inf' numbers
}

picture() {  # picture FILE 5|6 W H VALUE: a PGM (5) or PPM (6) of one value (three octal digits)
    mkdir -p "$(dirname "$1")"
    bytes=$(($3 * $4 * ($2 == 5 ? 1 : 3)))
    { printf 'P%d\n%d %d\n255\n' "$2" "$3" "$4"; dd if=/dev/zero bs=$bytes count=1 2> /dev/null | tr '\000' "\\$5"; } > "$1"
}

file_limit() {  # file_limit BLOCKS COMMAND: no file may grow beyond BLOCKS of 512 bytes: a disk that is full
    trap '' XFSZ
    ulimit -f "$1"
    shift
    "$@"
}

memory_limit() {  # memory_limit KIB COMMAND
    ulimit -v "$1"
    shift
    "$@"
}

# ----------------------------------------------------------------------------------------------------------------------
# prepro/phantom

test_phantom() {
    refuse "phantom without --out" "--out" "$phantom"
    refuse "phantom, unknown option" "--vidoes" "$phantom" --out new/p.bin --vidoes 3
    refuse "phantom, no value" "--videos" "$phantom" --out new/p.bin --videos
    for value in x 0 -1 1.5 3x '' 99999999999999999999; do
        refuse "phantom --videos '$value'" "--videos" "$phantom" --out new/p.bin --videos "$value"
    done
    for value in 64 64x x64 31x64 64x3000 64x64x64 ax64 ''; do
        refuse "phantom --size '$value'" "--size" "$phantom" --out new/p.bin --size "$value"
    done
    refuse "phantom --frames 0" "--frames" "$phantom" --out new/p.bin --frames 0
    refuse "phantom --seed -1" "--seed" "$phantom" --out new/p.bin --seed -1
    refuse "phantom, directory missing" "missing/p.bin" "$phantom" --out missing/p.bin --videos 1 --frames 1 --size 32x32
    refuse "phantom, --out is a directory" "somewhere" "$phantom" --out somewhere --videos 1 --frames 1 --size 32x32
    refuse "phantom, preview cannot be written" "missing/p.png" "$phantom" --out other.bin --preview missing/p.png --videos 1 --frames 1 --size 32x32
    refuse "phantom, out and preview the same" "--preview" "$phantom" --out new/p --preview new/p --videos 1

    accept "phantom --help" "$phantom" --help
    for option in out videos frames size seed preview help; do check "phantom --help lists --$option" grep -q -e "--$option" stdout; done
    rm -rf new && mkdir new
    accept "phantom" "$phantom" --out new/p.bin --preview new/p.png --videos 2 --frames 3 --size 37x45
    check_equal "phantom's shard" "$(shape new/p.bin)" "2 6 37x45 1"
    check_equal "phantom's file size" "$(size new/p.bin)" $((1024 + 2 * 64 + 6 * 37 * 45 * 4))
    check_equal "phantom's preview" "$(od -A n -t x1 -N 8 new/p.png)" " 89 50 4e 47 0d 0a 1a 0a"
    "$phantom" --out new/q.bin --videos 2 --frames 3 --size 37x45 > /dev/null
    check "phantom: same seed, same bytes" cmp new/p.bin new/q.bin
    "$phantom" --out new/r.bin --videos 2 --frames 3 --size 37x45 --seed 2 > /dev/null
    check "phantom: another seed, other bytes" [ "$(cmp new/p.bin new/r.bin | wc -l)" -eq 1 ]

    # a file that exists is replaced as a whole: whoever has the old one open (here: another link to it) keeps it
    ln new/q.bin new/link.bin
    accept "phantom over an old file" "$phantom" --out new/q.bin --videos 2 --frames 3 --size 37x45 --seed 2
    check "phantom replaced the file" cmp new/q.bin new/r.bin
    check "phantom left the old file's bytes alone" cmp new/link.bin new/p.bin
    check "phantom leaves no temporary file" [ -z "$(find new -name '*tmp*')" ]
    if $can_limit_files; then
        cp good.bin kept.bin
        refuse "phantom, disk full" "kept.bin" file_limit 100 "$phantom" --out kept.bin --videos 20 --size 32x32
        check "phantom, disk full: the old file is whole" cmp good.bin kept.bin
        check "phantom, disk full: no temporary file" [ ! -e kept.bin.tmp ]
        refuse "phantom, disk full, no older file" "new/p.bin" file_limit 100 "$phantom" --out new/p.bin --videos 20 --size 32x32
    else
        skip 4 "phantom on a full disk: this shell cannot limit file sizes"
    fi
}

# ----------------------------------------------------------------------------------------------------------------------
# prepro/frames

make_folders() {  # make_folders PATTERN: frames and masks of videos v2 (3 frames) and v10 (1), V and K in PATTERN replaced
    for item in v2/1 v2/2 v2/10 v10/5; do
        v=${item%/*} f=${item#*/}
        image=$(echo "$1" | sed "s/V/$v/; s/K/Frame/") mask=$(echo "$1" | sed "s/V/$v/; s/K/GT/")
        picture "$image/$f.ppm" 6 40 36 "$(printf %03o "$f")"
        picture "$mask/$f.pgm" 5 40 36 377
    done
}

accept_frames() {  # accept_frames CASE SHAPE NAMES VALUES ARGUMENTS: first byte of each frame, in order
    what=$1 wanted_shape=$2 wanted_names=$3 wanted_values=$4
    shift 4
    rm -rf new && mkdir new
    accept "$what" "$frames" --out new/f.bin "$@"
    check_equal "$what: shape" "$(shape new/f.bin)" "$wanted_shape"
    videos=$(field new/f.bin 2) count=$(field new/f.bin 3) pixels=$(($(field new/f.bin 4) * $(field new/f.bin 5)))
    names= values= i=0
    while [ $i -lt "$videos" ]; do names="$names $(text new/f.bin $((1028 + 64 * i)) 60)" i=$((i + 1)); done
    i=0
    while [ $i -lt "$count" ]; do values="$values $(byte new/f.bin $((1024 + 64 * videos + 3 * pixels * i)))" i=$((i + 1)); done
    check_equal "$what: names" "${names# }" "$wanted_names"
    check_equal "$what: frames" "${values# }" "$wanted_values"
}

test_frames() {
    make_folders set/K/V && make_folders videos/V/K && mkdir empty
    for f in 1 2 10; do
        picture "flat/Frame/f$f.ppm" 6 40 36 "$(printf %03o $f)"
        picture "flat/GT/f$f.pgm" 5 40 36 377
    done
    accept_frames "frames: A/<video>/f B/<video>/f" "2 4 36x40 1" "v2 v10" "1 2 10 5" set/Frame set/GT
    accept "train_vivim on frames' shard" "$train" --train new/f.bin --val new/f.bin --out new/out $quick --affine none
    accept_frames "frames: A/<video>/{Frame,GT}/f" "2 4 36x40 1" "v2 v10" "1 2 10 5" videos
    accept_frames "frames: A/{Frame,GT}/<video>/f" "2 4 36x40 1" "v2 v10" "1 2 10 5" set
    accept_frames "frames: A/{Frame,GT}/f" "3 3 36x40 1" "f1 f2 f10" "1 2 10" flat
    accept_frames "frames: A/f B/f" "3 3 36x40 1" "f1 f2 f10" "1 2 10" flat/Frame flat/GT
    accept_frames "frames: A/f B/f --name" "1 3 36x40 1" "clip" "1 2 10" flat/Frame flat/GT --name clip
    accept_frames "frames: A/<video>/f" "2 4 36x40 0" "v2 v10" "1 2 10 5" set/Frame
    accept_frames "frames: A/f" "3 3 36x40 0" "f1 f2 f10" "1 2 10" flat/Frame
    check "frames says that images are videos" grep -q "^note: each image is a video .* --name" stdout
    mv new/f.bin plain.bin
    refuse "train_vivim on frames' shard without masks" "plain.bin masks" "$train" --train plain.bin --val good.bin --out new/out $quick
    accept_frames "frames --size HxW" "3 3 33x64 1" "f1 f2 f10" "1 2 10" flat --size 33x64
    accept_frames "frames --size N" "3 3 48x48 1" "f1 f2 f10" "1 2 10" flat --size 48
    accept "frames of a PNG" "$frames" --out new/p.bin pictures --size 64
    check_equal "frames of a PNG: shape" "$(shape new/p.bin)" "1 1 64x64 0"
    dd if=/dev/zero bs=$((2 * 40 * 36 * 3)) count=1 2> /dev/null > pipe.rgb
    input=pipe.rgb
    accept_frames "frames --raw" "1 2 36x40 0" "video" "0 0" --raw 40x36
    accept_frames "frames --raw --size --name" "1 2 32x64 0" "clip" "0 0" --raw 40x36 --size 32x64 --name clip
    cut_to pipe.rgb 5000 short.rgb
    input=short.rgb
    refuse "frames --raw, half a frame at the end" "input" "$frames" --out new/f.bin --raw 40x36
    input=
    refuse "frames --raw, nothing comes" "input" "$frames" --out new/f.bin --raw 40x36
    for value in 40 x36 40x 0x36 31x36 axb -40x36; do refuse "frames --raw '$value'" "--raw" "$frames" --out new/f.bin --raw "$value"; done
    refuse "frames --raw and a folder" "--raw" "$frames" --out new/f.bin --raw 40x36 flat/Frame

    for value in 0 31 -64 x 64x 64x31 64x64x64 99999 ''; do
        refuse "frames --size '$value'" "--size" "$frames" --out new/f.bin --size "$value" flat
    done
    for value in -1 255 x ''; do refuse "frames --threshold '$value'" "--threshold" "$frames" --out new/f.bin --threshold "$value" flat; done
    refuse "frames, no value" "--size" "$frames" --out new/f.bin flat --size
    refuse "frames without --out" "--out" "$frames" flat
    refuse "frames --out ''" "--out" "$frames" --out '' flat
    refuse "frames without input" "folder" "$frames" --out new/f.bin
    refuse "frames, unknown option" "--sise" "$frames" --out new/f.bin flat --sise 64
    refuse "frames, three folders" "third" "$frames" --out new/f.bin flat/Frame flat/GT third
    refuse "frames, folder missing" "missing" "$frames" --out new/f.bin missing
    refuse "frames, masks missing" "missing" "$frames" --out new/f.bin flat/Frame missing
    refuse "frames, folder empty" "empty" "$frames" --out new/f.bin empty
    refuse "frames, a file for a folder" "good.bin" "$frames" --out new/f.bin good.bin
    refuse "frames, --threshold without masks" "--threshold" "$frames" --out new/f.bin flat/Frame --threshold 9
    refuse "frames, --out below a file" "good.bin" "$frames" --out good.bin/f.bin flat
    refuse "frames, --out is a directory" "somewhere" "$frames" --out somewhere flat

    # one thing is wrong in a copy of a good folder
    spoil() { rm -rf bad && cp -R flat bad; }
    refuse_bad() { refuse "$1" "$2" "$frames" --out new/f.bin bad; }
    spoil && rm bad/GT/f2.pgm && refuse_bad "frames, a frame without a mask" "f2"
    spoil && rm bad/Frame/f2.ppm && refuse_bad "frames, a mask without a frame" "f2"
    accept_frames "frames --skip-unpaired" "2 2 36x40 1" "f1 f10" "1 10" bad --skip-unpaired
    spoil && picture bad/GT/f2.pgm 5 41 36 377 && refuse_bad "frames, a mask of another size" "bad/GT/f2.pgm"
    spoil && picture bad/Frame/f2.ppm 6 36 40 002 && picture bad/GT/f2.pgm 5 36 40 377 && refuse_bad "frames, mixed sizes" "bad/Frame/f2.ppm --size"
    spoil && : > bad/Frame/f2.ppm && refuse_bad "frames, an empty image" "bad/Frame/f2.ppm"
    spoil && : > bad/GT/f10.pgm && refuse_bad "frames, an empty mask" "bad/GT/f10.pgm"
    spoil && echo "no picture" > bad/Frame/f2.ppm && refuse_bad "frames, a text file" "bad/Frame/f2.ppm"
    spoil && echo "no picture" > bad/Frame/notes.txt && refuse_bad "frames, a text file more" "notes"
    spoil && cut_to flat/Frame/f2.ppm 4000 bad/Frame/f2.ppm && refuse_bad "frames, a truncated PPM" "bad/Frame/f2.ppm"
    spoil && printf 'P6\n99999 99999\n255\n' > bad/Frame/f2.ppm && refuse_bad "frames, an absurd PPM" "bad/Frame/f2.ppm"
    spoil && printf '\377\330\377\340\000\020JFIF' > bad/Frame/f2.ppm && refuse_bad "frames, a broken JPEG" "bad/Frame/f2.ppm"
    spoil && printf 'BM 123456789' > bad/Frame/f2.ppm && refuse_bad "frames, a broken BMP" "bad/Frame/f2.ppm"
    for bytes in 8 20 40 5000; do
        spoil && cut_to pictures/p.png $bytes bad/Frame/f2.ppm && refuse_bad "frames, a PNG of $bytes bytes" "bad/Frame/f2.ppm"
    done
    spoil && put bad/Frame/f2.ppm 0 '\211PNG\r\n\032\n' && refuse_bad "frames, a broken PNG" "bad/Frame/f2.ppm"
    spoil && rm bad/Frame/f2.ppm && ln -s nowhere bad/Frame/f2.ppm && refuse_bad "frames, a link to nothing" "bad/Frame/f2.ppm"
    accented=$(printf 'f\351')  # in Latin-1
    spoil && mv bad/Frame/f2.ppm "bad/Frame/$accented.ppm" && mv bad/GT/f2.pgm "bad/GT/$accented.pgm" && refuse_bad "frames, a name that is not UTF-8" "bad/Frame/f UTF-8"
    spoil && mkdir bad/Frame/more && refuse_bad "frames, a folder among the images" "bad/Frame"
    spoil && cp bad/Frame/f2.ppm bad/Frame/f2.pgm && refuse_bad "frames, a stem twice" "f2.pgm"
    spoil && picture bad/GT/f2.pgm 5 40 36 001 && picture bad/GT/f1.pgm 5 40 36 001 && refuse_bad "frames, masks of 0, 1 and of 0, 255" "--threshold"
    spoil && for f in 1 2 10; do picture bad/GT/f$f.pgm 5 40 36 144; done
    accept "frames, photographs for masks" "$frames" --out new/f.bin bad
    check "frames doubts masks that are grey" grep -q "^note: 100 % .*masks.* --threshold" stdout
    rm -rf bad && picture bad/f1.ppm 6 40 31 001 && refuse_bad "frames, H below 32" "bad/f1.ppm --size"
    rm -rf bad && picture bad/f1.ppm 6 31 40 001 && refuse_bad "frames, W below 32" "bad/f1.ppm --size"

    cp good.bin kept.bin
    spoil && : > bad/Frame/f10.ppm
    refuse "frames, a bad image over an old file" "f10.ppm" "$frames" --out kept.bin bad
    check "frames, a bad image: the old file is whole" cmp good.bin kept.bin
    ln kept.bin link.bin
    accept "frames over an old file" "$frames" --out kept.bin flat
    check_equal "frames replaced the file" "$(shape kept.bin)" "3 3 36x40 1"
    check "frames left the old file's bytes alone" cmp good.bin link.bin
    cp good.bin kept.bin
    if $can_limit_files; then
        refuse "frames, disk full" "kept.bin" file_limit 10 "$frames" --out kept.bin flat
        check "frames, disk full: the old file is whole" cmp good.bin kept.bin
    else
        skip 2 "frames on a full disk: this shell cannot limit file sizes"
    fi
    check "frames leaves no temporary file" [ -z "$(find . -name '*.tmp')" ]
    accept "frames --help" "$frames" --help
    for option in out size threshold skip-unpaired raw name help; do check "frames --help lists --$option" grep -q -e "--$option" stdout; done
}

# ----------------------------------------------------------------------------------------------------------------------
# train_vivim: options and shards that are refused

refuse_shard() {  # refuse_shard CASE: the shard bad.bin, for training and for validation
    refuse "$1" "bad.bin" "$train" --train bad.bin --val good.bin --out new/out $quick
    refuse "$1 (validation)" "bad.bin" "$train" --train good.bin --val bad.bin --out new/out $quick
}

refuse_field() {  # refuse_field OFFSET VALUE...: that number of good.bin replaced
    offset=$1
    shift
    for value in "$@"; do
        cp good.bin bad.bin && put bad.bin "$offset" "$(number "$value")"
        refuse "shard with the number at byte $offset = $value" "bad.bin" "$train" --train bad.bin --val good.bin --out new/out $quick
    done
}

refuse_option() {  # refuse_option NAME VALUE...
    option=$1
    shift
    for value in "$@"; do
        refuse "train_vivim --$option '$value'" "--$option" "$train" --train good.bin --val good.bin --out new/out --epochs 1 "--$option" "$value"
    done
}

test_shards() {
    refuse "no shards at all" "data/phantom_train.bin" "$train" --out new/out
    rm -f bad.bin && refuse_shard "missing shard"
    : > bad.bin && refuse_shard "empty shard"
    mkdir somewhere.bin
    refuse "a directory for a shard" "somewhere.bin" "$train" --train somewhere.bin --val good.bin --out new/out
    refuse "a device for a shard" "/dev/zero" "$train" --train /dev/zero --val good.bin --out new/out
    for bytes in 1 1000 1023 1024 1025 1100 1279 1280 1281 20000 66815; do
        cut_to good.bin $bytes bad.bin
        refuse "shard of $bytes bytes" "bad.bin" "$train" --train bad.bin --val good.bin --out new/out $quick
    done
    cp good.bin bad.bin && echo >> bad.bin && refuse_shard "shard with a byte too many"
    cp "$root/train_vivim.c" bad.bin && refuse_shard "a text for a shard"

    # the header: magic, version, videos, frames, H, W, channels, masks, a reserved number
    refuse_field 0 0
    refuse_field 4 0 2
    refuse_field 8 0 -1 3 5 1000001 2147483647
    refuse_field 12 0 -1 3 15 17 2147483647
    refuse_field 16 0 -32 31 33 16385 2147483647
    refuse_field 20 0 -32 31 33 16385 2147483647
    refuse_field 24 0 1 4
    refuse_field 28 0 -1 2
    refuse_field 32 1
    refuse_field 1020 1
    # the table: frames of the first video, of the last one
    refuse_field 1024 0 -1 3 5 2147483647
    refuse_field 1216 0 -1 3 5 2147483647
    cp good.bin bad.bin && put bad.bin 1028 '\000' && refuse_shard "shard with an empty name"
    cp good.bin bad.bin && put bad.bin 1028 'a/b' && refuse_shard "shard with a slash in a name"
    for name in 'v\351o' '\300\257' '\355\240\200' '\364\220\200\200' '\342\202' '\302\233m' 'a\tb' 'a\177'; do
        cp good.bin bad.bin && put bad.bin 1028 "$name\000" && refuse_shard "shard with the name $name"
    done
    cp good.bin new.bin && put new.bin 1028 '\303\251\342\202\254\360\237\230\200'
    accept "shard with an accent, a euro and a face in a name" "$train" --eval --val new.bin --checkpoint base/best.safetensors
    cp good.bin bad.bin && put bad.bin 1028 '123456789012345678901234567890123456789012345678901234567890' && refuse_shard "shard with an endless name"
    cp good.bin bad.bin && put bad.bin 16 "$(number 64)" && put bad.bin 20 "$(number 16)" && refuse_shard "shard with frames of 64x16"
    cut_to good.bin $((1280 + 16 * 32 * 32 * 3)) bad.bin && put bad.bin 28 "$(number 0)" && refuse_shard "shard without masks"

    "$phantom" --out wide.bin --videos 1 --frames 4 --size 32x40 > /dev/null
    refuse "shards of two sizes" "wide.bin" "$train" --train good.bin --val wide.bin --out new/out $quick
    refuse "--size that is not the shard's" "good.bin --size" "$train" --train good.bin --val good.bin --out new/out $quick --size 64
    refuse "--size for frames that are not square" "wide.bin --size" "$train" --train wide.bin --val wide.bin --out new/out $quick --size 32
    refuse "a batch larger than the set" "--batch" "$train" --train good.bin --val good.bin --out new/out --batch 17
}

test_options() {
    refuse "unknown option" "--epoch" "$train" --out new/out --epoch 3
    refuse "unknown option without dashes" "epochs" "$train" --out new/out epochs 3
    refuse "unknown option of one dash" "-h" "$train" -h
    for option in config train val out init size frames batch epochs lr seed threads; do
        refuse "--$option without a value" "--$option" "$train" "--$option"
    done
    refuse_option config b9 b B0
    refuse_option scans fbx bf '' sf
    refuse_option bce none ''
    refuse_option dt-init none ''
    refuse_option size x -1 99999 32x32
    refuse_option frames x -1 1.5 5000
    refuse_option batch x 0 -4 1.5 4x '' 99999999999999 nan
    refuse_option epochs x 0 -1 1e9
    refuse_option lr x 0 -0.1 2 nan inf '' 1e-3x
    refuse_option drop-path x -0.1 1
    refuse_option dropout x -0.1 1
    refuse_option flip x 2 -1
    refuse_option jitter x 2
    refuse_option eval-every x 0
    refuse_option seed x -1 99999999999
    refuse_option threads x -1 99999

    # what would be ignored is refused, before any file is looked at
    no_effect() {  # no_effect MODE OPTION...: MODE and OPTION may have values, an option's after =
        mode=$1
        shift
        for option in "$@"; do
            name=${option%%=*} value=${option#"${option%%=*}"}
            refuse "train_vivim $mode --$name" "--$name: no effect" "$train" $mode "--$name" ${value#=}
        done
    }
    training="train=none.bin resume epochs=1 lr=1e-3 edge=1 affine=none patch=8 sync-bn=1 flip=0 jitter=0 eval-every=1 save-every=1"
    model="config=b0 scans=f init=none bce=plain dt-init=mamba drop-path=0 dropout=0 seed=1"
    no_effect "--predict none.bin" $training $model val=none.bin
    no_effect "--eval" $training $model out=new/p
    no_effect "--predict none.bin --eval" lr=1e-3 val=none.bin
    no_effect "--bench" $training val=none.bin out=new/p predict=none.bin eval checkpoint=none stride=1
    no_effect "--out new/out" checkpoint=none stride=1 stride=0
    refuse "--batch with --stride" "--batch: --stride" "$train" --eval --stride 2 --batch 2
    accept "--help beside anything" "$train" --lr 1 --predict x --help

    # one of several processes, as far as the environment knows, in a build that does not talk to the others
    for count in WORLD_SIZE OMPI_COMM_WORLD_SIZE PMI_SIZE SLURM_STEP_NUM_TASKS; do
        refuse "$count=2" "$count=2 USE_MPI=1" env $count=2 "$train" --out new/out
        accept "$count=1" env $count=1 "$train" --help
    done

    refuse "--train ''" "--train" "$train" --train '' --val good.bin --out new/out
    refuse "--val ''" "--val" "$train" --train good.bin --val '' --out new/out
}

test_out() {
    refuse "--out is a file" "kept.bin" "$train" --train good.bin --val good.bin $quick --out kept.bin
    refuse "--out below a file" "kept.bin/out" "$train" --train good.bin --val good.bin $quick --out kept.bin/out
    refuse "--out below nothing" "missing/out" "$train" --train good.bin --val good.bin $quick --out missing/out
    refuse "--out ''" "--out" "$train" --train good.bin --val good.bin $quick --out ''
    for file in best.safetensors last.safetensors log.txt predictions.png; do
        rm -rf blocked && mkdir -p blocked/$file
        refuse "$file is a directory" "$file" "$train" --train good.bin --val good.bin $quick --out blocked
        check "$file is a directory: no temporary file" [ -z "$(find blocked -name '*.tmp')" ]
    done
    if [ -c /dev/full ]; then
        rm -rf blocked && mkdir blocked && ln -s /dev/full blocked/log.txt
        refuse "log.txt on a full disk" "log.txt" "$train" --train good.bin --val good.bin $quick --out blocked
    else
        skip 1 "log.txt on a full disk: no /dev/full"
    fi
}

test_init() {
    refuse_init() { refuse "$1" "$2" "$train" --train good.bin --val good.bin --out new/out $quick --init "$2"; }
    refuse_init "--init missing" "missing.safetensors"
    refuse_init "--init is a directory" "somewhere.bin"
    refuse_init "--init is a shard" "good.bin"
    : > bad.safetensors && refuse_init "--init empty" "bad.safetensors"
    echo "no checkpoint, but a long enough text" > bad.safetensors && refuse_init "--init is a text" "bad.safetensors"
    whole=$(size base/best.safetensors)
    for bytes in 1 7 8 9 100 20000 30000 $((whole / 2)) $((whole - 8)) $((whole - 1)); do
        cut_to base/best.safetensors $bytes bad.safetensors && refuse_init "--init of $bytes bytes" "bad.safetensors"
    done
    cp base/best.safetensors bad.safetensors && echo >> bad.safetensors && refuse_init "--init with a byte too many" "bad.safetensors"
    cp base/best.safetensors bad.safetensors && put bad.safetensors 0 '\377\377\377\377\377\377\377\177'
    refuse_init "--init with an endless header" "bad.safetensors"
    cp base/best.safetensors bad.safetensors && put bad.safetensors 8 'x' && refuse_init "--init with a broken header" "bad.safetensors"
    printf '\100\000\000\000\000\000\000\000%-64s\000\000\000\000' '{"other":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' > bad.safetensors
    refuse_init "--init of another model" "bad.safetensors"
    refuse "--init of another config" "base/best.safetensors --config" "$train" --train good.bin --val good.bin --out new/out $quick --config b0 --init base/best.safetensors

    # whatever is wrong with a new run, the files of the run before stay
    for wrong in "--config b9" "--scans x" "--bce x" "--init missing.safetensors" "--init good.bin" "--batch 17" "--size 64" "--train missing.bin"; do
        rm -rf again && cp -R base again
        run "$train" --train good.bin --val good.bin $quick --out again $wrong
        check "$wrong leaves the last run's files alone" diff -r base again
    done
}

# ----------------------------------------------------------------------------------------------------------------------
# train_vivim: memory and disk run out, the loss becomes NaN, a signal

test_limits() {
    if $can_limit_memory; then
        refuse_memory() {  # the log may have been begun, but nothing else
            rm -rf new && mkdir new
            what=$1 words="memory MiB $2"
            shift 2
            run memory_limit 400000 "$train" "$@"
            rm -f new/out/log.txt
            judge_refusal && pass
        }
        refuse_memory "out of memory: long clips" "--frames --batch" --train good.bin --val good.bin --out new/out --frames 4096
        refuse_memory "out of memory: batch" "--batch" --train many.bin --val good.bin --out new/out --batch 2000
        refuse_memory "out of memory: config" "--config" --train good.bin --val good.bin --out new/out --config b5
        refuse "--bench beyond the memory" "--frames --memory-limit" "$train" --bench --size 1024 --frames 20 --memory-limit 1
    else
        skip 4 "out of memory: this shell cannot limit memory, or AddressSanitizer needs too much"
    fi
    if $can_limit_files; then
        rm -rf again && cp -R base again
        refuse "disk full" ".safetensors" file_limit 1000 "$train" --train good.bin --val good.bin $quick --out again
        check "disk full: the older best.safetensors is whole" cmp base/best.safetensors again/best.safetensors
        check "disk full: the older last.safetensors is whole" cmp base/last.safetensors again/last.safetensors
        check "disk full: no temporary file" [ -z "$(find again -name '*.tmp')" ]
        accept "disk full: the older checkpoint loads" "$train" --train good.bin --val good.bin $quick --out new/out --init again/last.safetensors
        rm -rf again && mkdir again
        refuse "disk full at the first checkpoint" ".safetensors" file_limit 1000 "$train" --train good.bin --val good.bin $quick --out again
        check "disk full at the first checkpoint: none is there" [ -z "$(find again ! -name log.txt -type f)" ]
        refuse "disk full at the state" "resume.safetensors" file_limit 4000 "$train" --train good.bin --val sixteen.bin $quick --out again
        check "disk full at the state: none is there" [ -z "$(find again -name 'resume*')" ]
        check "disk full at the state: the checkpoint is" [ "$(size again/best.safetensors)" -eq "$(size base/best.safetensors)" ]
    else
        skip 10 "train_vivim on a full disk: this shell cannot limit file sizes"
    fi
}

stops_at_nan() {  # stops_at_nan CASE OPTIONS: exit 1, a line with the step, and the earlier run's checkpoints stay
    what=$1 words=step
    shift
    rm -rf again && cp -R base again
    run "$train" --train good.bin --val good.bin --out again --epochs 3 --batch 16 --frames 2 "$@"
    judge_refusal && pass
    check "$what: best.safetensors is as before" cmp base/best.safetensors again/best.safetensors
    check "$what: last.safetensors is as before" cmp base/last.safetensors again/last.safetensors
}

test_nan() {
    rm -rf new && mkdir new
    spoil_tensor() { cp base/best.safetensors spoiled.safetensors && put spoiled.safetensors "$(tensor_offset spoiled.safetensors "$1")" "$2"; }
    nan='\000\000\300\177'
    spoil_tensor out.weight "$nan" && stops_at_nan "NaN in the last layer" --init spoiled.safetensors
    spoil_tensor encoder.downsample_layers.patch_embeddings.0.proj.weight "$nan" && stops_at_nan "NaN in the first layer" --init spoiled.safetensors
    # training hides it: batch norm uses the batch's statistics; validation shows it
    spoil_tensor decoder.batch_norm.running_var "$nan" && stops_at_nan "NaN in validation" --init spoiled.safetensors
    # the activations grow until the variance that validation uses overflows, while the training loss stays finite
    rm -rf again
    run "$train" --train good.bin --val good.bin --out again --epochs 10 --batch 16 --frames 1 --lr 1
    check "a learning rate of 1: it stops at the first NaN" [ "$(grep -c -i -E '[^a-z]-?nan' again/log.txt)" -le 1 ]
    for file in again/last.safetensors again/best.safetensors; do
        check "a learning rate of 1: no NaN, no infinity in $file" all_finite $file
    done
}

test_signals() {
    for signal in INT TERM; do
        rm -rf again && mkdir again
        : > stdout  # here, not only in the child: what an earlier case left there must not be taken for the first epoch
        "$train" --train small.bin --val small.bin --batch 1 --frames 1 --epochs 3000 --out again > stdout 2> stderr &
        child=$! waited=0
        while [ $waited -lt 60 ] && ! grep -q '^epoch' stdout; do sleep 1; waited=$((waited + 1)); done
        command="train_vivim, SIG$signal after some epochs"
        kill -$signal $child
        wait $child
        status=$?
        check_equal "SIG$signal: exit status" $status 130
        check "SIG$signal: last.safetensors is there" [ -s again/last.safetensors ]
        check "SIG$signal: it is named" grep -q again/last.safetensors stdout
        check "SIG$signal: stderr is empty" [ ! -s stderr ]
        check "SIG$signal: no temporary file" [ -z "$(find again -name '*.tmp')" ]
        accept "SIG$signal: last.safetensors loads" "$train" --train good.bin --val good.bin $quick --out again --init again/last.safetensors
    done
}

# ----------------------------------------------------------------------------------------------------------------------
# train_vivim: what it does when all is well

last_line='^best val Dice [01]\.[0-9]{4} at epoch [0-9]+, total [0-9]+ s$'

trains() {  # trains CASE OPTIONS: on shards of two videos, one epoch, into new/out
    what=$1
    shift
    rm -rf new && mkdir new
    accept "$what" "$train" --train small.bin --val small.bin --epochs 1 --batch 2 --frames 2 --out new/out "$@"
    tail -n 1 stdout > last
    check "$what: last line" grep -q -E "$last_line" last
    check "$what: no temporary file" [ -z "$(find new -name '*.tmp')" ]
}

test_training() {
    rm -rf new && mkdir new
    accept "two epochs" "$train" --train good.bin --val val.bin --out new/out --epochs 2 --batch 4 --frames 3
    tail -n 1 stdout > last
    check "the last line of the output" grep -q -E "$last_line" last
    check_equal "what it leaves" "$(ls new/out | tr '\n' ' ')" "best.safetensors last.safetensors log.txt predictions.png resume.safetensors "
    check_equal "predictions.png" "$(od -A n -t x1 -N 8 new/out/predictions.png)" " 89 50 4e 47 0d 0a 1a 0a"
    check_equal "the log has a line for each step" "$(grep -c '^train ' new/out/log.txt)" 8
    check_equal "the log has a line for each validation" "$(grep -c '^val ' new/out/log.txt)" 2
    for line in "# --train good.bin" "# --val val.bin" "# --out new/out" "# --epochs 2" "# --batch 4" "# --frames 3" "# --config tiny" "# --scans fbs"; do
        check "the log says '$line'" grep -q -x -e "$line" new/out/log.txt
    done
    # options: the help and the head of the log list the same ones
    accept "--help" "$train" --help
    sed -n 's/^ *\(--[a-z-]*\) .*/\1/p' stdout | sort > in_help
    awk '!/^# --/ { exit } { print $2 }' new/out/log.txt | sort > in_log
    for option in $(cat in_log); do check "--help lists $option" grep -q -x -e "$option" in_help; done
    for option in $(grep -v -x -e --help -e --bench -e --eval -e --resume in_help); do check "the log begins with options, among them $option" grep -q -x -e "$option" in_log; done

    # the ablation, on two rows
    accept "dev/ablation.sh" env ROWS="basic C3" SEEDS="1 2" JOBS=1 OUT="$work/new/ablation" sh -c '"$0" "$@" 2> /dev/null' "$root/dev/ablation.sh" \
        --train "$work/small.bin" --val "$work/small.bin" --batch 2 --frames 1 --epochs 1
    check_equal "dev/ablation.sh: rows of its table" "$(grep -c -E '^\| (basic|C3) \|( [01][.][0-9]{4} ± [01][.][0-9]{4} \|){4}$' stdout)" 2

    # bits do not depend on the threads, but on the seed
    for threads in 1 4; do
        run env OMP_NUM_THREADS=$threads "$train" --train good.bin --val val.bin --out new/threads --epochs 2 --batch 4 --frames 3
        mv new/threads "new/threads$threads"
    done
    check "1 and 4 threads: the same best.safetensors" cmp new/threads1/best.safetensors new/threads4/best.safetensors
    check "1 and 4 threads: the same last.safetensors" cmp new/threads1/last.safetensors new/threads4/last.safetensors
    check "1 and 4 threads: the same pictures" cmp new/threads1/predictions.png new/threads4/predictions.png
    check "a second run gives the same bytes" cmp new/threads1/last.safetensors new/out/last.safetensors
    accept "--threads 3" "$train" --train good.bin --val val.bin --out new/threads3 --epochs 2 --batch 4 --frames 3 --threads 3
    check "--threads 3: the same last.safetensors" cmp new/threads1/last.safetensors new/threads3/last.safetensors
    accept "--seed 2" "$train" --train good.bin --val val.bin --out new/seed --epochs 2 --batch 4 --frames 3 --seed 2
    check "--seed 2: other bytes" [ "$(cmp new/seed/last.safetensors new/out/last.safetensors | wc -l)" -eq 1 ]

    # an older run is replaced file by file, each as a whole
    ln new/seed/best.safetensors new/link
    cp new/link new/copy
    accept "over an older run" "$train" --train good.bin --val val.bin --out new/seed --epochs 2 --batch 4 --frames 3
    check "over an older run: the old checkpoint's bytes are left alone" cmp new/link new/copy
    check "over an older run: the new checkpoint is there" cmp new/seed/best.safetensors new/out/best.safetensors

    for scans in fbs fb f s none; do trains "--scans $scans" --scans $scans; done
    trains "--init with other scans" --scans f --init base/last.safetensors
    trains "--bce weighted" --bce weighted
    trains "--dt-init vivim" --dt-init vivim
    for T in 1 2 7; do trains "--frames $T" --frames $T; done
    trains "no augmentation, no dropout" --flip 0 --jitter 0 --dropout 0 --drop-path 0
    trains "a batch as large as the set" --batch 4
    trains "a batch that does not divide the set" --batch 3
    trains "--size as in the shard" --size 32
    trains "--eval-every beyond the end" --eval-every 5 --epochs 2
    check_equal "--eval-every beyond the end: the last epoch is validated" "$(grep -c '^val ' new/out/log.txt)" 1
    for HxW in 45x37 33x32 32x65; do
        "$phantom" --out odd.bin --videos 2 --frames 2 --size $HxW > /dev/null
        "$affine" --shard odd.bin --steps 1 --batch 4 > /dev/null
        trains "frames of $HxW" --train odd.bin --val odd.bin
    done
    "$phantom" --out odd.bin --videos 3 --frames 1 --size 32x32 > /dev/null
    "$affine" --shard odd.bin --steps 1 --batch 4 > /dev/null
    trains "videos of one frame" --train odd.bin --val odd.bin
    trains "without the affine constraint" --affine none
    trains "without boundary losses" --edge 0
    trains "boundary head of one layer" --edge 1
    trains "--config b0" --config b0 --frames 1 --batch 1 --train odd.bin --val odd.bin
    accept "--bench without Mamba layers" "$train" --bench --config b0 --scans none --size 64 --frames 1
    accept "--bench, every option that counts" "$train" --bench --config tiny --scans f --init base/best.safetensors --size 32 --frames 1 \
        --batch 1 --bce weighted --dt-init vivim --drop-path 0 --dropout 0 --seed 2 --threads 1 --memory-limit 4
    accept "--bench" "$train" --bench --size 32 --frames 1
    tail -n 1 stdout > last
    check "--bench ends with a JSON line" grep -q -E '^\{"config": "tiny", "threads": [0-9]+, "forward_ms": [0-9.]+, "step_ms": [0-9.]+, "forward_peak_mb": [0-9.]+, "step_peak_mb": [0-9.]+\}$' last
}

# ----------------------------------------------------------------------------------------------------------------------
# train_vivim: prediction

test_prediction() {
    rm -rf new && mkdir new
    best="--checkpoint base/best.safetensors"
    accept "--eval" "$train" --eval --val good.bin $best
    check "--eval says Dice" grep -q -E '^Dice [01][.][0-9]{4}  Jaccard' stdout
    check "--eval says frames/s and memory" grep -q -E '^[0-9.]+ frames/s, peak memory [0-9]+ MB$' stdout
    check "--eval writes nothing" [ -z "$(find new ! -type d)" ]
    for stride in 0 1 2 9; do
        accept "--predict --stride $stride" "$train" --predict good.bin $best --out new/$stride.bin --stride $stride --frames 3
        check_equal "--predict --stride $stride: the same videos" "$(shape new/$stride.bin)" "$(shape good.bin)"
        cut_to good.bin $((1024 + 4 * 64 + 16 * 32 * 32 * 3)) frames1 && cut_to new/$stride.bin $((1024 + 4 * 64 + 16 * 32 * 32 * 3)) frames2
        check "--predict --stride $stride: the same frames" cmp frames1 frames2
    done
    accept "--predict in batches" "$train" --predict good.bin $best --out new/b.bin --frames 3 --batch 3
    check "--predict in batches: the same bytes" cmp new/0.bin new/b.bin
    accept "--predict on 4 threads" env OMP_NUM_THREADS=4 "$train" --predict good.bin $best --out new/b.bin --frames 3
    check "--predict on 4 threads: the same bytes" cmp new/0.bin new/b.bin
    accept "--predict at another size" "$train" --predict good.bin $best --out new/s.bin --size 64 --stride 2
    check_equal "--predict at another size: the video's own" "$(shape new/s.bin)" "$(shape good.bin)"
    picture flat/only/1.ppm 6 50 41 100
    if [ -x "$frames" ]; then
        accept "a video without masks" "$frames" --out new/nomask.bin flat/only
        accept "--predict a video without masks" "$train" --predict new/nomask.bin $best --out new/p.bin
        check_equal "--predict a video without masks: it has some now" "$(shape new/p.bin)" "1 1 41x50 1"
    else
        skip 3 "prediction without masks: prepro/frames is not built"
    fi
    for file in good.bin base/best.safetensors; do
        cp $file kept.bin && rm -f link.bin && ln -s kept.bin link.bin
        case $file in good*) given="--predict kept.bin $best" ;; *) given="--predict good.bin --checkpoint kept.bin" ;; esac
        refuse "--predict, --out takes $file's place" "--out link.bin" "$train" $given --out link.bin
        check "--predict, --out takes $file's place: it is whole" cmp $file kept.bin
    done
    accept "--eval, every option that counts" "$train" --eval --val good.bin $best --size 32 --frames 3 --stride 2 --threads 1 --memory-limit 4
    accept "--predict with --eval" "$train" --predict good.bin --eval $best --out new/p.bin --batch 2
    refuse "--eval without a checkpoint" "out/best.safetensors" "$train" --eval --val good.bin
    refuse "--predict, a missing shard" "none.bin" "$train" --predict none.bin $best --out new/p.bin
    refuse "--predict, not a checkpoint" "good.bin" "$train" --predict good.bin --checkpoint good.bin --out new/p.bin
    refuse "--predict, no model in the checkpoint" "affine.safetensors" "$train" --predict good.bin --checkpoint good_affine.safetensors --out new/p.bin
    refuse "--predict into a missing directory" "new/none/p.bin" "$train" --predict good.bin $best --out new/none/p.bin
    mkdir new/p.bin
    refuse "--predict, too little memory" "--frames --memory-limit" "$train" --predict good.bin $best --out new/p.bin --frames 50 --stride 50 --memory-limit 0.005
    refuse "training, too little memory" "--frames --memory-limit" "$train" --train good.bin --val good.bin $quick --out new/o --memory-limit 0.02 --frames 40
    cp base/best.safetensors nan.safetensors
    put nan.safetensors "$(tensor_offset nan.safetensors out.bias)" '\000\000\300\177'
    refuse "--predict, not a number" "good.bin" "$train" --predict good.bin --checkpoint nan.safetensors --out new/p.bin
    if $can_limit_files; then
        refuse "--predict, disk full" "new/p.bin" file_limit 10 "$train" --predict good.bin $best --out new/p.bin
    else
        skip 1 "--predict on a full disk: this shell cannot limit file sizes"
    fi
}

# ----------------------------------------------------------------------------------------------------------------------
# prepro/affine, and its file in train_vivim

test_affine() {
    refuse_affine() { refuse "$1" "$2" "$train" --train good.bin --val good.bin --out new/out $quick --affine "$2" $3; }
    refuse_affine "--affine missing" "missing.safetensors"
    refuse_affine "--affine is a shard" "good.bin"
    refuse_affine "--affine is a checkpoint" "base/best.safetensors"
    refuse_affine "--affine of another patch side" "good_affine.safetensors" "--patch 16"
    whole=$(size good_affine.safetensors)
    for bytes in 7 100 $((whole / 2)) $((whole - 1)); do
        cut_to good_affine.safetensors $bytes bad.safetensors && refuse_affine "--affine of $bytes bytes" "bad.safetensors"
    done
    cp good_affine.safetensors bad.safetensors && put bad.safetensors "$(tensor_offset bad.safetensors affine.fc2.bias)" '\000\000\300\177'
    refuse_affine "--affine with NaN" "bad.safetensors"
    refuse "no network beside the shard" "val_affine.safetensors prepro/affine" "$train" --train val.bin --val good.bin --out new/out $quick
    refuse "--patch larger than the frames" "--patch" "$train" --train good.bin --val good.bin --out new/out $quick --patch 64
    refuse_option edge x 2 4 -1
    refuse_option patch x -1 5000
    refuse "affine, no shard" "missing.bin" "$affine" --shard missing.bin --out new/a
    refuse "affine, shard without masks" "nomasks.bin masks" "$affine" --shard nomasks.bin --out new/a
    refuse "affine, empty masks" "black.bin" "$affine" --shard black.bin --out new/a
    refuse "affine, --out takes the shard's place" "--out good.bin" "$affine" --shard good.bin --out good.bin
    refuse "affine, unknown option" "--step" "$affine" --shard good.bin --out new/a --step 3
    refuse "affine, no value" "--steps" "$affine" --shard good.bin --out new/a --steps
    refuse "affine, patch larger than the frames" "--patch" "$affine" --shard good.bin --out new/a --patch 33
    refuse "affine, patch and grid" "--grid" "$affine" --shard good.bin --out new/a --patch 8 --grid 2
    refuse "affine, directory missing, asked before it trains" "missing/a" "$affine" --shard good.bin --steps 100000 --out missing/a
    for option in patch grid steps batch lr seed threads; do refuse "affine --$option x" "--$option" "$affine" --shard good.bin --out new/a --$option x; done
    accept "affine --help" "$affine" --help
    for threads in 1 4; do accept "affine, $threads threads" "$affine" --shard good.bin --steps 5 --batch 32 --patch 9 --threads $threads --out new/$threads; done
    check "affine, 1 and 4 threads: the same file" cmp new/1 new/4
    accept "a larger patch" "$train" --train good.bin --val good.bin --out new/out $quick --affine new/1 --patch 9
}

# ----------------------------------------------------------------------------------------------------------------------

quick="--epochs 1 --batch 4 --frames 1"
"$phantom" --out good.bin --videos 4 --frames 4 --size 32x32 > /dev/null &&
"$phantom" --out val.bin --videos 2 --frames 3 --size 32x32 --seed 2 > /dev/null &&
"$phantom" --out small.bin --videos 2 --frames 2 --size 32x32 --seed 3 > /dev/null &&
"$phantom" --out sixteen.bin --videos 16 --frames 1 --size 32x32 > /dev/null &&
"$phantom" --out many.bin --videos 400 --frames 5 --size 32x32 > /dev/null &&
"$affine" --shard good.bin --steps 3 --batch 16 > /dev/null &&
for shard in small sixteen many wide plain kept; do cp good_affine.safetensors ${shard}_affine.safetensors || exit 1; done &&
"$train" --train good.bin --val good.bin $quick --out base > stdout 2> stderr ||
    { echo "test_cli.sh: phantom or train_vivim does not work at all:"; cat stderr; exit 1; }
cut_to good.bin $((1024 + 4 * 64 + 16 * 32 * 32 * 3)) nomasks.bin && put nomasks.bin 28 '\000\000\000\000'
{ cat nomasks.bin; dd if=/dev/zero bs=1024 count=16 2> /dev/null; } > black.bin && put black.bin 28 '\001\000\000\000'
mkdir somewhere pictures
cp base/predictions.png pictures/p.png
cp good.bin kept.bin

# what can be limited here? (a limited program must still start; AddressSanitizer maps terabytes)
can_limit_files=false can_limit_memory=false
(file_limit 1 dd if=/dev/zero of=limited bs=4096 count=1) > /dev/null 2>&1 || can_limit_files=true
(memory_limit 400000 "$train" --help) > /dev/null 2>&1 && can_limit_memory=true

for group in ${*:-phantom frames shards options out init affine prediction limits nan signals training}; do
    if [ "$group" != frames ] || [ -x "$frames" ]; then "test_$group"; else skip 1 "all of prepro/frames: it was not built"; fi
done

tally
