# shellcheck shell=bash
# The environment of every verb: sourced, never run. What is set already is kept.
#
# Programs are compiled once: the cache is worth most where every process reads the same folder (only the first of
# several processes writes to it), so on a cluster set JAX_COMPILATION_CACHE_DIR to a folder that all of them see.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="${JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES:--1}"
