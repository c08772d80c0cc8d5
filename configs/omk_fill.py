"""Om-K fill, the paper's run: OminiControl tokens on FLUX.1-Kontext, from a subject and a silhouette.

    python -m nabla_jax.prepare  --config configs/omk_fill.py
    python -m nabla_jax.train    --config configs/omk_fill.py
    python -m nabla_jax.generate --config configs/omk_fill.py --adapter runs/omk_fill --out pictures/omk_fill
    python -m nabla_jax.evaluate --config configs/omk_fill.py \
        --pictures omk_fill=pictures/omk_fill --out reports/omk_fill --report

Hardware: 12 billion frozen parameters (24 GB in bfloat16) and four streams of up to 4096 tokens; one
accelerator with 80 GB, or several. Time and result are those of the paper until they are measured here:
10,000 steps of 5 pairs.

`configs/omk_fill.py:toy` is the same run on the embedded world and checkpoint: 48 pixels, 300 steps
of 16 pairs in float32 and Prodigy's d0 at 1e-3 (300 steps are too few to grow it from 1e-6). Minutes on two
cores.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    config = common.omini()
    if "toy" in common.sizes(arg, ("toy",)):
        config = common.toy(config)
    return config
