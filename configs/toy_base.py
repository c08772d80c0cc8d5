"""The embedded FLUX.1-Kontext: autoencoder, text encoders and transformer from scratch.

    python -m nabla_jax.pretrain --config configs/toy_base.py

Fresh individuals of the procedural world (seed 920,000: no benchmark's world) are rendered once, an autoencoder is
trained on them, and the transformer learns from their latents: captions, other views, blanked-out copies and birds in
a stranger's coat in the noisy stream. Resumable at any moment; every part that is finished is kept. Two CPU cores:
three minutes for the pictures, 30 for the autoencoder, and some hours for the transformer; the result is
`nabla_jax/assets/toy-flux-kontext`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; it has one size."""
    del arg
    return ConfigDict(
        {
            "folder": "data/pretrain",
            "output": "nabla_jax/assets/toy-flux-kontext",
            "size": 48,
            "prompt": "A photo of a bird.",
            "text_length": 16,
            "pictures": {
                "world": "nabla_jax.toybirds",
                "seed": 920_000,
                "identities": 20_000,
                "size": 48,
            },
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
            "transformer_model": {
                "num_layers": 2,
                "num_single_layers": 4,
                "attention_head_dim": 32,
                "num_attention_heads": 4,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 64,
                "guidance_embeds": True,
                "axes_dims_rope": (8, 12, 12),
            },
        }
    )
