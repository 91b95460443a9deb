"""Backbones for MMSegmentation: the networks of `deepmoe_plugin.models` with the arguments of mmseg's own backbones.

Like timm's entry points, the registered types are functions: `gated=False` makes the dense twin, another class.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vgg import cfgs as vgg_layouts
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..gating import GatingConfig
from ..models import deepmoe_resnet, deepmoe_vgg
from .pretrained import StrictPretrained

Config = dict[str, Any]

STAGES = 4
_RESNETS: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
_VGGS = (11, 13, 16, 19)
# Output stride to the strides and dilations of the stages.
_LAYOUTS = {
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
}


class Backbone(nn.Module):
    """What mmseg asks of a backbone, for the networks of this package; comes before the network in the bases.

    The network ends at the last output: later stages, and their gates, are not there.

    Args:
        *args: the network's.
        title: name of the network in messages.
        in_channels: channels of the images.
        out_indices: which of the four features to return, ascending.
        frozen_stages: stages that do not train, norm statistics included: -1 none, 0 the stem, k the stem and k stages.
            Their gates go on training.
        norm_cfg: mmcv's config of the norm layers, those of the embedding included.
        norm_eval: the base network's norm layers keep their statistics; the embedding's have none yet to keep.
        with_cp: activation checkpointing of each block.
        num_classes: classes of the embedding classifier (`L_e`).
        pretrained, init_cfg: see `DeepMoEResNet`.
        **kwargs: the network's.
    """

    def __init__(
        self,
        *args: Any,
        title: str,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_cfg: Config = dict(type='BN', requires_grad=True),  # noqa: B006 (never changed)
        norm_eval: bool = False,
        with_cp: bool = False,
        num_classes: int = 0,
        pretrained: str | None = None,
        init_cfg: Config | list[Config] | None = None,
        **kwargs: Any,
    ) -> None:
        out_indices = tuple(out_indices)
        if not out_indices or not set(out_indices) <= set(range(STAGES)) or list(out_indices) != sorted({*out_indices}):
            raise ValueError(f'out_indices must be ascending numbers from 0 to {STAGES - 1}, got {out_indices}.')
        if frozen_stages not in range(-1, STAGES + 1):
            raise ValueError(f'frozen_stages must be a number from -1 to {STAGES}, got {frozen_stages!r}.')
        super().__init__(*args, in_chans=in_channels, num_classes=num_classes, norm_layer=_norm(norm_cfg), **kwargs)
        self.title = title
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.first_tap = len(self.feature_info) - STAGES
        self.taps = [self.first_tap + index for index in out_indices]
        whole = set(self.state_dict())
        self.prune_intermediate_layers(self.taps)
        self.left_out = whole - set(self.state_dict())
        if with_cp:
            self.set_grad_checkpointing()
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.init_cfg = _init_cfg(pretrained, init_cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, in_channels, H, W) to the features of `out_indices`, each (B, C, H/s, W/s), rounded up.

        Raises:
            ValueError: the images have the wrong shape, channels, type or size, or are not finite.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f'Expected images of shape (batch, {self.in_chans}, height, width), got {tuple(x.shape)}: load them '
                f'with {self.in_chans} channels (LoadImageFromFile has color_type) or set in_channels of the backbone.'
            )
        return tuple(self.forward_intermediates(x, self.taps, intermediates_only=True))

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise by `init_cfg`, as mmengine asks without arguments; with them, timm's constructors call their own.

        Raises:
            ValueError: the weights of `Pretrained` do not fit.
        """
        if args or kwargs:
            super().init_weights(*args, **kwargs)
        else:
            BaseModule.init_weights(self)

    def train(self, mode: bool = True) -> 'Backbone':
        """Switch to training mode, but for what `frozen_stages`, `norm_eval` and frozen gating keep as it is."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        if mode and self.norm_eval:
            for name, module in self.named_modules():
                if isinstance(module, _BatchNorm) and not name.startswith('gating.'):
                    module.eval()
        return self

    def leaves_out(self, key: str) -> bool:
        """Whether a tensor of the whole network belongs to a stage after the last output."""
        return key in self.left_out

    def _frozen_parts(self) -> list[nn.Module]:
        """The modules of the base network, in the order in which they run, to the end of the last frozen stage."""
        if self.frozen_stages < 0:
            return []
        last = self.feature_info[self.first_tap + self.frozen_stages - 1]['module']
        parts = [(name, m) for name, m in self.named_modules() if not name.startswith('gating') and not [*m.children()]]
        ends = [i for i, (name, _) in enumerate(parts) if name == last or name.startswith(f'{last}.')]
        return [module for _, module in parts[: ends[-1] + 1 if ends else None]]


# The network's constructor calls the next one without arguments, and that is mmengine's.
class GatedResNet(Backbone, deepmoe_resnet.DeepMoEResNet, BaseModule):
    """Gated ResNet as a backbone."""


class DenseResNet(Backbone, deepmoe_resnet.WideResNet, BaseModule):
    """Dense twin of a gated ResNet as a backbone."""


class GatedVGG(Backbone, deepmoe_vgg.DeepMoEVGG, BaseModule):
    """Gated VGG as a backbone."""


class DenseVGG(Backbone, deepmoe_vgg.WideVGG, BaseModule):
    """Dense twin of a gated VGG as a backbone."""


@MODELS.register_module()
def DeepMoEResNet(
    depth: int,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    output_stride: int | None = None,
    **kwargs: Any,
) -> Backbone:
    """Gated ResNet (Fig. 2); its features have strides 4, 8, 16 and 32, or less from `output_stride` on.

    The stages reach the output stride by `dilations`, where the first block of a stage still has the dilation of the
    stage before (mmseg's `contract_dilation=True`).

    Args:
        depth: 18, 34, 50 or 101.
        in_channels: channels of the images.
        out_indices: which stages to return (0..3), ascending.
        strides, dilations: of the four stages; alternatively to `output_stride`, of which they must be a layout.
        output_stride: 8, 16 or 32 (default).
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
        norm_cfg: mmcv's config of the norm layers, those of the embedding included.
        norm_eval: norm layers of the base network keep their statistics.
        with_cp: activation checkpointing of each block.
        widen: factor on the width of the gated layers, or one factor for each; outputs keep their widths.
        bottleneck: 'A' gates both inner activations of a bottleneck, 'B' the one after the 3x3 convolution.
        gated: `False` makes the dense twin, the same widths without gates.
        num_classes: classes of the embedding classifier; needed with `embed_loss_weight` only.
        pretrained: mmseg's old way to say `init_cfg=dict(type='Pretrained', checkpoint=pretrained)`.
        init_cfg: mmengine's initialisation; `Pretrained` takes checkpoints of timm, torchvision and mmengine.
        **gating: the arguments of `GatingConfig`.

    Raises:
        TypeError: unknown argument.
        ValueError: an argument is out of range or contradicts another; the message names it.
    """
    if depth not in _RESNETS:
        raise ValueError(f'depth must be one of {", ".join(map(str, _RESNETS))}, got {depth!r}.')
    own = ('widen', 'bottleneck')
    fixed = dict(output_stride=_output_stride(strides, dilations, output_stride))
    return _build('DeepMoEResNet', GatedResNet, DenseResNet, depth, _RESNETS[depth], own, fixed, **kwargs)


@MODELS.register_module()
def DeepMoEDRN(depth: int = 50, **kwargs: Any) -> Backbone:
    """Gated DRN-A-50 (section 5.4): `DeepMoEResNet` of depth 50 at output stride 8.

    Raises:
        TypeError: unknown argument; strides, dilations and output stride are what makes a DRN.
        ValueError: see `DeepMoEResNet`.
    """
    if depth != 50:
        raise ValueError(f'depth of a DRN-A must be 50, got {depth!r}: DeepMoEResNet has others, and output_stride=8.')
    for name in ('strides', 'dilations', 'output_stride'):
        if name in kwargs:
            raise TypeError(f'DeepMoEDRN has no argument {name}, its output stride is 8: use DeepMoEResNet.')
    return DeepMoEResNet(depth, output_stride=8, **kwargs)


@MODELS.register_module()
def DeepMoEVGG(depth: int, **kwargs: Any) -> Backbone:
    """Gated VGG with norm layers; its features have strides 4, 8, 16 and 32, as a ResNet's, so that heads fit both.

    These are the last activations before the third, fourth and fifth pooling, and the fifth pooling's output; `widen`
    widens them too, since every convolution of a VGG is gated. `frozen_stages` counts likewise: the stem is what comes
    before stride 4.

    Args:
        depth: 11, 13, 16 or 19.
        out_indices: which of the four features to return, ascending.
        in_channels, frozen_stages, norm_cfg, norm_eval, widen, gated, num_classes, pretrained, init_cfg, **gating: see
            `DeepMoEResNet`.

    Raises:
        TypeError: unknown argument.
        ValueError: an argument is out of range or contradicts another; the message names it.
    """
    if depth not in _VGGS:
        raise ValueError(f'depth must be one of {", ".join(map(str, _VGGS))}, got {depth!r}.')
    if 'with_cp' in kwargs:
        raise TypeError('DeepMoEVGG has no argument with_cp: it has no blocks to checkpoint.')
    args = (vgg_layouts[f'vgg{depth}'],)
    # The classifier is built only to be taken off.
    return _build('DeepMoEVGG', GatedVGG, DenseVGG, depth, args, ('widen',), dict(mlp_ratio=1 / 4096), **kwargs)


def _build(
    name: str,
    gated_cls: type[Backbone],
    dense_cls: type[Backbone],
    depth: int,
    args: tuple[Any, ...],
    own: tuple[str, ...],
    fixed: Config,
    gated: bool = True,
    **kwargs: Any,
) -> Backbone:
    """Make a backbone or its dense twin.

    Args:
        name: of the registered type.
        args: of the network.
        own: names of the network's arguments that the registered type takes.
        fixed: arguments of the network that it does not take.
        **kwargs: arguments of `Backbone` and of `GatingConfig`, and those in `own`.
    """
    fields = {field.name: field.default for field in dataclasses.fields(GatingConfig)}
    known = {*inspect.signature(Backbone.__init__).parameters, *fields, *own} - {'title', 'self', 'args', 'kwargs'}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(f'{name} has no argument {", ".join(unknown)}.')
    idle = [field for field, default in fields.items() if kwargs.get(field, default) != default]
    if not gated and idle:
        raise ValueError(f'{", ".join(idle)} has no effect with gated=False: leave it out.')
    kept = kwargs if gated else {key: value for key, value in kwargs.items() if key not in fields}
    title = f'{name}(depth={depth}, widen={kwargs.get("widen", 1)})'
    return (gated_cls if gated else dense_cls)(*args, title=title, **fixed, **kept)


def _output_stride(strides: Sequence[int] | None, dilations: Sequence[int] | None, output_stride: int | None) -> int:
    if strides is None and dilations is None:
        return 32 if output_stride is None else output_stride
    plain = _LAYOUTS[32]
    layout = (plain[0] if strides is None else tuple(strides), plain[1] if dilations is None else tuple(dilations))
    found = next((stride for stride, known in _LAYOUTS.items() if known == layout), None)
    if found is None:
        known = '; '.join(f'{s} and {d} (output stride {stride})' for stride, (s, d) in _LAYOUTS.items())
        raise ValueError(
            f'strides={layout[0]} and dilations={layout[1]} are not supported together. Supported: {known}.'
        )
    if output_stride not in (None, found):
        raise ValueError(
            f'output_stride={output_stride} contradicts strides={layout[0]} and dilations={layout[1]}, whose output '
            f'stride is {found}: leave one of them out.'
        )
    return found


def _norm(norm_cfg: Config) -> Any:
    if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
        raise ValueError(f"norm_cfg must be a config of a norm layer, as dict(type='SyncBN'), got {norm_cfg!r}.")

    def norm_layer(width: int, device: Any = None, dtype: Any = None) -> nn.Module:
        return build_norm_layer(norm_cfg, width)[1].to(device=device, dtype=dtype)

    return norm_layer


def _init_cfg(pretrained: str | None, init_cfg: Config | list[Config] | None) -> list[Config] | None:
    """`init_cfg` with our `Pretrained`, which comes last and takes all or nothing."""
    if pretrained is not None:
        if init_cfg is not None:
            raise ValueError('pretrained and init_cfg contradict each other: give init_cfg alone.')
        if not isinstance(pretrained, str):
            raise ValueError(f'pretrained must be the path of a checkpoint, got {pretrained!r}.')
        warnings.warn(
            "pretrained is deprecated: use init_cfg=dict(type='Pretrained', checkpoint=...).",
            DeprecationWarning,
            stacklevel=5,
        )
        init_cfg = dict(type='Pretrained', checkpoint=pretrained)
    if init_cfg is None:
        return None
    configs = [dict(cfg) for cfg in ([init_cfg] if isinstance(init_cfg, dict) else init_cfg)]
    is_pretrained = [cfg.get('type') in ('Pretrained', PretrainedInit) for cfg in configs]
    first = [cfg for cfg, last in zip(configs, is_pretrained, strict=True) if not last]
    last = [{**cfg, 'type': StrictPretrained} for cfg, last in zip(configs, is_pretrained, strict=True) if last]
    return first + last
