#!/usr/bin/env bash
# Runs one process of a verb with the environment that all of them want:
#
#     launch/worker.sh VERB ARGUMENT...
#
# VERB is prepare, train, generate or evaluate. Every launcher ends here. The process becomes the verb itself, so that
# signals reach it. PYTHON names the interpreter; by default it is .venv/bin/python where there is one, else python3.
# NABLA_COORDINATOR and its siblings (docs/launch.md) say which of several processes this is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
source launch/environment.sh

[[ ${1-} != --help ]] || usage launch/worker.sh
check_verb "$@"
python=python3
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
# Lines reach the log when they are written, also from a process that is killed.
export PYTHONUNBUFFERED=1
exec scripts/keep_buffers.sh "${PYTHON:-$python}" -m "nabla_jax.$1" "${@:2}"
