"""What the configurations share."""

from ml_collections import ConfigDict

from nabla_jax.errors import UserError

PREVIEW = "make demo  (or python -m nabla_jax.train --config configs/omk_fill.py:toy after make demo made its data)"

KONTEXT = (
    "accept the licence at https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev, then run `hf auth login` "
    "and `hf download black-forest-labs/FLUX.1-Kontext-dev --exclude flux1-kontext-dev.safetensors --local-dir "
    "checkpoints/FLUX.1-Kontext-dev` (34 GB)"
)

SCHNELL = (
    "run `hf auth login` and `hf download black-forest-labs/FLUX.1-schnell --exclude flux1-schnell.safetensors "
    "--local-dir checkpoints/FLUX.1-schnell` (34 GB, Apache-2.0)"
)

NABIRDS = (
    "request NABirds at https://dl.allaboutbirds.org/nabirds, unpack it so that data/nabirds/images.txt "
    "exists, and put a mask of every bird at data/nabirds/masks/CLASS/IMAGE.png, or let python -m nabla_jax.extract "
    "make them"
)

METRICS = (
    "`hf download facebook/dinov2-base --local-dir checkpoints/dinov2-base`, the same for "
    "google/siglip-base-patch16-224 and google/siglip2-base-patch16-224 (2 GB), and checkpoints/lpips-vgg16 as "
    "docs/networks.md tells"
)


def sizes(arg: str, known: tuple[str, ...]) -> set[str]:
    """The sizes named in a configuration's argument, a comma-separated list."""
    found = {item for item in arg.split(",") if item}
    unknown = found - set(known)
    if unknown:
        raise UserError(f"--config: unknown size {', '.join(sorted(unknown))}, known are {', '.join(known)}")
    return found


def omini() -> ConfigDict:
    """Tokens beside tokens on FLUX.1-Kontext: the settings of the paper that its controls share."""
    return ConfigDict(
        {
            "base": {"path": "checkpoints/FLUX.1-Kontext-dev", "obtain": KONTEXT},
            "data": {
                "root": "data/nabirds",
                "prepared": "prepared/nabirds-kontext-1024",
                "split": "train",
                "obtain": NABIRDS,
            },
            "benchmarks": {
                "nabla": "data/nabirds",
                "inat-seen": "data/inat/na",
                "inat-unseen": "data/inat/unseen",
                "inat-unseen-strict": "data/inat/unseen/strict_unseen.csv",
                "clips": "data/clips",
            },
            "conditioning": {
                "size": 1024,
                "control": "fill",
                "skeleton": "dense",
                "dot": 15,
                "line": 10,
                "caption": "fixed",
                "prompt": "A photo of a bird.",
                "text_length": 512,
                "independent_conditions": False,
            },
            "lora": {"rank": 16, "alpha": 16.0, "init": "gaussian", "name": "omk_fill"},
            "optim": {
                "name": "prodigy",
                "lr": 1.0,
                "d0": 1e-6,
                "weight_decay": 0.01,
                "betas": (0.9, 0.999),
                "clip": 1.0,
            },
            "train": {
                "workdir": "runs/omk_fill",
                "steps": 10_000,
                "batch": 5,
                "seed": 42,
                "log_every": 10,
                "save_every": 500,
                "sample_every": 1000,
                "dtype": "bfloat16",
                "remat": "full",
                "guidance": 1.0,
                "sampler": "all_pairs",
                "time_mean": 0.0,
                "foreground_weight": 1.0,
                "ema": 0.0,
            },
            "sample": {"steps": 28, "guidance": 2.5, "seed": 42, "batch": 4},
            "mesh": {"data": 0, "fsdp": 1, "tensor": 1, "sequence": 1},
            "metrics": {
                "dinov2": "checkpoints/dinov2-base",
                "siglip": "checkpoints/siglip-base-patch16-224",
                "patches": "checkpoints/siglip2-base-patch16-224",
                "lpips": "checkpoints/lpips-vgg16",
                # Nobody publishes a head: with one of configs/keypoints.py there are keypoint metrics, too.
                "keypoints": "",
                "batch": 32,
                "box": 224,
                "obtain": METRICS,
            },
            "extract": {"keypoints": "checkpoints/keypoints-dinov2-base", "dinov2": "checkpoints/dinov2-base"},
            "preview": PREVIEW,
        }
    )


def with_control(control: str, arg: str) -> ConfigDict:
    """The run of ``omini`` with another control; ``arg`` is that of a configuration's ``get_config``."""
    config = omini()
    if "toy" in sizes(arg, ("toy",)):
        config = toy(config)
    config.conditioning.control = control
    config.lora.name = f"omk_{control}"
    config.data.prepared = f"{config.data.prepared}-{control}"
    config.train.workdir = config.train.workdir.replace("fill", control)
    return config


def schnell(control: str, arg: str) -> ConfigDict:
    """The run of ``with_control`` on FLUX.1-schnell, which draws in four steps and takes no guidance."""
    config = with_control(control, arg)
    small = "toy" in sizes(arg, ("toy",))
    config.base.path = "asset:toy-flux-schnell" if small else "checkpoints/FLUX.1-schnell"
    config.base.obtain = "" if small else SCHNELL
    config.data.prepared = config.data.prepared.replace("kontext", "schnell")
    config.lora.name = f"oms_{control}"
    config.train.workdir = config.train.workdir.replace("omk", "oms")
    config.sample.steps = 4
    # Unused by this base, and written into the manifests of its pictures: what diffusers' schnell example says.
    config.sample.guidance = 0.0
    return config


def toy(config: ConfigDict) -> ConfigDict:
    """The same run at the size of the embedded world: other paths and numbers, nothing else."""
    config.base.path = "asset:toy-flux-kontext"
    config.base.obtain = ""
    config.data.root = "data/toybirds/nabirds"
    config.data.prepared = "prepared/toybirds-kontext-48"
    config.data.obtain = "python -m nabla_jax.toybirds --out data/toybirds"
    config.benchmarks = ConfigDict(
        {f"toy-{name}": root.replace("data/", "data/toybirds/") for name, root in config.benchmarks.items()}
    )
    config.conditioning.size = 48
    # Pixels of the picture: 15 and 10 are made for pictures of a thousand.
    config.conditioning.dot = 3
    config.conditioning.line = 1
    config.conditioning.text_length = 16
    config.lora.rank = 16
    config.lora.alpha = 16.0
    # 300 steps are too few for Prodigy to grow its distance estimate from 1e-6.
    config.optim.d0 = 1e-3
    config.train.workdir = "runs/toy_omk_fill"
    config.train.steps = 300
    config.train.batch = 16
    config.train.log_every = 1
    config.train.save_every = 100
    config.train.sample_every = 100
    config.train.dtype = "float32"
    config.train.remat = "none"
    # 36 tokens of 8 pixels show the bird through all but the strongest noise: only there is the subject of use.
    config.train.time_mean = 1.0
    config.train.foreground_weight = 3.0
    config.train.ema = 0.99
    config.sample.steps = 12
    config.sample.batch = 32
    config.metrics.dinov2 = "asset:toy-dinov2"
    config.metrics.siglip = config.metrics.patches = "asset:toy-siglip"
    config.metrics.lpips = "asset:toy-lpips"
    config.metrics.keypoints = config.extract.keypoints = "asset:toy-keypoints"
    config.extract.dinov2 = "asset:toy-dinov2"
    config.metrics.box = 32
    config.preview = "make demo"
    return config
