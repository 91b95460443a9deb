"""Gated ConvNeXt (Liu et al. 2022, Woo et al. 2023) on timm's ConvNeXt: the hidden units of each block are experts.

A block widens its channels by a linear layer, GELU follows, and a second linear layer reads the hidden units, as nobody
else does. The gate multiplies each unit after GELU.

ConvNeXt V2 has a norm (GRN) between GELU and the second layer. The gate comes before it all the same: behind it, the
norm of every unit would be needed for the mean over the units, so that a closed unit would have to be computed. GRN as
it is would let a closed unit emit its bias, so the gate multiplies the bias as well: a closed unit is exactly zero. GRN
takes its mean over the units weighted by their gates, so that it is the mean over what is kept, whatever number of
units is closed or pruned away, and changes without a jump where a gate closes. With gates of one it is GRN's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import GlobalResponseNormMlp, Mlp
from timm.layers.grn import GlobalResponseNorm
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage, _init_weights, checkpoint_filter_fn
from torch import Tensor, nn

from ..activation import given, spread
from ..checkpoints import build_with_checks
from ..experts import convnext_experts, widen_experts
from ..gating import GatingConfig
from ..network import DeepMoE
from .registration import Base, register_family

Gates = list[Tensor] | None


class GatedResponseNorm(GlobalResponseNorm):
    """timm's GRN on gated units: its mean is weighted by the gates, its bias multiplied by them."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise gated units, channels last or not as timm's, with their gates (B, C)."""
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        is_last = self.channel_dim == -1
        weight, bias = self.weight[None], self.bias[None]
        return response_norm(x, norms, given(gate), weight, bias, self.weight.shape[0], self.eps, is_last)


def response_norm(
    x: Tensor, norms: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, width: int, eps: float, channels_last: bool
) -> Tensor:
    """GRN of gated units, all or those that are kept: the others are zero and add nothing to the mean.

    Args:
        x: K units, (B, H, W, K) with `channels_last`, or (B, K, H, W).
        norms: their Euclidean norms over all positions, with dimensions of length 1 there.
        gate: their gates, (B, K).
        weight, bias: (1, K), or (B, K) where images have units of their own.
        width: number of all units.
    """
    channels = -1 if channels_last else 1
    weight, bias = spread(weight, channels_last), spread(bias, channels_last)
    gate = spread(gate, channels_last)
    mean_gate = (gate.sum(channels, keepdim=True) / width).clamp_min(1e-6)
    mean = norms.sum(channels, keepdim=True) / width / mean_gate
    response = (norms / (mean + eps)).to(x.dtype)
    return x + torch.addcmul(bias * gate.to(x.dtype), weight, x * response)


class GatedMlp(Mlp):
    """timm's MLP of a V1 block with its hidden units gated."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map `x` with the gates (B, C_l) of its hidden units."""
        x = self.drop1(self.act(self.fc1(x), given(gate)))
        return self.drop2(self.fc2(self.norm(x)))


class GatedResponseNormMlp(GlobalResponseNormMlp):
    """timm's MLP of a V2 block with its hidden units gated."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map `x` with the gates (B, C_l) of its hidden units."""
        gate = given(gate)
        x = self.drop1(self.act(self.fc1(x), gate))
        return self.drop2(self.fc2(self.grn(x, gate)))


class GatedConvNeXtBlock(ConvNeXtBlock):
    """timm's block with the hidden units of its MLP gated."""

    index: int = 0

    def forward(self, x: Tensor, gates: Gates = None) -> Tensor:
        """Run the block on `x` (B, C, H, W) with the gates of all layers of the network, each (B, C_l)."""
        gate = given(gates)[self.index]
        shortcut = x
        x = self.conv_dw(x)
        if self.use_conv_mlp:
            x = self.mlp(self.norm(x), gate)
        else:
            x = self.mlp(self.norm(x.permute(0, 2, 3, 1)), gate).permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


class GatedConvNeXtStage(ConvNeXtStage):
    """timm's stage, whose blocks share the gates of the network."""

    def forward(self, x: Tensor, gates: Gates = None) -> Tensor:
        """Run the stage on `x` (B, C, H, W) with the gates of all layers of the network, each (B, C_l)."""
        gates = given(gates)
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, gates) if self.grad_checkpointing else block(x, gates)
        return x


_GATED: dict[type[nn.Module], type[nn.Module]] = {
    ConvNeXtStage: GatedConvNeXtStage,
    ConvNeXtBlock: GatedConvNeXtBlock,
    Mlp: GatedMlp,
    GlobalResponseNormMlp: GatedResponseNormMlp,
    GlobalResponseNorm: GatedResponseNorm,
}


