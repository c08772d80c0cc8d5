# shellcheck shell=bash
# What the launchers share: sourced, never run.

VERBS="prepare, train, generate or evaluate"
# What launchers leave in the checkout; git ignores it.
# shellcheck disable=SC2034  # they use it
STATE=.launch
SAFE='^[A-Za-z0-9_@%+=:,./-]+$'
dry_run=false

die() {
    printf '%s\n' "$*" >&2
    exit 2
}

# The text between the first line of a script and its first command, as --help.
usage() {
    sed -n -e '1d' -e '/^#SBATCH/d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$1"
    exit 0
}

# An option that takes a value: need_value "$@".
need_value() {
    (($# > 1)) || die "$1: found nothing after it, expected a value"
}

# $1: name, $2: value, $3: the least it may be.
check_number() {
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
        die "$1: found '$2', expected a whole number, at least $3"
    fi
}

# $1: name, $2: value.
check_given() {
    [[ -n $2 ]] || die "$1: found nothing, expected a value; see --help"
}

check_verb() {
    case ${1-} in
    prepare | train | generate | evaluate) ;;
    *) die "verb: found '${1-}', expected $VERBS; see --help" ;;
    esac
}

# Its arguments as one line that a shell (or xargs) splits into the same arguments again.
quote() {
    local argument separator=
    for argument; do
        [[ $argument != *[[:cntrl:]]* ]] || die "argument ${argument@Q}: found a line break or control character, expected none"
        if [[ -z $argument ]]; then
            argument="''"
        elif [[ ! $argument =~ $SAFE ]]; then
            argument=$(sed 's/[^A-Za-z0-9_@%+=:,./-]/\\&/g' <<<"$argument")
        fi
        printf '%s%s' "$separator" "$argument"
        separator=' '
    done
}

# Its arguments as a line for bash, in the form that people read best.
show() {
    local argument separator=
    for argument; do
        [[ $argument =~ $SAFE ]] || argument=${argument@Q}
        printf '%s%s' "$separator" "$argument"
        separator=' '
    done
    echo
}

# Runs a command, or only says it with --dry-run.
run() {
    if $dry_run; then
        show "$@"
    else
        "$@"
    fi
}

need() {
    $dry_run || command -v "$1" >/dev/null || die "$1: not found on the PATH; $2"
}

# Copies standard input, each line behind $1, as soon as it is there. The carriage returns of progress bars end lines,
# too, and so does the end; empty lines are left out.
label() {
    {
        stdbuf -oL tr '\r' '\n'
        echo
    } | sed -u -e '/^$/d' -e "s|^|[$1] |"
}

# Packs what git tracks, as it is in the folder now, into $1.
pack() {
    git rev-parse --is-inside-work-tree >/dev/null || die "$PWD: found no git checkout, expected one to copy from"
    mkdir -p "$(dirname "$1")"
    git ls-files -z | tar --create --gzip --null --files-from=- --file="$1"
}
