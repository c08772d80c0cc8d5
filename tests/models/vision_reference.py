"""Torch references for the vision networks: random weights that exercise every parameter, and torchvision's VGG16."""

import sys
from types import ModuleType
from typing import Any

import torch

# Output channels of torchvision's ``vgg16`` in order; 0 is max pooling.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Adds noise: freshly made models have zero biases, unit norms and scales, and tiny positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = parameter.ndim > 1 and not name.endswith(("position_embeddings", "position_embedding.weight"))
            scale = parameter[0].numel() ** -0.5 if wide else 0.3
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class Vgg16(torch.nn.Module):
    """torchvision's ``vgg16``: same numbering, names and shapes."""

    def __init__(self, pretrained: bool = False) -> None:
        super().__init__()
        assert not pretrained, "no downloads in tests"
        modules: list[torch.nn.Module] = []
        before = 3
        for channels in VGG16:
            if channels:
                modules += [torch.nn.Conv2d(before, channels, 3, padding=1), torch.nn.ReLU(inplace=True)]
                before = channels
            else:
                modules.append(torch.nn.MaxPool2d(2, 2))
        self.features = torch.nn.Sequential(*modules)
        hidden = (torch.nn.Linear(512 * 7 * 7, 4096), torch.nn.Linear(4096, 4096), torch.nn.Linear(4096, 1000))
        rest = (torch.nn.ReLU(), torch.nn.Dropout())
        self.classifier = torch.nn.Sequential(hidden[0], *rest, hidden[1], *rest, hidden[2])


def lpips_package() -> Any:
    """The lpips package, with a stand-in for torchvision, which it imports for its networks alone."""
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    vars(models)["vgg16"] = Vgg16
    vars(torchvision)["models"] = models
    standins = {"torchvision": torchvision, "torchvision.models": models}
    # Only these two names are put back: everything else that lpips imports must stay, as C extensions load once.
    before = {name: sys.modules.get(name) for name in standins}
    sys.modules.update(standins)
    try:
        import lpips
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return lpips
