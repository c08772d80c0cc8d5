#!/usr/bin/env bash
# Installs this checkout into .venv, for a kind of accelerator:
#
#     launch/install.sh tpu|cuda|cpu
#
# Needs Python 3.11 or newer; where there is none (images of TPU VMs have 3.10), uv brings one. PYTHON names another.
# Does nothing where it is done already, so that it can stand before every start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

kind=${1-}
[[ $kind != --help ]] || usage launch/install.sh
case $kind in
tpu | cuda) extra="[$kind]" ;;
cpu) extra= ;;
*) die "kind: found '$kind', expected tpu, cuda or cpu" ;;
esac

done_file=.venv/installed-$kind
want=$(cat pyproject.toml constraints.txt | cksum)
[[ ! -f $done_file || $(<"$done_file") != "$want" ]] || exit 0
python=${PYTHON:-python3}
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    "$python" -m venv .venv
else
    "$python" -m pip install --quiet --user uv
    "$python" -m uv venv --quiet --seed --clear --python 3.11 .venv
fi
.venv/bin/python -m pip install -c constraints.txt -e ".$extra"
echo "$want" >"$done_file"
