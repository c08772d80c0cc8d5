"""The embedded bases: FLUX.1-Kontext from scratch, and FLUX.1-schnell, FLUX.1-Fill and FLUX.1-Redux from it.

    python -m nabla_jax.pretrain --config configs/toy_base.py
    python -m nabla_jax.pretrain --config configs/toy_base.py:schnell
    python -m nabla_jax.pretrain --config configs/toy_base.py:fill

Fresh individuals of the procedural world (seed 920,000: no benchmark's world) are rendered once, an autoencoder is
trained on them, and the transformer learns from their latents: captions, other views, blanked-out copies and birds in
a stranger's coat in the noisy stream. Resumable at any moment; every part that is finished is kept. Two CPU cores:
three minutes for the pictures, 30 for the autoencoder, and some hours for the transformer; the result is
`nabla_jax/assets/toy-flux-kontext`.

`:schnell` and `:fill` take autoencoder, tokenizers and first weights from it and train for half an hour each:
`toy-flux-schnell` sees pictures side by side and takes no guidance; `toy-flux-fill` repaints holes from captions, from
a reference beside them, or from a picture's own prompt tokens, which `toy-flux-redux` learns to make.
"""

from ml_collections import ConfigDict

from configs import common

PICTURES = {"world": "nabla_jax.toybirds", "seed": 920_000, "identities": 20_000, "size": 48}
TRANSFORMER = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty, ``schnell`` or ``fill``."""
    bases = {(): kontext, ("schnell",): schnell, ("fill",): fill}
    found = tuple(sorted(common.sizes(arg, ("schnell", "fill"))))
    return bases[found]()


def kontext() -> ConfigDict:
    """From nothing."""
    return ConfigDict(
        {
            "folder": "data/pretrain",
            "output": "nabla_jax/assets/toy-flux-kontext",
            "size": 48,
            "prompt": "A photo of a bird.",
            "text_length": 16,
            "pictures": PICTURES,
            "autoencoder": {"steps": 1300, "batch": 32, "learning_rate": 3e-3},
            "autoencoder_model": {
                "block_out_channels": (16, 32, 48),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "sample_size": 48,
                "scaling_factor": 1.0,
                "shift_factor": 0.0,
            },
            "transformer": {"steps": 30_000, "batch": 64, "learning_rate": 1.5e-3},
            "transformer_model": TRANSFORMER,
        }
    )


def schnell() -> ConfigDict:
    """Pictures side by side, no guidance."""
    config = kontext()
    config.output = "nabla_jax/assets/toy-flux-schnell"
    config.start = "asset:toy-flux-kontext"
    config.state = "schnell"
    config.pipeline = "FluxPipeline"
    config.transformer_model.guidance_embeds = False
    config.transformer = ConfigDict(
        {
            "steps": 400,
            "batch": 64,
            "learning_rate": 1e-3,
            "warmup": 50,
            "decay": 0.5,
            "ema": 0.995,
            "tasks": (0.1, 0.3, 0.05, 0.4, 0.15),
            "beside": True,
        }
    )
    return config


def fill() -> ConfigDict:
    """Masked pictures, and diptychs of a reference and a masked target."""
    return ConfigDict(
        {
            "folder": "data/pretrain",
            "output": "nabla_jax/assets/toy-flux-fill",
            "redux": "nabla_jax/assets/toy-flux-redux",
            "start": "asset:toy-flux-kontext",
            "vision": "asset:toy-siglip",
            "size": 48,
            "prompt": "A photo of a bird.",
            "text_length": 16,
            "clip_width": 176,
            "pictures": PICTURES,
            "training": {"steps": 2000, "batch": 32, "learning_rate": 1e-3},
            # 64 of noisy latents, 64 of the masked picture, 4 * 4 * 4 of the mask.
            "transformer_model": {**TRANSFORMER, "in_channels": 192, "out_channels": 64},
        }
    )
