#!/usr/bin/env bash
# Runs a verb as several processes on this machine, over gloo:
#
#     launch/local_multiprocess.sh [OPTION...] VERB ARGUMENT...
#     launch/local_multiprocess.sh --processes 2 --devices 4 train --config configs/omk_fill.py:toy
#
#     --processes N   how many processes (2)
#     --devices N     fake devices of each (1)
#     --grace N       seconds that the others have to end when one has failed (30)
#     --port N        where the first process listens; default a free port
#     --dry-run       print the commands
#
# Lines begin with the number of their process. When one process fails, the others get SIGTERM, and SIGKILL when the
# grace is over. Ctrl-C and SIGTERM are passed on to every process once, so that a run saves and stops; a second one
# interrupts it at once. The exit status is that of the first process that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

processes=2 devices=1 grace=30 port=
while (($#)); do
    case $1 in
    --processes | --devices | --grace | --port)
        need_value "$@"
        declare "${1#--}=$2"
        shift
        ;;
    --dry-run) dry_run=true ;;
    --help) usage launch/local_multiprocess.sh ;;
    -*) die "option: found '$1', expected one of --help" ;;
    *) break ;;
    esac
    shift
done
check_number --processes "$processes" 1
check_number --devices "$devices" 1
check_number --grace "$grace" 0
check_verb "$@"

while [[ -z $port ]]; do
    # Below the range from which the system gives ports to others.
    port=$((RANDOM % 10000 + 20000))
    if { : <>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null; then port=; fi
done
check_number --port "$port" 1

common=(
    "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "NABLA_COORDINATOR=127.0.0.1:$port"
    # Or jax listens on every address of the machine.
    "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port"
    "NABLA_PROCESS_COUNT=$processes"
)
commands() {
    command=(env "${common[@]}" "NABLA_PROCESS_INDEX=$1" launch/worker.sh "${@:2}")
}

if $dry_run; then
    for ((i = 0; i < processes; i++)); do
        commands "$i" "$@"
        run "${command[@]}"
    done
    exit 0
fi

signals=0 status=0 deadline=
pids=() labels=() alive=()

# shellcheck disable=SC2329  # the traps call it
forward() {
    signals=$((signals + 1))
    printf 'launcher: SIG%s passed on\n' "$1" >&2
    send "$1"
    # After a second one nobody waits for a save any more.
    ((signals == 1)) || deadline=$((SECONDS + grace))
}
send() {
    local i
    for i in "${alive[@]}"; do kill -s "$1" "${pids[i]}" 2>/dev/null || true; done
}
trap 'forward INT' INT
trap 'forward TERM' TERM HUP

for ((i = 0; i < processes; i++)); do
    # Signals of the terminal must not end what carries the last lines.
    exec {out}> >(
        trap '' INT TERM HUP
        label "$i"
    )
    labels+=("$!")
    commands "$i" "$@"
    # In a process group of its own, so that Ctrl-C reaches it through `forward` alone.
    set -m
    "${command[@]}" </dev/null >&"$out" 2>&1 &
    set +m
    pids+=("$!")
    alive+=("$i")
    exec {out}>&-
done

while ((${#alive[@]})); do
    left=()
    for i in "${alive[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then
            left+=("$i")
            continue
        fi
        ended=0
        wait "${pids[i]}" || ended=$?
        if ((ended && !status)); then
            status=$ended
            printf 'launcher: process %s ended with status %s\n' "$i" "$ended" >&2
        fi
    done
    alive=(${left[@]+"${left[@]}"})
    ((${#alive[@]})) || break
    if ((status && !signals)) && [[ -z $deadline ]]; then
        deadline=$((SECONDS + grace))
        send TERM
    fi
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
        printf 'launcher: killing what is left: %s\n' "${alive[*]}" >&2
        send KILL
    fi
    sleep 0.2 || true
done
# What a process that was killed left behind, such as workers of its own, ends with it.
for pid in "${pids[@]}"; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
for pid in "${labels[@]}"; do wait "$pid" || true; done
exit "$status"
