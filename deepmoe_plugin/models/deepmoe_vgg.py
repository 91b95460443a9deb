"""Gated VGG (section 3.3: a gate after every convolution) on timm's VGG."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from timm.models.vgg import VGG, cfgs
from torch import Tensor, nn

from ..activation import GatedActivation, given
from ..checkpoints import build_with_checks
from ..experts import per_layer, vgg_experts
from ..gating import GatingConfig
from ..network import DeepMoE
from .registration import SMALL_IMAGE_EMBEDDING, Base, register_family

Layout = Sequence[int | str]


class WideVGG(VGG):
    """timm's VGG with its convolutions widened: the dense twin of `DeepMoEVGG`, key for key.

    Args:
        layout: widths of the convolutions, with 'M' for a max-pooling layer, as in `timm.models.vgg.cfgs`.
        widen: factor on the width of each convolution, or one factor for each.
        small_images: CIFAR layout: convolutions without bias, one linear layer as the head.
        **kwargs: timm's VGG arguments.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        layout: Layout,
        widen: float | Sequence[float] = 1,
        small_images: bool = False,
        norm_layer: Any = nn.BatchNorm2d,
        **kwargs: Any,
    ) -> None:
        if kwargs.get('output_stride', 32) != 32:
            raise ValueError(f'output_stride must be 32 for a VGG, got {kwargs["output_stride"]}.')
        if small_images and ('mlp_ratio' in kwargs or 'conv_layer' in kwargs):
            raise ValueError('mlp_ratio and conv_layer have no effect with small_images=True: leave them out.')
        if not layout or not all(step == 'M' or (isinstance(step, int) and step > 0) for step in layout):
            raise ValueError(f"layout must be a list of widths and 'M' (max pooling), got {layout!r}.")
        widths = [step for step in layout if isinstance(step, int)]
        factors = iter(per_layer(widen, len(widths)))
        layout = [max(1, round(step * next(factors))) if isinstance(step, int) else step for step in layout]
        if small_images:
            # timm builds its large head in any case: make it tiny, it is replaced below.
            kwargs.update(conv_layer=partial(nn.Conv2d, bias=False), mlp_ratio=1 / 4096)
        super().__init__(list(layout), norm_layer=norm_layer, **kwargs)
        if small_images:
            dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
            pool, drop = kwargs.get('global_pool', 'avg'), kwargs.get('drop_rate', 0.0)
            self.pre_logits = nn.Identity()
            self.head = ClassifierHead(self.num_features, self.num_classes, pool_type=pool, drop_rate=drop, **dd)
            self.head_hidden_size = self.head.num_features
        self.expert_layers = vgg_experts(self)


class GatedFeatures(nn.Sequential):
    """The convolution stack of a VGG, its activations gated."""

    def forward(self, x: Tensor, gates: list[Tensor] | None = None) -> Tensor:
        """Map images (B, C, H, W) and the gates of all layers, each (B, C_l), to features."""
        gates = given(gates)
        layer = 0  # torch.fx can take an item of the gates, not iterate over them
        for module in self:
            if isinstance(module, GatedActivation):
                x = module(x, gates[layer])
                layer += 1
            else:
                x = module(x)
        return x


class DeepMoEVGG(DeepMoE, WideVGG):
    """VGG whose convolutions are gated for each image.

    Args:
        layout: widths of the convolutions, with 'M' for a max-pooling layer, as in `timm.models.vgg.cfgs`.
        **kwargs: the arguments of `GatingConfig`, `WideVGG` and timm's VGG.

    Raises:
        ValueError: an argument is out of range or contradicts another; the message names it.
    """

    def __init__(self, layout: Layout, **kwargs: Any) -> None:
        if kwargs.get('small_images'):
            kwargs.setdefault('embedding_channels', SMALL_IMAGE_EMBEDDING)
        config = GatingConfig.pop_from(kwargs)
        super().__init__(layout, **kwargs)
        self.features = GatedFeatures(*self.features)
        self.add_gating(config, self.feature_info[-1]['reduction'], kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the unpooled features (B, C, H/32, W/32)."""
        return self.features(x, self.gating(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features before each pooling layer and after the last; see timm's VGG for the arguments."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, last = feature_take_indices(len(self.feature_ends), indices)
        gates = iter(self.gating(x))
        taken = {self.feature_ends[i] for i in take_indices}
        layers = self.features[: self.feature_ends[last] + 1] if stop_early else self.features
        intermediates = []
        for i, layer in enumerate(layers):
            x = layer(x, next(gates)) if isinstance(layer, GatedActivation) else layer(x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)


def _create_vgg(variant: str, pretrained: bool = False, gated: bool = True, **kwargs: Any) -> nn.Module:
    """Build a network of this family; `gated=False` gives its dense twin with the same widths."""
    return build_with_checks(
        DeepMoEVGG if gated else WideVGG,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4, 5), feature_cls='getter', flatten_sequential=True),
        **kwargs,
    )


register_family(
    __name__,
    _create_vgg,
    first_conv='features.0',
    classifier='head.fc',
    bases=(
        Base('vgg11_bn', 'VGG-11 with batch norm', dict(layout=cfgs['vgg11'])),
        Base('vgg13_bn', 'VGG-13 with batch norm', dict(layout=cfgs['vgg13'])),
        Base('vgg16_bn', 'VGG-16 with batch norm', dict(layout=cfgs['vgg16'])),
        Base('vgg19_bn', 'VGG-19 with batch norm', dict(layout=cfgs['vgg19'])),
        Base(
            'vgg16_cifar',
            'VGG-16 for 32x32 images, 13 convolutions with batch norm and one linear layer',
            dict(layout=cfgs['vgg16'], small_images=True),
            dict(pool_size=(1, 1)),
            ('wide', 'narrow', 'twin'),
        ),
    ),
)