class WideConvNeXt(ConvNeXt):
    """timm's ConvNeXt with its hidden units multiplied: the dense twin of `DeepMoEConvNeXt`, key for key.

    Args:
        widen: factor on the hidden units of each block, four times its channels, or one factor for each block.
        **kwargs: timm's ConvNeXt arguments.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(self, widen: float | Sequence[float] = 1, **kwargs: Any) -> None:
        for name in ('depths', 'dims'):
            sizes = kwargs.get(name, (1, 1, 1, 1))
            if len(sizes) != 4 or min(sizes) < 1:
                raise ValueError(f'{name} must be 4 numbers, each at least 1, got {tuple(sizes)}.')
        if kwargs.get('output_stride', 32) not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {kwargs["output_stride"]}.')
        super().__init__(**kwargs)
        self.expert_layers = convnext_experts(self)

        def norm_layer(width: int, **dd: Any) -> nn.Module:
            return GlobalResponseNorm(width, channels_last=not kwargs.get('conv_mlp', False), **dd)

        for layer in widen_experts(self, self.expert_layers, widen, norm_layer):
            _init_weights(self.get_submodule(layer.conv))
            _init_weights(self.get_submodule(layer.consumer))


class DeepMoEConvNeXt(DeepMoE, WideConvNeXt):
    """ConvNeXt whose hidden units are gated for each image.

    Args:
        **kwargs: the arguments of `GatingConfig`, `WideConvNeXt` and timm's ConvNeXt.

    Raises:
        ValueError: an argument is out of range or contradicts another; the message names it.
    """

    def __init__(self, **kwargs: Any) -> None:
        config = GatingConfig.pop_from(kwargs)
        super().__init__(**kwargs)
        # timm builds its stages from its own classes and takes no others.
        for module in self.stages.modules():
            module.__class__ = _GATED.get(type(module), type(module))
        blocks = [module for module in self.modules() if isinstance(module, GatedConvNeXtBlock)]
        for index, block in enumerate(blocks):
            block.index = index
        # The embedding keeps its batch norms: it is no ConvNeXt.
        self.add_gating(config, 2 ** len(config.embedding_channels), {**kwargs, 'norm_layer': None})

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the unpooled features of the last stage."""
        gates = self.gating(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, gates)
        return self.norm_pre(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after each stage; see timm's ConvNeXt for the arguments."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, last = feature_take_indices(len(self.stages), indices)
        gates = self.gating(x)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x, gates)
            is_end = i == len(self.stages) - 1
            if i in take_indices:
                intermediates.append(self.norm_pre(x) if norm and is_end else x)
        if intermediates_only:
            return intermediates
        return self.norm_pre(x) if is_end else x, intermediates


def _create_convnext(variant: str, pretrained: bool = False, gated: bool = True, **kwargs: Any) -> nn.Module:
    """Build a network of this family; `gated=False` gives its dense twin with the same widths."""
    return build_with_checks(
        DeepMoEConvNeXt if gated else WideConvNeXt,
        variant,
        pretrained,
        convert=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter', flatten_sequential=True),
        **kwargs,
    )


# Depths of the stages, channels of the first, which each stage doubles, and whether timm's network uses convolutions.
SIZES = {
    'atto': ((2, 2, 6, 2), 40, True),
    'femto': ((2, 2, 6, 2), 48, True),
    'pico': ((2, 2, 6, 2), 64, True),
    'nano': ((2, 2, 8, 2), 80, True),
    'tiny': ((3, 3, 9, 3), 96, False),
    'small': ((3, 3, 27, 3), 96, False),
    'base': ((3, 3, 27, 3), 128, False),
}
_V2 = dict(use_grn=True, ls_init_value=None)


def _base(name: str, title: str, size: str, **args: Any) -> Base:
    depths, channels, conv_mlp = SIZES[size]
    dims = tuple(channels * 2**i for i in range(4))
    args = dict(depths=depths, dims=dims, conv_mlp=conv_mlp, **args)
    return Base(f'{name}_{size}', f'{title} {size}', args, dict(interpolation='bicubic'))


register_family(
    __name__,
    _create_convnext,
    first_conv='stem.0',
    classifier='head.fc',
    bases=(
        *(_base('convnext', 'ConvNeXt', size) for size in SIZES),
        *(_base('convnextv2', 'ConvNeXt V2', size, **_V2) for size in SIZES),
    ),
)
