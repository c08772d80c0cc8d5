#!/usr/bin/env bash
# Installs Debian's Chromium where no Chromium is on the PATH: the tests in tests/browser drive one.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        echo "$name is there"
        exit 0
    fi
done
if ! command -v apt-get >/dev/null; then
    echo "found no chromium and no apt-get: install Chromium (or Chrome) and run this again" >&2
    exit 2
fi
run=()
[[ $(id -u) == 0 ]] || run=(sudo)
export DEBIAN_FRONTEND=noninteractive
"${run[@]}" apt-get update -qq
"${run[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
command -v chromium >/dev/null || { echo "apt-get installed no chromium" >&2; exit 1; }
echo "installed $(chromium --version)"
