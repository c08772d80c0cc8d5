"""The embedded networks that judge pictures: DINOv2, SigLIP and LPIPS in small, from scratch.

    python -m nabla_jax.pretrain --config configs/toy_metrics.py

Families of sibling species of the procedural world (seed 940,000: no benchmark's world) are rendered once; DINOv2 and
SigLIP learn to tell individuals apart by their birds on black ground, and LPIPS gets features by the same task and
weights per channel from pairs of distortions whose strength is known. Resumable at any moment; every part that is
finished is kept. Two CPU cores: three minutes for the pictures, about 15 for each network. The results are
`nabla_jax/assets/toy-dinov2`, `toy-siglip` and `toy-lpips`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; it has one size."""
    del arg
    return ConfigDict(
        {
            "folder": "data/metrics",
            "families": {
                "world": "nabla_jax.toybirds",
                "seed": 940_000,
                "families": 4000,
                "species": 6,
                "views": 2,
                "size": 48,
            },
            "dinov2": {
                "output": "nabla_jax/assets/toy-dinov2",
                "model": {
                    "hidden_size": 96,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 3,
                    "image_size": 64,
                    "patch_size": 8,
                },
                "training": {"steps": 1200, "families": 12, "learning_rate": 3e-3, "objective": "softmax"},
            },
            "siglip": {
                "output": "nabla_jax/assets/toy-siglip",
                "model": {
                    "hidden_size": 96,
                    "intermediate_size": 384,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 3,
                    "image_size": 64,
                    "patch_size": 8,
                },
                "training": {"steps": 1200, "families": 12, "learning_rate": 3e-3, "objective": "sigmoid"},
            },
            "lpips": {
                "output": "nabla_jax/assets/toy-lpips",
                "model": {"channels": (16, 32, 64, 64, 64)},
                "training": {
                    "steps": 300,
                    "families": 6,
                    "learning_rate": 1e-3,
                    "objective": "softmax",
                    "masked": 0.7,
                },
            },
        }
    )
