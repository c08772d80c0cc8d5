"""A keypoint head on DINOv2-base, from NABirds' eleven parts: keypoints for photos that nobody annotated.

    python -m nabla_jax.keypoints --config configs/keypoints.py

Crops of 448 pixels through the frozen DINOv2, 20,000 steps of 64. Hardware and result are an estimate until they are
measured: an accelerator with 16 GB and some hours, most of them spent on decoding photos.

`configs/keypoints.py:toy` trains the head of the embedded world, `nabla_jax/assets/toy-keypoints`, on
`data/keypoints-world`, which `python -m nabla_jax.toybirds --out data/keypoints-world --seed 950 --images 12000
--orders 40` writes (two minutes on two cores): no benchmark's world. Ten minutes of CPU time.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; ``arg`` is empty or ``toy``."""
    config = ConfigDict(
        {
            "output": "checkpoints/keypoints-dinov2-base",
            "folder": "runs/keypoints",
            "root": "data/nabirds",
            "dinov2": "checkpoints/dinov2-base",
            "obtain": f"{common.NABIRDS}; `hf download facebook/dinov2-base --local-dir checkpoints/dinov2-base`",
            "head": {
                "image_size": 448,
                "margin": 1.25,
                "hidden_size": 256,
                "fine_size": 64,
                "num_blocks": 3,
                "upsample": 2,
            },
            "training": {
                "steps": 20_000,
                "batch": 64,
                "learning_rate": 1e-3,
                "every": 500,
                "threads": 16,
            },
        }
    )
    if "toy" in common.sizes(arg, ("toy",)):
        config.output = "nabla_jax/assets/toy-keypoints"
        config.folder = "runs/toy_keypoints"
        config.root = "data/keypoints-world/nabirds"
        config.dinov2 = "asset:toy-dinov2"
        config.obtain = "python -m nabla_jax.toybirds --out data/keypoints-world --seed 950 --images 12000 --orders 40"
        config.head.image_size = 64
        config.head.hidden_size = 96
        config.head.fine_size = 48
        config.head.num_blocks = 3
        config.head.upsample = 2
        config.training.steps = 800
        config.training.learning_rate = 1.5e-3
        config.training.every = 100
        config.training.threads = 2
    return config
