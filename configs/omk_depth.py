"""Om-K depth: OminiControl tokens on FLUX.1-Kontext, from a subject and the depth map of the pose.

    python -m nabla_jax.extract  --config configs/omk_depth.py
    python -m nabla_jax.prepare  --config configs/omk_depth.py
    python -m nabla_jax.train    --config configs/omk_depth.py
    python -m nabla_jax.generate --config configs/omk_depth.py --adapter runs/omk_depth --out pictures/omk_depth
    python -m nabla_jax.evaluate --config configs/omk_depth.py \
        --pictures omk_depth=pictures/omk_depth --out reports/omk_depth --report

The depth maps are Depth Anything V2's (docs/extraction.md); hardware and time are those of configs/omk_fill.py.
The published training knew one caption alone, and so does this one.

`configs/omk_depth.py:toy` is the same run on the embedded world, which has depth maps of its own.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    return common.with_control("depth", arg)
