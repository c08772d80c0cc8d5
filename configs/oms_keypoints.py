"""Om-S keypoints: OminiControl tokens on FLUX.1-schnell, from a subject and the skeleton of the pose.

    python -m nabla_jax.extract  --config configs/oms_keypoints.py
    python -m nabla_jax.prepare  --config configs/oms_keypoints.py
    python -m nabla_jax.train    --config configs/oms_keypoints.py
    python -m nabla_jax.generate --config configs/oms_keypoints.py --adapter runs/oms_keypoints \
        --out pictures/oms_keypoints
    python -m nabla_jax.evaluate --config configs/oms_keypoints.py \
        --pictures oms_keypoints=pictures/oms_keypoints --out reports/oms_keypoints --report

The base knows no second picture: the subject's tokens lie to the left of the picture being made. It draws in four
steps and takes no guidance; keypoints, hardware and training are those of configs/omk_keypoints.py.

`configs/oms_keypoints.py:toy` is the same run on the embedded world and `asset:toy-flux-schnell`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    return common.schnell("keypoints", arg)
