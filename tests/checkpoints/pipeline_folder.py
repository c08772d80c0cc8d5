"""A tiny complete pipeline folder: text parts by the package, transformer and autoencoder by diffusers."""

from pathlib import Path

import diffusers
import jax
import torch

from nabla_jax.checkpoints.pipeline import write_index
from nabla_jax.pretrain.text import write_text_encoders, write_tokenizers

WORDS = ("a", "photo", "of", "bird", "red", "white", "cap", "belly", "with", "on", "branch", "wing-bars")


def write_pipeline(folder: Path) -> None:
    write_index(folder)
    write_tokenizers(folder, WORDS)
    write_text_encoders(folder, jax.random.key(0))
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    ).save_pretrained(folder / "transformer")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
