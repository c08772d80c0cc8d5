#!/usr/bin/env bash
# Runs a verb on this machine so that it outlives the connection that started it:
#
#     launch/background.sh start VERB ARGUMENT...    returns at once
#     launch/background.sh follow                    shows the log until the run ends; its exit status
#     launch/background.sh stop                      SIGTERM, so that it saves; returns when it has ended
#
# tpu_vm.sh uses it on every worker. The log and the rest lie in .launch/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

running() {
    [[ -f $STATE/supervisor ]] && kill -0 "$(<$STATE/supervisor)" 2>/dev/null
}

start() {
    check_verb "$@"
    ! running || die "$PWD: a run is under way here; stop it first, or follow it"
    mkdir -p $STATE
    rm -f $STATE/worker $STATE/supervisor $STATE/status
    setsid launch/background.sh supervise "$@" </dev/null >$STATE/log 2>&1 &
    until [[ -f $STATE/worker ]]; do
        kill -0 "$!" 2>/dev/null || die "$PWD/$STATE/log: the run did not start"
        sleep 0.1
    done
    echo "started: $(quote "$@")"
}

supervise() {
    echo "$$" >$STATE/supervisor
    launch/worker.sh "$@" &
    echo "$!" >$STATE/worker.new
    mv $STATE/worker.new $STATE/worker
    local status=0
    wait "$!" || status=$?
    echo "$status" >$STATE/status
}

follow() {
    [[ -f $STATE/log ]] || die "$PWD: found no run, expected one that start began"
    if running; then
        tail --lines=+1 --pid="$(<$STATE/supervisor)" --follow $STATE/log
    else
        cat $STATE/log
    fi | label "${HOSTNAME##*-w-}"
    # The end of the machine, or SIGKILL, leaves none.
    [[ -f $STATE/status ]] || die "$PWD: the run ended without a status; the same command continues it"
    exit "$(<$STATE/status)"
}

stop() {
    running || { echo "no run is under way" && return; }
    kill -s TERM "$(<$STATE/worker)"
    while running; do sleep 0.2; done
    echo "ended with status $(<$STATE/status)"
}

case ${1-} in
start | supervise | follow | stop) "$@" ;;
--help) usage launch/background.sh ;;
*) die "action: found '${1-}', expected start, follow or stop" ;;
esac
