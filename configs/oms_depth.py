"""Om-S depth: OminiControl tokens on FLUX.1-schnell, from a subject and the depth map of the pose.

    python -m nabla_jax.extract  --config configs/oms_depth.py
    python -m nabla_jax.prepare  --config configs/oms_depth.py
    python -m nabla_jax.train    --config configs/oms_depth.py
    python -m nabla_jax.generate --config configs/oms_depth.py --adapter runs/oms_depth --out pictures/oms_depth
    python -m nabla_jax.evaluate --config configs/oms_depth.py \
        --pictures oms_depth=pictures/oms_depth --out reports/oms_depth --report

The base knows no second picture: the subject's tokens lie to the left of the picture being made. It draws in four
steps and takes no guidance; hardware and training are those of configs/omk_depth.py.
The depth maps are Depth Anything V2's (docs/extraction.md).

`configs/oms_depth.py:toy` is the same run on the embedded world and `asset:toy-flux-schnell`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    return common.schnell("depth", arg)
