#!/usr/bin/env bash
# The main job on the embedded world, from nothing to a report: make demo [WORLD_SEED=7]
#
# Every command continues what an interrupted run left and does nothing where its result is complete, so that the
# whole script can be stopped at any moment and run again.
set -euo pipefail
cd "$(dirname "$0")/.."

seed=${WORLD_SEED:-0}
[[ $seed =~ ^[0-9]+$ ]] || { echo "WORLD_SEED: found '$seed', expected a whole number" >&2; exit 2; }
python=${PYTHON:-python3}
source launch/environment.sh

run=runs/demo/world-$seed
report=runs/demo/report
# Of the five benchmarks (docs/data.md) two: look-alikes of known species, and true pairs of unknown ones.
benchmarks=(--benchmark toy-nabla --benchmark toy-inat-unseen)
config=(--config configs/omk_fill.py:toy "--config.train.workdir=$run/train")
world=data/toybirds
if [[ $seed != 0 ]]; then
    # The configuration's own folders hold world 0; another world goes beside them.
    world=data/toybirds-$seed
    config+=(
        "--config.data.root=$world/nabirds"
        "--config.data.prepared=prepared/toybirds-$seed"
        "--config.benchmarks.toy-nabla=$world/nabirds"
        "--config.benchmarks.toy-inat-seen=$world/inat/na"
        "--config.benchmarks.toy-inat-unseen=$world/inat/unseen"
        "--config.benchmarks.toy-inat-unseen-strict=$world/inat/unseen/strict_unseen.csv"
        "--config.benchmarks.toy-clips=$world/clips"
    )
fi

step() {
    echo "--- $1"
    shift
    scripts/keep_buffers.sh "$python" -m "$@"
}

step "a world of birds: $world" nabla_jax.toybirds --out "$world" --seed "$seed"
step "encode it" nabla_jax.prepare "${config[@]}"
step "train an adapter" nabla_jax.train "${config[@]}"
step "re-pose birds without an adapter" nabla_jax.generate "${config[@]}" "${benchmarks[@]}" --out "$run/untuned"
step "re-pose birds with the adapter of this run" nabla_jax.generate "${config[@]}" "${benchmarks[@]}" --adapter "$run/train" --out "$run/demo"
step "re-pose birds with the shipped adapter" nabla_jax.generate "${config[@]}" "${benchmarks[@]}" --adapter asset:toy-omk-fill --out "$run/toy-omk-fill"
step "what the autoencoder alone loses" nabla_jax.generate "${config[@]}" "${benchmarks[@]}" --reference autoencoder-ceiling --out "$run/autoencoder-ceiling"
step "evaluate" nabla_jax.evaluate "${config[@]}" "${benchmarks[@]}" --out "$report" --report --run "$run/train" \
    --pictures "untuned=$run/untuned" --pictures "demo=$run/demo" \
    --pictures "toy-omk-fill=$run/toy-omk-fill" --pictures "autoencoder-ceiling=$run/autoencoder-ceiling"
echo "--- open $report/index.html"
