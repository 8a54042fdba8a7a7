#!/bin/sh
# Times the kernel laboratory on this CPU and writes dev/results/cpu.md.
#
#   make dev && dev/lab.sh                  everything: some minutes on two cores, on which nothing else should run
#   dev/lab.sh scan_forward products        these parts anew; the others stay as the file has them
#
# THREADS="1 2"     numbers of threads (1 and all)      OPTIONS="--preset b0.2"    for the parts but matmul and products
# RESULTS=FILE      to write (dev/results/cpu.md)
set -eu
cd "$(dirname "$0")/.."
results=${RESULTS:-dev/results/cpu.md} all="scan_forward scan_backward dwconv3d layernorm attention matmul products"
threads=${THREADS:-"1 $(getconf _NPROCESSORS_ONLN | grep -v '^1$' || true)"}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

measure() {  # measure COMMAND...: what it prints, for each number of threads
    for n in $threads; do
        printf '\n`%s --threads %s`\n\n' "$*" "$n"
        "$@" --threads "$n"
    done
}

# all products of the four stages of b3, what ships beside OpenBLAS: GFLOP/s, percent of the limit, of OpenBLAS, a row each
products() {
    columns="" head="| stage | product" line="|--:|:--"
    for n in $threads; do
        : > "$work/products.$n"
        for stage in 1 2 3 4; do
            dev/matmul 0,8 --preset b3.$stage --seconds 0.1 --threads "$n" --csv > "$work/csv"
            [ $stage -gt 1 ] || { echo && sed -n '1s/# //p;3s/# matmul; //p' "$work/csv"; }
            awk -F , -v stage=$stage '$3 == 0 && !/^#/ { printf "| %d | %s\n", stage, $2 > names
                printf " | %s | %.0f | %s\n", $10, $12, $13 }' names="$work/names.$stage" "$work/csv" >> "$work/products.$n"
        done
        head="$head | GFLOP/s, $n threads | % of limit | % of OpenBLAS" line="$line|--:|--:|--:"
        columns="$columns $work/products.$n"
    done
    printf '\n%s |\n%s|\n' "$head" "$line"
    cat "$work"/names.? > "$work/names"
    paste -d '\0' "$work/names" $columns | sed 's/$/ |/'
}

part() {
    printf '## %s\n' "$1"
    case $1 in
        products) products ;;
        matmul)   measure dev/matmul all --rows 20480 --outputs 256 --inputs 64 ;;
        *)        measure "dev/$1" all ${OPTIONS:-} ;;
    esac
}

for name in "$@"; do
    case " $all " in *" $name "*) ;; *) echo "lab.sh: $name: no such part; there are $all" >&2; exit 1 ;; esac
done
for name in ${*:-$all}; do
    program=${name%products}
    [ -x "dev/${program:-matmul}" ] || { echo "lab.sh: dev/${program:-matmul}: not built; run make dev" >&2; exit 1; }
    part "$name" > "$work/$name.new"
    mv "$work/$name.new" "$work/$name.md"
done
for name in $all; do  # what was not measured now is taken from the file
    [ -f "$work/$name.md" ] || [ ! -f "$results" ] ||
        awk -v name="$name" '/^## / { inside = $2 == name } inside' "$results" > "$work/$name.md"
done
mkdir -p "$(dirname "$results")"
{
    printf '# The kernel laboratory on a CPU\n\n'
    printf 'Written by `dev/lab.sh`; [dev/README.md](../README.md) says what the columns mean. Every table begins with the\n'
    printf 'machine, the compiler, the date and the speed of a copy, measured then.\n\n'
    for name in $all; do [ ! -s "$work/$name.md" ] || { cat "$work/$name.md"; echo; }; done
} > "$work/results"
cat -s "$work/results" > "$results"
echo "wrote $results"
