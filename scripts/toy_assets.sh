#!/usr/bin/env bash
# Makes every shipped checkpoint anew, from nothing: make toy-assets. A day on two cores, most of it the first base.
#
# The shipped folders are moved to data/shipped-assets first, or their finished parts would be kept; `git checkout
# nabla_jax/assets` brings them back, too. Every command continues what an interrupted run left, so that the whole
# script can be stopped at any moment and run again.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
source launch/environment.sh

assets=nabla_jax/assets
shipped=data/shipped-assets
# As in toy-omk-fill's README.
adapter=(
    --config configs/omk_fill.py:toy --config.data.root=data/adapter-world/nabirds --config.data.split=all
    --config.data.prepared=prepared/adapter-world
)
training=(
    --config.train.batch=32 --config.train.ema=0.998 --config.train.steps=2002 --config.lora.name=toy-omk-fill
    --config.train.workdir=runs/adapter
)

step() {
    echo "--- $1"
    shift
    scripts/keep_buffers.sh "$python" -m "$@"
}

mkdir -p "$shipped"
for folder in "$assets"/toy-*/; do
    name=$(basename "$folder")
    # What is moved already is being made.
    [[ -e $shipped/$name ]] || mv "$assets/$name" "$shipped/$name"
done

step "toy-flux-kontext" nabla_jax.pretrain --config configs/toy_base.py
step "toy-dinov2, toy-siglip, toy-lpips" nabla_jax.pretrain --config configs/toy_metrics.py
step "toy-flux-schnell" nabla_jax.pretrain --config configs/toy_base.py:schnell
step "toy-flux-fill, toy-flux-redux" nabla_jax.pretrain --config configs/toy_base.py:fill
step "a world for keypoints" nabla_jax.toybirds --out data/keypoints-world --seed 950 --images 12000 --orders 40
step "toy-keypoints" nabla_jax.keypoints --config configs/keypoints.py:toy
step "a world for the adapter" nabla_jax.toybirds --out data/adapter-world --seed 500 --images 10000 --orders 40
step "encode it" nabla_jax.prepare "${adapter[@]}"
step "toy-omk-fill" nabla_jax.train "${adapter[@]}" "${training[@]}"
mkdir -p "$assets/toy-omk-fill"
cp runs/adapter/adapters/step_2002/toy-omk-fill.safetensors "$shipped/toy-omk-fill/README.md" "$assets/toy-omk-fill/"
echo "--- done: the README of toy-omk-fill is the shipped one, its last line is the shipped adapter's loss"
