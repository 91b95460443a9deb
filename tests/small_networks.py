"""Networks with every structure of the large ones, small enough to try everything on a CPU."""

from typing import Any

import timm
import torch
from timm.layers import LayerNorm, LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

import deepmoe_plugin  # noqa: F401 (registers the models)

_CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 16))
# Structure -> registered model it is made of, and the arguments that shrink it.
SMALL = {
    'basic': ('wide_deepmoe_resnet18', dict(layers=(1, 1, 1, 1), widen=0.25)),
    'bottleneck_a': ('wide_deepmoe_resnet50', dict(layers=(1, 1, 1, 1), widen=0.25)),
    'bottleneck_b': ('wide_deepmoe_resnet50b', dict(layers=(1, 1, 1, 1), widen=0.25)),
    'cifar': ('wide_deepmoe_resnet20_cifar', dict(layers=(1, 1, 2))),
    'vgg': ('wide_deepmoe_vgg11_bn', dict(layout=(8, 'M', 12, 'M', 8, 10, 'M'), mlp_ratio=1 / 64)),
    'convnext': ('wide_deepmoe_convnext_tiny', dict(_CONVNEXT, widen=0.75)),
    'convnext_conv': ('wide_deepmoe_convnext_tiny', dict(_CONVNEXT, widen=0.75, conv_mlp=True)),
    'convnextv2': ('wide_deepmoe_convnextv2_tiny', dict(_CONVNEXT, widen=0.75)),
    'vgg_cifar': ('wide_deepmoe_vgg16_cifar', dict(layout=(8, 'M', 12, 12, 'M'))),
    'grouped': ('wide_deepmoe_resnet50', dict(layers=(1, 1, 1, 1), widen=0.25, experts_per_gate=8)),
    'convnext_grouped': ('wide_deepmoe_convnextv2_tiny', dict(_CONVNEXT, widen=0.75, experts_per_gate=4)),
}
RESNETS = ['basic', 'bottleneck_a', 'bottleneck_b', 'cifar']


def small(structure: str, **kwargs: Any) -> nn.Module:
    """Create a small network of the structure; `gated=False` gives its dense twin."""
    name, shrunk = SMALL[structure]
    if not kwargs.get('gated', True):
        shrunk = {key: value for key, value in shrunk.items() if key != 'experts_per_gate'}
    return timm.create_model(name, **{'num_classes': 10, **shrunk, **kwargs})


def images(batch: int = 2, size: int = 32, channels: int = 3, seed: int = 0, **kwargs: Any) -> Tensor:
    """Draw a batch of images."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Make every weight and norm statistic count: by default some start at zero, and all gates at one."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in sorted(model.named_modules(), key=lambda item: 'gating' in item[0]):  # the base network first
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, LayerNorm | LayerNorm2d | GlobalResponseNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
        if isinstance(module, ConvNeXtBlock):
            for layer in (module.conv_dw, module.mlp.fc1, module.mlp.fc2):
                layer.weight.normal_(0, layer.weight[0].numel() ** -0.5, generator=generator)
                layer.bias.normal_(0, 0.3, generator=generator)
            if module.gamma is not None:
                module.gamma.uniform_(0.5, 1.5, generator=generator)
    gates = getattr(getattr(model, 'gating', None), 'gates', None)
    if isinstance(gates, nn.Module):
        gates.weight.normal_(0.3, 1, generator=generator)
        model.gating.embedding.mixture.weight.normal_(0, 1, generator=generator)
    return model


class FixedGates(nn.Module):
    """Stands in for a gating network: the same gates whatever the image."""

    def __init__(self, gates: list[Tensor]) -> None:
        super().__init__()
        self.gates = gates

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.gates


def widths(model: nn.Module) -> list[int]:
    """Experts of each gated layer."""
    return list(model.gating.gates.widths)
