"""Om-K keypoints: OminiControl tokens on FLUX.1-Kontext, from a subject and the skeleton of the pose.

    python -m nabla_jax.prepare  --config configs/omk_keypoints.py
    python -m nabla_jax.train    --config configs/omk_keypoints.py
    python -m nabla_jax.generate --config configs/omk_keypoints.py --adapter runs/omk_keypoints \
        --out pictures/omk_keypoints
    python -m nabla_jax.evaluate --config configs/omk_keypoints.py \
        --pictures omk_keypoints=pictures/omk_keypoints --out reports/omk_keypoints --report

Only NABirds has keypoints, so only its benchmark can be made. The skeleton is the dense one in training, sampling and
evaluation; hardware and time are those of configs/omk_fill.py.

`configs/omk_keypoints.py:toy` is the same run on the embedded world.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    return common.keypoints_only(common.with_control("keypoints", arg))
