"""The published evaluation's four numbers in PyTorch: transformers' networks and processors, and the lpips package.

What `nabla_jax.metrics` is compared with, in speed (`python -m benchmarks.metrics`) and in value (its `--values`, and
`tests/metrics/test_networks.py`). Written from the published formulas; nothing of it is used by the package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model, SiglipVisionModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.models.vision_reference import lpips_package

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Generated picture and target [H, W, 3] uint8, mask [H, W] bool, all of one size."""


def lpips_network(folder: Path) -> torch.nn.Module:
    """The package's LPIPS with the weights of a folder, whatever its widths."""
    tensors = load_file(folder / "model.safetensors")
    network = lpips_package().LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    for number in range(1, 6):
        part = getattr(network.net, f"slice{number}")
        for name, module in part.named_children():
            if isinstance(module, torch.nn.Conv2d):
                setattr(part, name, _convolution(tensors, f"features.{name}", padding=1))
    for level, head in enumerate(network.lins):
        head.model[1] = _convolution(tensors, f"lin{level}.model.1", padding=0)
    return network.eval()


def _convolution(tensors: dict[str, torch.Tensor], name: str, padding: int) -> torch.nn.Conv2d:
    weight, bias = tensors[f"{name}.weight"].float(), tensors.get(f"{name}.bias")
    made = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=padding, bias=bias is not None)
    made.weight = torch.nn.Parameter(weight)
    made.bias = None if bias is None else torch.nn.Parameter(bias.float())
    return made


class TorchMetrics:
    """The networks of three folders. `__call__` gives lpips, rmse, dinov2 and siglip of a batch of pairs."""

    def __init__(self, dinov2: Path, siglip: Path, lpips: Path) -> None:
        read: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
        self.dinov2 = Dinov2Model.from_pretrained(dinov2, **read).eval()
        self.siglip = SiglipVisionModel.from_pretrained(siglip, **read).eval()
        self.lpips = lpips_network(lpips)
        self.of_dinov2 = BitImageProcessorPil.from_pretrained(dinov2, local_files_only=True)
        self.of_siglip = SiglipImageProcessorPil.from_pretrained(siglip, local_files_only=True)

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """The four numbers, [pairs] each. Pictures of one size go through LPIPS together."""
        sides = [[np.where(pair[2][..., None], pair[k], np.uint8(0)) for pair in pairs] for k in range(2)]
        both = sides[0] + sides[1]
        return {
            "dinov2": self._cosines(self.of_dinov2, lambda x: self.dinov2(x).last_hidden_state[:, 0], both),
            "siglip": self._cosines(self.of_siglip, lambda x: self.siglip(x).pooler_output, both),
            "lpips": self._distances(*sides),
            "rmse": np.array([_rmse(*pair) for pair in pairs]),
        }

    @staticmethod
    def _cosines(processor: Any, features: Any, pictures: Sequence[np.ndarray]) -> np.ndarray:
        vectors = features(processor(list(pictures), return_tensors="pt")["pixel_values"])
        a, b = vectors.chunk(2)
        return torch.nn.functional.cosine_similarity(a, b).numpy()

    def _distances(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(a):
            by_size.setdefault(picture.shape, []).append(i)
        found = np.zeros(len(a))
        for places in by_size.values():
            x, y = (torch.from_numpy(np.stack([side[i] for i in places])).permute(0, 3, 1, 2) for side in (a, b))
            found[places] = self.lpips(x / 127.5 - 1, y / 127.5 - 1).reshape(-1).numpy()
        return found


def _rmse(generated: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    difference = torch.from_numpy(generated[mask]).float() - torch.from_numpy(target[mask]).float()
    return float(difference.square().mean().sqrt())
