# test_lib.sh - what the scripts that use the programs as a person does have in common: a directory of their own, which is
# removed at the end, running a command, judging it, counting. They set programs='name|name' and say  . "$root/dev/test_lib.sh"

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
cd "$work" || exit 1

# One thread, unless a case says otherwise, and waiting threads sleep: other work on this machine then costs little time.
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C
export OMP_NUM_THREADS OMP_WAIT_POLICY LC_ALL

passed=0 failed=0 skipped=0 command= status=
: > stdout && : > stderr

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
    ("$@") > stdout 2> stderr < "${input:-/dev/null}"
    status=$?
}

# refuse CASE WORDS COMMAND: the command exits 1 with one line on stderr, "program: ...", in which every one of WORDS
# stands. Commands write below new/, which is emptied before; afterwards it holds no file.
refuse() {
    what=$1 words=$2
    shift 2
    rm -rf new && mkdir new
    run "$@"
    judge_refusal && pass
}

judge_refusal() {
    problem=
    [ "$status" -eq 1 ] || problem="the exit status is not 1"
    [ -n "$problem" ] || [ "$(wc -l < stderr)" -eq 1 ] || problem="stderr is not one line"
    [ -n "$problem" ] || grep -q -E "^($programs): " stderr || problem="stderr does not begin with the program's name"
    for word in $words; do
        [ -n "$problem" ] || grep -q -F -e "$word" stderr || problem="stderr does not say '$word'"
    done
    left=$(find new ! -type d | head -n 3 | tr '\n' ' ')
    [ -n "$problem" ] || [ -z "$left" ] || problem="it left $left"
    [ -z "$problem" ] && return 0
    fail "$what" "$problem"
    return 1
}

accept() {  # accept CASE COMMAND: exits 0 and says nothing on stderr
    what=$1
    shift
    run "$@"
    if [ "$status" -ne 0 ]; then fail "$what" "the exit status is not 0"
    elif [ -s stderr ]; then fail "$what" "it complains"
    else pass; fi
}

check() {  # check CASE TEST: TEST is any command; its status decides
    checked=$1
    shift
    if "$@" > /dev/null 2>&1; then pass; else fail "$checked" "not so: $*"; fi
}

check_equal() { check "$1: '$2' is '$3'" [ "$2" = "$3" ]; }

put() {  # put FILE OFFSET BYTES: overwrites bytes (as printf's octal escapes)
    printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2> /dev/null
}

cut_to() { dd if="$1" of="$3" bs="$2" count=1 2> /dev/null; }  # cut_to FILE BYTES OUT: its first BYTES (at least 1) bytes
size() { wc -c < "$1" | tr -d ' '; }

tally() {  # the last line and the verdict
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
}
