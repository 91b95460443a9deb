"""Gated ResNets (Fig. 2) on timm's ResNet: ImageNet networks, CIFAR networks and DRN-A."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import BlurPool2d, get_norm_layer
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..activation import given
from ..checkpoints import build_with_checks
from ..experts import block_experts, resnet_experts, widen_experts
from ..gating import GatingConfig
from ..network import DeepMoE
from .registration import SMALL_IMAGE_EMBEDDING, Base, register_family

Gates = list[Tensor] | None


def add_shortcut(block: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """What timm's blocks do between their last norm and their last activation.

    Args:
        block: a `BasicBlock` or a `Bottleneck`.
        x: output of the last norm, (B, C, H, W).
        shortcut: input of the block.
    """
    if block.se is not None:
        x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    x += shortcut
    return x


class GatedBasicBlock(BasicBlock):
    """timm's basic block with its inner activation gated (Fig. 2a)."""

    first_gate: int = 0

    def forward(self, x: Tensor, gates: Gates = None) -> Tensor:
        """Run the block on `x` (B, C, H, W) with the gates of all layers of the network, each (B, C_l)."""
        gates = given(gates)
        shortcut = x
        x = self.drop_block(self.bn1(self.conv1(x)))
        x = self.aa(self.act1(x, gates[self.first_gate]))
        x = self.bn2(self.conv2(x))
        return self.act2(add_shortcut(self, x, shortcut))


class GatedBottleneck(Bottleneck):
    """timm's bottleneck with both inner activations gated ('A', Fig. 2b) or only the one after the 3x3 ('B', 2c)."""

    first_gate: int = 0
    gate_inner: bool = True

    def __init__(self, *args: Any, bottleneck: str = 'A', **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_inner = len(block_experts(type(self), bottleneck)) == 2

    def forward(self, x: Tensor, gates: Gates = None) -> Tensor:
        """Run the block on `x` (B, C, H, W) with the gates of all layers of the network, each (B, C_l)."""
        gates = given(gates)
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = self.act1(x, gates[self.first_gate]) if self.gate_inner else self.act1(x)
        x = self.drop_block(self.bn2(self.conv2(x)))
        x = self.aa(self.act2(x, gates[self.first_gate + int(self.gate_inner)]))
        x = self.bn3(self.conv3(x))
        return self.act3(add_shortcut(self, x, shortcut))


class GatedStage(nn.Sequential):
    """Residual blocks that share the gates of the network."""

    def forward(self, x: Tensor, gates: Gates = None) -> Tensor:
        """Run the blocks on `x` (B, C, H, W) with the gates of all layers of the network, each (B, C_l)."""
        for block in self:
            x = block(x, gates)
        return x


@register_notrace_module
class PadShortcut(nn.Module):
    """Option-A shortcut of CIFAR ResNets (He et al. 2016, section 4.2): subsample, pad channels with zeros."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class WideResNet(ResNet):
    """timm's ResNet with its expert layers widened: the dense twin of `DeepMoEResNet`, key for key.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: blocks of each stage.
        widen: factor on the width of each expert layer, or one factor for each.
        bottleneck: 'A' or 'B', which layers of a bottleneck are expert layers (Fig. 2).
        small_images: CIFAR layout: 3x3 stem at stride 1, no pooling, option-A shortcuts, three stages.
        **kwargs: timm's ResNet arguments.

    Raises:
        ValueError: an argument contradicts `widen`, or is out of range; the message names it.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        widen: float | Sequence[float] = 1,
        bottleneck: str = 'A',
        small_images: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ('base_width', 'cardinality', 'block_reduce_first', 'channels'):
            if name in kwargs:
                raise ValueError(f'{name} is not supported: use `widen` to set the width of the expert layers.')
        for name in ('stem_type', 'stem_width', 'replace_stem_pool', 'avg_down', 'down_kernel_size'):
            if small_images and name in kwargs:
                raise ValueError(f'{name} has no effect with small_images=True: leave it out.')
        if kwargs.get('output_stride', 32) not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {kwargs["output_stride"]}.')
        if small_images and kwargs.get('output_stride', 32) != 32:
            raise ValueError('output_stride cannot be changed with small_images=True.')
        block_experts(block, bottleneck)
        if small_images and not issubclass(block, BasicBlock):
            raise ValueError(
                'small_images=True needs block=BasicBlock: its shortcuts cannot change the width fourfold.'
            )
        channels = (16, 32, 64) if small_images else (64, 128, 256, 512)
        if len(layers) != len(channels) or min(layers) < 1:
            raise ValueError(f'layers must be {len(channels)} numbers of blocks, each at least 1, got {tuple(layers)}.')
        super().__init__(block, tuple(layers), channels=channels, **kwargs)
        if small_images:
            self._adapt_to_small_images(**kwargs)
        self.expert_layers = resnet_experts(self, bottleneck)
        norm_layer = get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d))
        widen_experts(self, self.expert_layers, widen, norm_layer)
        for module in self.modules():
            if isinstance(module, BlurPool2d) and module.channels is not None:
                module.channels = None  # one filter for any width
                module.filt = module.filt[:1].clone()
        self.init_weights(kwargs.get('zero_init_last', True))

    def _adapt_to_small_images(self, **kwargs: Any) -> None:
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        norm_layer = get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d))
        self.conv1 = nn.Conv2d(self.in_chans, 16, 3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(16, **dd)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        self.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False, **dd)
        self.layer1[0].downsample = None
        self.layer2[0].downsample = PadShortcut(16, stride=2)
        self.layer3[0].downsample = PadShortcut(32, stride=2)
        modules = ('act1', 'layer1', 'layer2', 'layer3')
        taps = zip((16, 16, 32, 64), (1, 1, 2, 4), modules, strict=True)
        self.feature_info = [dict(num_chs=c, reduction=r, module=m) for c, r, m in taps]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the stem and after each stage; see timm's ResNet for the arguments."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        args = self.stage_args(x)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take_indices else []
        x = self.maxpool(x)
        stages = range(1, len(self.feature_info))
        for i in stages[:last] if stop_early else stages:
            x = self.run_stage(getattr(self, f'layer{i}'), x, *args)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def stage_args(self, x: Tensor) -> tuple[Any, ...]:
        """What the stages take beside their input, for these images: nothing in a dense network."""
        return ()

    def run_stage(self, stage: nn.Sequential, x: Tensor, *args: Any) -> Tensor:
        """Run the blocks of a stage, each checkpointed if so set."""
        for block in stage:
            x = checkpoint(block, x, *args) if self.grad_checkpointing else block(x, *args)
        return x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages (and their gates) that no feature in `indices` needs; see timm's ResNet."""
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        pruned_end = last < len(self.feature_info) - 1
        for i in range(last + 1, len(self.feature_info)):
            stage = f'layer{i}'
            setattr(self, stage, type(getattr(self, stage))())
        if last == 0:
            self.maxpool = nn.Identity()
        if pruned_end:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or pruned_end:
            self.reset_classifier(0, '')
        return take_indices


