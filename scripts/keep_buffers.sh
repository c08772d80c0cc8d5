#!/bin/sh
# Runs a command with glibc told to keep freed memory, on huge pages: `scripts/keep_buffers.sh python -m ...`.
#
# XLA allocates its buffers anew for every call. On a CPU, glibc would map and unmap each of them, and the kernel
# zeroes every page again: a third of the time of a training step (benchmarks/RESULTS.md).
set -eu
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1000000000000}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$@"
