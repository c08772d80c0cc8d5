"""Om-S fill: OminiControl tokens on FLUX.1-schnell, from a subject and a silhouette.

    python -m nabla_jax.prepare  --config configs/oms_fill.py
    python -m nabla_jax.train    --config configs/oms_fill.py
    python -m nabla_jax.generate --config configs/oms_fill.py --adapter runs/oms_fill --out pictures/oms_fill
    python -m nabla_jax.evaluate --config configs/oms_fill.py \
        --pictures oms_fill=pictures/oms_fill --out reports/oms_fill --report

The base knows no second picture: the subject's tokens lie to the left of the picture being made. It draws in four
steps and takes no guidance; hardware and training are those of configs/omk_fill.py.

`configs/oms_fill.py:toy` is the same run on the embedded world and `asset:toy-flux-schnell`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    return common.schnell("fill", arg)
