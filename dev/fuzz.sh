#!/usr/bin/env bash
# Throws damaged files at the two readers, prepro/shard.h and prepro/safetensors.h: a fuzzer for each starts from the files
# made below, changes them at random for so long and looks for a crash, a leak, a broken promise or a slow one.
#
#   dev/fuzz.sh [seconds]         for each of the two (60); needs clang and its fuzzer runtime, Linux
#
# Exit status 1, the input's path and the command that shows the failure again if there is any. CC=clang-16 chooses another.
set -euo pipefail
export LC_ALL=C                   # ${#text} counts bytes
cd "$(dirname "$0")/.."
fail() { echo "fuzz.sh: $*" >&2; exit 1; }

seconds=${1:-60} compiler=${CC:-clang}
[[ $# -le 1 && $seconds =~ ^[1-9][0-9]*$ ]] || fail "'$*': expected a number of seconds, for example: dev/fuzz.sh 60"
dir=$(mktemp -d)
scratch=$dir                      # what is written and read again; in memory if that is possible
if [ -w /dev/shm ]; then scratch=$(mktemp -d -p /dev/shm); fi
trap 'rm -rf "$dir" "$scratch"' EXIT

mkdir "$dir/safetensors" "$dir/shard"
echo 'int LLVMFuzzerTestOneInput(const char *data, unsigned long size) { return !data && size; }' > "$dir/try.c"
"$compiler" -fsanitize=fuzzer,address,undefined "$dir/try.c" -o "$dir/try" 2>/dev/null ||
    fail "$compiler or its fuzzer runtime is missing: apt-get install clang libclang-rt-dev (with clang-N: libclang-rt-N-dev)"
for name in safetensors shard; do
    "$compiler" -std=c99 -pedantic -Wall -Wextra -Wshadow -Werror -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all \
        -fsanitize=fuzzer,address,undefined "dev/fuzz_$name.c" -o "$dir/fuzz_$name" -lm
done

# ----------------------------------------------------------------------------------------------------------------------
# the files to start from

le() {                            # value bytes: the number, little-endian
    local text="" byte i
    for ((i = 0; i < $2; i++)); do
        printf -v byte '\\x%02x' $((($1 >> 8 * i) & 255))
        text+=$byte
    done
    printf '%b' "$text"
}
zeros() { head -c "$1" /dev/zero; }
for ((i = 0; i < 2048; i++)); do le $((i * 7)) 1; done > "$dir/pattern"
pattern() { head -c "$1" "$dir/pattern"; }      # up to 2048 bytes; they differ, so a picture in the wrong place is seen
repeat() {                        # text times
    local padded
    printf -v padded '%*s' "$2" ''
    printf '%s' "${padded// /$1}"
}

# name header bytes-of-data [length-before-the-header]
safetensors() {
    { le "${4:-${#2}}" 8; printf '%s' "$2"; pattern "$3"; } > "$dir/safetensors/$1"
}
tensor() { printf '"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%s,%s]}' "$@"; }     # name dtype shape begin end
tensors() {                       # count: bytes of one element, in the order of the file
    local i
    for ((i = 0; i < $1; i++)); do tensor "t$i" U8 1 "$i" $((i + 1)); [ $((i + 1)) = "$1" ] || printf ,; done
}

for type in F64:8 F32:4 F16:2 BF16:2 I64:8 I32:4 I16:2 I8:1 U8:1 BOOL:1; do
    n=$((6 * ${type#*:}))
    safetensors "${type%:*}" "{$(tensor x "${type%:*}" 2,3 0 $n)}" $n
done
note='"__metadata__":{"format":"pt","quoted":"a \"word\" \\ and \/ \b\f\n\r\t","escaped":"\u0041\u00e9\u20ac\ud83d\ude00"}'
safetensors nothing '{}' 0
safetensors scalar "{$(tensor s F32 '' 0 4)}" 4
safetensors empty "{$(tensor e F32 0,9 0 0),$(tensor f I64 3,0 0 0),$(tensor x F32 1 0 4),$(tensor g U8 0 4 4)}" 4
safetensors order "{$(tensor z F16 2 8 12),$(tensor a F64 1 0 8),$(tensor m U8 1 12 13)}" 13
safetensors dimensions "{$(tensor x BOOL 1,2,1,1,1,1,1,2 0 4)}" 4
safetensors metadata "{$note,$(tensor x F32 1 0 4)}" 4
safetensors metadata_only "{$note}" 0
utf8=$(printf '\303\251 \360\237\230\200')
safetensors names "{$(tensor "$utf8" I8 1 0 1),$(tensor '\u0001\u001f\n' I8 1 1 2),$(tensor '' I8 1 2 3)}" 3
safetensors spaces "$(printf ' { "x" :\t{ "data_offsets" : [ 0 , 2 ] , "shape" : [\n2 ] , "dtype" : "U8" } }    ')" 2
safetensors many "{$(tensors 300)}" 300
safetensors long_name "{$(tensor "$(repeat x 4000)" U8 1 0 1)}" 1

safetensors length_0 '{}' 0 0
safetensors length_short "{$(tensor x U8 1 0 1)}" 1 20
safetensors length_long '{}' 0 3
safetensors length_limit '{}' 0 100000001
safetensors length_2_63 '{}' 0 $((1 << 63))
safetensors length_2_64 '{}' 0 -1
safetensors overlap "{$(tensor a F32 2 0 8),$(tensor b F32 2 4 12)}" 12
safetensors same "{$(tensor a F32 2 0 8),$(tensor b F32 2 0 8)}" 8
safetensors overlap_and_hole "{$(tensor a F32 2 0 8),$(tensor b F32 2 4 12)}" 16
safetensors hole "{$(tensor a F32 1 0 4),$(tensor b F32 1 8 12)}" 12
safetensors behind "{$(tensor a F32 1 0 4)}" 5
safetensors outside "{$(tensor a F32 3 0 12)}" 8
safetensors backwards "{$(tensor a F32 1 4 0)}" 4
safetensors negative "{$(tensor a F32 -1 -4 0)}" 4
safetensors precision "{$(tensor a U8 9007199254740993 0 9007199254740993)}" 4
safetensors largest "{$(tensor a U8 999999999999999999 0 999999999999999999)}" 4
safetensors large "{$(tensor a U8 9999999999999999999 0 1)}" 1
safetensors larger "{$(tensor a U8 1000000000000000000 0 18446744073709551616)}" 4
safetensors product "{$(tensor a F64 4294967296,4294967296 0 0)}" 0
safetensors product_wraps "{$(tensor a U8 256,256,256,256,256,256,256,256 0 0),$(tensor b U8 256 0 256)}" 256
safetensors product_0 "{$(tensor a F64 999999999999999999,999999999999999999,0 0 0)}" 0
safetensors dimensions_9 "{$(tensor a U8 1,1,1,1,1,1,1,1,1 0 1)}" 1
safetensors fraction "{$(tensor a U8 1.0 0 1e0)}" 1
safetensors leading_zero "{$(tensor a U8 01 0 1)}" 1
safetensors type "{$(tensor a F8_E4M3 1 0 1)}" 1
safetensors twice "{$(tensor a U8 1 0 1),$(tensor a U8 1 1 2)}" 2
safetensors twice_escaped "{$(tensor '\u001b\n\u009b31m' U8 1 0 1),$(tensor '\u001b\n\u009b31m' U8 1 1 2)}" 2
safetensors field_twice '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}' 1
safetensors field_missing '{"a":{"dtype":"U8","shape":[1]}}' 1
safetensors metadata_twice '{"__metadata__":{},"__metadata__":{}}' 0
safetensors key_twice '{"__metadata__":{"a":"1","b":"2","a":"3"}}' 0
safetensors metadata_number '{"__metadata__":{"a":1}}' 0
safetensors deep_list "{\"a\":{\"shape\":$(repeat '[' 4000)" 0
safetensors deep_object "$(repeat '{"a":' 2000)" 0
safetensors surrogate "{$(tensor '\ud83d' U8 1 0 1)}" 1
safetensors surrogates "{$(tensor '\ude00\ud83d\u0041' U8 1 0 1)}" 1
safetensors zero "{$(tensor 'a\u0000b' U8 1 0 1)}" 1
safetensors control "{$(tensor "$(printf 'a\001\033')" U8 1 0 1)}" 1
safetensors not_utf8 "{$(tensor "$(printf '\300\200\377\233')" U8 1 0 1)}" 1
i=0
for end in "" "\\" "\\u" "\\u12" "\\ud83d" "\\ud83d\\" "\\ud83d\\ude"; do safetensors "unfinished_$((i++))" "{\"a$end" 0; done
safetensors comma "{$(tensor a U8 1 0 1),}" 1
safetensors tail "{$(tensor a U8 1 0 1)} {}" 1

cat > "$dir/safetensors.dict" <<'END'
"\"__metadata__\":{"
"\"__metadata__\""
"\"dtype\":"
"\"shape\":["
"\"data_offsets\":["
"\"F64\""
"\"F32\""
"\"F16\""
"\"BF16\""
"\"I64\""
"\"I32\""
"\"I16\""
"\"I8\""
"\"U8\""
"\"BOOL\""
"\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
"\"format\":\"pt\""
"\":\""
"\",\""
"},\""
"[0,0]"
"[]"
"{}"
"\\u0041"
"\\u0000"
"\\u009b"
"\\ud83d"
"\\ude00"
"\\\""
"\\\\"
"9007199254740993"
"999999999999999999"
"18446744073709551616"
"-1"
"1e3"
END

# name H W masks video... ; a video is frames:name
shard() {
    local name=$1 H=$2 W=$3 masks=$4 frames=0 video number
    shift 4
    for video; do frames=$((frames + ${video%%:*})); done
    {
        for number in 0x4D565656 1 $# "$frames" "$H" "$W" 3 "$masks"; do le "$number" 4; done
        zeros 992
        for video; do
            le "${video%%:*}" 4
            video=${video#*:}
            printf '%s' "$video"
            zeros $((60 - ${#video}))
        done
        pattern $((frames * H * W * (3 + masks)))
    } > "$dir/shard/$name"
}
damaged() {                       # name offset value: the shard two_masks with one number changed
    cp "$dir/shard/two_masks" "$dir/shard/$1"
    le "$3" 4 | dd of="$dir/shard/$1" bs=1 seek="$2" conv=notrunc status=none
}

shard one 1 1 0 1:a
shard one_masks 1 1 1 1:a
shard two 2 3 0 1:first 2:second
shard two_masks 3 2 1 2:first 1:second
shard three 4 4 0 1:x 1:y 3:z
shard three_masks 5 7 1 1:x 2:y 1:z
shard long_name 2 2 1 "1:$(repeat n 59)"
shard frames_0 2 2 1 0:a 3:b
shard frames_negative 2 2 1 -1:a 4:b
shard name_without_end 2 2 1 "1:$(repeat n 60)"
shard name_empty 2 2 1 1:
shard name_dots 2 2 1 1:..
shard name_slash 2 2 1 1:a/b
shard name_control 2 2 1 1:a$'\302\233'1m
shard name_utf8 2 2 1 1:$'\303\251'
shard name_not_utf8 2 2 1 1:a$'\351'
head -c 1023 "$dir/shard/one" > "$dir/shard/cut_header"
head -c 1024 "$dir/shard/one" > "$dir/shard/cut_table"
head -c 1120 "$dir/shard/two" > "$dir/shard/cut_pixels"
i=0
for change in 0:0 4:2 8:0 8:-1 8:1000000 8:1000001 12:0 12:4 12:0x7FFFFFFF 16:0 16:16384 16:-1 20:0x40000000 24:4 28:2 28:0 \
              32:1 1020:-1 1024:0 1024:1 1024:3 1024:-1 1024:0x7FFFFFFF; do
    damaged "damaged_$((i++))" "${change%:*}" "${change#*:}"
done

# ----------------------------------------------------------------------------------------------------------------------
# one after the other, one process each

fuzz() {                          # name largest-input option...
    local name=$1 largest=$2
    shift 2
    echo "$name: $seconds s, from $(find "$dir/$name" -type f | wc -l) files"
    local log=$dir/$name.log input
    if ! TMPDIR=$scratch ASAN_OPTIONS=quarantine_size_mb=32 "$dir/fuzz_$name" -max_total_time="$seconds" -max_len="$largest" \
        -rss_limit_mb=512 -timeout=5 -print_final_stats=1 -artifact_prefix="$dir/" "$@" "$dir/$name" > "$log" 2>&1; then
        tail -n 60 "$log" >&2
        input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        [ -n "$input" ] || fail "fuzz_$name was stopped"
        trap 'rm -rf "$scratch"' EXIT           # the input and the program stay
        fail "$input breaks prepro/$name.h; to see it again: $dir/fuzz_$name $input"
    fi
    grep -E 'DONE|average_exec_per_sec|peak_rss' "$log"
}
fuzz safetensors 32768 -dict="$dir/safetensors.dict"
fuzz shard 16384
echo "fuzz.sh: nothing found"
