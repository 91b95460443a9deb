"""ConvNeXt as a backbone for MMSegmentation, with the arguments of mmpretrain's, which mmseg's own configs use."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor

from ..models import deepmoe_convnext
from .backbones import STAGES, Backbone, Config, build_backbone


class _ConvNeXtOutputs(Backbone):
    """What mmpretrain's ConvNeXt has as a backbone: a norm for each output, and checkpoints of its own."""

    @staticmethod
    def norm_arguments(norm_cfg: Config) -> dict[str, Any]:
        if not isinstance(norm_cfg, dict) or norm_cfg.get('type') not in ('LN', 'LN2d'):
            raise ValueError(f"norm_cfg of a ConvNeXt must be dict(type='LN2d', eps=1e-6) or alike, got {norm_cfg!r}.")
        return {'norm_eps': norm_cfg.get('eps', 1e-6)}

    def add_output_norms(self) -> None:
        self.output_norms = tuple(f'norm{index}' for index in self.out_indices)
        for name, tap in zip(self.output_norms, self.taps, strict=True):
            self.add_module(name, LayerNorm2d(self.feature_info[tap]['num_chs']))

    def converted(self, weights: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of ConvNeXt's authors or of mmpretrain in timm's names."""
        if not any(key.startswith('downsample_layers.') for key in weights):
            return weights
        renamed = {
            key.replace('depthwise_conv', 'dwconv').replace('pointwise_conv', 'pwconv'): value
            for key, value in weights.items()
            if not key.startswith('norm')  # of the classifier
        }
        shapes = {key: torch.empty(shape, device='meta') for key, shape in self.whole.items()}
        return checkpoint_filter_fn(renamed, SimpleNamespace(state_dict=lambda: shapes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See `Backbone`; the features are normalised."""
        features = super().forward(x)
        return tuple(self.get_submodule(name)(y) for name, y in zip(self.output_norms, features, strict=True))


class GatedConvNeXt(_ConvNeXtOutputs, deepmoe_convnext.DeepMoEConvNeXt, BaseModule):
    """Gated ConvNeXt as a backbone."""


class DenseConvNeXt(_ConvNeXtOutputs, deepmoe_convnext.WideConvNeXt, BaseModule):
    """Dense twin of a gated ConvNeXt as a backbone."""


@MODELS.register_module()
def DeepMoEConvNeXt(
    arch: str | dict[str, Sequence[int]] = 'tiny',
    *,
    stem_patch_size: int = 4,
    norm_cfg: Config = dict(type='LN2d', eps=1e-6),  # noqa: B006 (never changed)
    act_cfg: Config | None = None,
    linear_pw_conv: bool = True,
    use_grn: bool = False,
    layer_scale_init_value: float = 1e-6,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    frozen_stages: int = 0,
    gap_before_final_norm: bool = False,
    **kwargs: Any,
) -> Backbone:
    """Gated ConvNeXt with the arguments of mmpretrain's; its features have strides 4, 8, 16 and 32.

    As there, a norm follows each output, which checkpoints of classifiers do not hold.

    Args:
        arch: a name, as 'tiny', or a dictionary with the `depths` and `channels` of the four stages.
        in_channels, with_cp, widen, gated, num_classes, pretrained, init_cfg, **gating: see `DeepMoEResNet`.
        stem_patch_size: stride of the stem.
        norm_cfg: of the base network and the outputs, layer norms; the embedding has batch norms.
        act_cfg: mmcv's config of the activation; None is GELU.
        linear_pw_conv: linear layers in place of 1x1 convolutions.
        use_grn: ConvNeXt V2, which has `layer_scale_init_value=0`.
        drop_path_rate: of the last block.
        layer_scale_init_value: 0 for no layer scale.
        out_indices: which stages to return (0..3), ascending; -1 is the last.
        frozen_stages: 0 freezes nothing, k the stem and the first k stages.
        gap_before_final_norm: must be False: a segmentor needs maps.

    Raises:
        TypeError: unknown argument.
        ValueError: an argument is out of range or contradicts another; the message names it.
    """
    if isinstance(arch, str):
        if arch not in deepmoe_convnext.SIZES:
            names = ', '.join(deepmoe_convnext.SIZES)
            raise ValueError(f'arch must be one of {names}, or dict(depths=..., channels=...), got {arch!r}.')
        title, (depths, channels, _) = arch, deepmoe_convnext.SIZES[arch]
        arch = dict(depths=depths, channels=[channels * 2**i for i in range(STAGES)])
    elif isinstance(arch, dict) and {*arch} == {'depths', 'channels'}:
        title = repr(dict(arch))
    else:
        raise ValueError(f"arch must be a name or a dictionary with 'depths' and 'channels', got {arch!r}.")
    if gap_before_final_norm:
        raise ValueError('gap_before_final_norm must be False: pooled features are of no use to a segmentor.')
    if 'norm_eval' in kwargs:
        raise TypeError('DeepMoEConvNeXt has no argument norm_eval: layer norms have no statistics to keep.')
    fixed = dict(
        depths=tuple(arch['depths']),
        dims=tuple(arch['channels']),
        patch_size=stem_patch_size,
        conv_mlp=not linear_pw_conv,
        use_grn=use_grn,
        ls_init_value=layer_scale_init_value or None,
        act_layer='gelu' if act_cfg is None else partial(build_activation_layer, act_cfg),
    )
    backbone = dict(
        norm_cfg=norm_cfg,
        out_indices=(STAGES + out_indices if out_indices < 0 else out_indices,)
        if isinstance(out_indices, int)
        else out_indices,
        frozen_stages=frozen_stages or -1,
    )
    own = ('widen', 'drop_path_rate')
    return build_backbone(
        'DeepMoEConvNeXt', GatedConvNeXt, DenseConvNeXt, f'arch={title}', (), own, fixed, **backbone, **kwargs
    )
