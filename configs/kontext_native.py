"""Native Kontext: subject and control as FLUX.1-Kontext's own references, in the noise's stream. Om-K's fair rival.

    python -m nabla_jax.generate --config configs/kontext_native.py --adapter none --out pictures/kontext_native
    python -m nabla_jax.evaluate --config configs/kontext_native.py \
        --pictures kontext_native=pictures/kontext_native --out reports/kontext_native --report

Subject is picture 1, the control picture 2. Nothing need be trained. A usual LoRA, on text and noise too, is trained on
what configs/omk_fill.py prepared:

    python -m nabla_jax.prepare  --config configs/kontext_native.py
    python -m nabla_jax.train    --config configs/kontext_native.py

All settings are those of configs/omk_fill.py, hardware too. `configs/kontext_native.py:toy` is the same run on the
embedded world and `asset:toy-flux-kontext`, whose pre-training had pictures 1 and 2 in these places.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    config = common.omini()
    if "toy" in common.sizes(arg, ("toy",)):
        config = common.toy(config)
    config.conditioning.method = "native"
    config.lora.name = "kontext_native"
    config.train.workdir = config.train.workdir.replace("omk_fill", "kontext_native")
    return config
