"""The shallow embedding (section 3.3): from an image to its latent mixture weights."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..tracing import at_least_float32


class ShallowEmbedding(nn.Module):
    """Image to latent mixture weights: stride-2 3x3 conv-norm-ReLU layers, global average pool, linear, softmax."""

    def __init__(
        self,
        in_chans: int,
        channels: Sequence[int],
        num_latent_experts: int,
        norm_layer: Any = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        layers = []
        for width_in, width in zip([in_chans, *channels[:-1]], channels, strict=True):
            conv = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False, **dd)
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            layer = OrderedDict(conv=conv, norm=norm_layer(width, **dd), act=nn.ReLU(inplace=True))
            layers.append(nn.Sequential(layer))
        self.layers = nn.Sequential(*layers)
        self.mixture = nn.Linear(channels[-1], num_latent_experts, **dd)
        nn.init.zeros_(self.mixture.weight)
        nn.init.zeros_(self.mixture.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to latent mixture weights (B, K), positive and summing to one."""
        return self.mix(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        """Map images to the features that the mixture is computed from, (B, channels[-1])."""
        return self.layers(x).mean(dim=(2, 3))

    def mix(self, features: Tensor) -> Tensor:
        """Map features to latent mixture weights (B, K)."""
        x = self.mixture(features)
        return x.softmax(dim=1, dtype=at_least_float32(x))
