"""Ins-A fill: Insert Anything on FLUX.1-Fill, a diptych of subject and target whose bird is repainted.

    python -m nabla_jax.train    --config configs/insert_fill.py
    python -m nabla_jax.generate --config configs/insert_fill.py --adapter runs/insert_fill --out pictures/insert_fill
    python -m nabla_jax.evaluate --config configs/insert_fill.py \
        --pictures insert_fill=pictures/insert_fill --out reports/insert_fill --report

There is nothing to prepare: pictures are encoded when they are drawn, with another mask and another border round the
subject every time. FLUX.1-Redux's tokens of the subject take the text's place. Training sees whole targets; sampling
repaints a window round the bird and pastes it back. The adapter starts from Insert Anything's published one;
`lora.start=` starts afresh.

Hardware: 12 billion frozen parameters (24 GB in bfloat16), 9,433 tokens, and 927 million parameters of the adapter with
the optimizer's state (22 GB): one accelerator with 80 GB, or several. Time and result are those of the paper until they
are measured here: 10,000 steps of 4 pairs.

`configs/insert_fill.py:toy` is the same run on the embedded world and checkpoints.
"""

from ml_collections import ConfigDict

from configs import common

OBTAIN = (
    "accept the licences at https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev and "
    "https://huggingface.co/black-forest-labs/FLUX.1-Redux-dev, then run `hf auth login`, "
    "`hf download black-forest-labs/FLUX.1-Fill-dev --exclude flux1-fill-dev.safetensors --local-dir "
    "checkpoints/FLUX.1-Fill-dev` (34 GB), `hf download black-forest-labs/FLUX.1-Redux-dev --exclude "
    "flux1-redux-dev.safetensors --local-dir checkpoints/FLUX.1-Redux-dev` (1 GB) and `hf download "
    "WensongSong/Insert-Anything --local-dir checkpoints/Insert-Anything` (2 to 4 GB)"
)


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    config = common.omini()
    config.base = ConfigDict(
        {"path": "checkpoints/FLUX.1-Fill-dev", "redux": "checkpoints/FLUX.1-Redux-dev", "obtain": OBTAIN}
    )
    config.lora.rank = 256
    config.lora.alpha = 256.0
    config.lora.start = "checkpoints/Insert-Anything/20250321_steps5000_pytorch_lora_weights.safetensors"
    config.train.batch = 4
    config.sample.steps = 50
    config.sample.feather = 16
    # A diptych has twice the tokens of a picture.
    config.sample.batch = 2
    if "toy" in common.sizes(arg, ("toy",)):
        config = common.toy(config)
        config.base = ConfigDict({"path": "asset:toy-flux-fill", "redux": "asset:toy-flux-redux", "obtain": ""})
        config.lora.start = ""
        config.sample.feather = 2
    config.data.mode = "on_the_fly"
    config.data.prepared = ""
    config.conditioning.update(
        # The subject's picture takes the text's place, after as many empty tokens.
        prompt="",
        method="insert",
        mask_policies=("silhouette", "dilated", "box", "bezier"),
        expansion=(1.1, 1.4),
        window=0.0,
    )
    config.sample.update(mask_policy="silhouette", expansion=1.3, window=2.4)
    config.lora.name = "insert_fill"
    config.train.workdir = config.train.workdir.replace("omk", "insert")
    return config