class DeepMoEResNet(DeepMoE, WideResNet):
    """ResNet whose expert layers are gated for each image.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: blocks of each stage.
        **kwargs: the arguments of `GatingConfig`, `WideResNet` and timm's ResNet.

    Raises:
        ValueError: an argument is out of range or contradicts another; the message names it.
    """

    def __init__(self, block: type[nn.Module], layers: Sequence[int], **kwargs: Any) -> None:
        if kwargs.get('small_images'):
            kwargs.setdefault('embedding_channels', SMALL_IMAGE_EMBEDDING)
        config = GatingConfig.pop_from(kwargs)
        gated_block = GatedBasicBlock if issubclass(block, BasicBlock) else GatedBottleneck
        bottleneck = kwargs.get('bottleneck', 'A')
        if gated_block is GatedBottleneck:
            kwargs['block_args'] = {**(kwargs.get('block_args') or {}), 'bottleneck': bottleneck}
        super().__init__(gated_block, layers, **kwargs)
        for i in range(1, 5):
            setattr(self, f'layer{i}', GatedStage(*getattr(self, f'layer{i}')))
        first_gate = 0
        for module in self.modules():
            if isinstance(module, GatedBasicBlock | GatedBottleneck):
                module.first_gate = first_gate
                first_gate += len(block_experts(type(module), bottleneck))
        self.add_gating(config, 2 ** len(config.embedding_channels), kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the unpooled features of the last stage."""
        gates = self.gating(x)
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.run_stage(stage, x, gates) if self.grad_checkpointing else stage(x, gates)
        return x

    def stage_args(self, x: Tensor) -> tuple[Any, ...]:
        """The gates of all layers for these images."""
        return (self.gating(x),)


def _create_resnet(variant: str, pretrained: bool = False, gated: bool = True, **kwargs: Any) -> nn.Module:
    """Build a network of this family; `gated=False` gives its dense twin with the same widths."""
    return build_with_checks(
        DeepMoEResNet if gated else WideResNet,
        variant,
        pretrained,
        feature_cfg=dict(
            out_indices=(0, 1, 2, 3) if kwargs.get('small_images') else (0, 1, 2, 3, 4), feature_cls='getter'
        ),
        **kwargs,
    )


_SMALL = dict(block=BasicBlock, small_images=True)
_ALL = ('wide', 'narrow', 'twin')

register_family(
    __name__,
    _create_resnet,
    first_conv='conv1',
    classifier='fc',
    bases=(
        Base('resnet18', 'ResNet-18', dict(block=BasicBlock, layers=(2, 2, 2, 2))),
        Base('resnet34', 'ResNet-34', dict(block=BasicBlock, layers=(3, 4, 6, 3))),
        Base('resnet50', 'ResNet-50, bottleneck A', dict(block=Bottleneck, layers=(3, 4, 6, 3))),
        Base('resnet101', 'ResNet-101, bottleneck A', dict(block=Bottleneck, layers=(3, 4, 23, 3))),
        Base(
            'resnet50b',
            'ResNet-50, only the 3x3 convolutions gated (bottleneck B)',
            dict(block=Bottleneck, layers=(3, 4, 6, 3), bottleneck='B'),
            variants=('wide',),
        ),
        Base(
            'resnet20_cifar',
            'ResNet-20 for 32x32 images',
            dict(_SMALL, layers=(3, 3, 3)),
            variants=_ALL,
            tags={'wide': 'cifar100'},
        ),
        Base('resnet32_cifar', 'ResNet-32 for 32x32 images', dict(_SMALL, layers=(5, 5, 5)), variants=_ALL),
        Base('resnet56_cifar', 'ResNet-56 for 32x32 images', dict(_SMALL, layers=(9, 9, 9)), variants=_ALL),
        Base('resnet110_cifar', 'ResNet-110 for 32x32 images', dict(_SMALL, layers=(18, 18, 18)), variants=_ALL),
        Base(
            'drn_a_50',
            'DRN-A-50 (Yu et al. 2017), ResNet-50 dilated to output stride 8',
            dict(block=Bottleneck, layers=(3, 4, 6, 3), output_stride=8),
            dict(pool_size=(28, 28)),
            _ALL,
        ),
    ),
)
