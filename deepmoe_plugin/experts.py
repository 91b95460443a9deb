"""Where gates sit (Fig. 2): the one definition that networks, losses, counters and sparse execution read."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from .arguments import check_number
from .gating import GatingNetwork
from .plain import REMEDY, oddity


class ExpertLayer(NamedTuple):
    """One gated layer: its experts are the output channels of `conv`, read by nobody but `consumer`.

    Attributes:
        conv, norm, act: dotted module names of the convolution, its norm ('' if none) and its activation, whose
            output the gate multiplies.
        consumer: dotted name of the convolution that reads the gated channels, '' if the network ends there.
    """

    conv: str
    norm: str
    act: str
    consumer: str


class GatedNetwork(nn.Module):
    """A network with gates.

    Attributes:
        gating: maps images (B, C, H, W) to one gate tensor (B, C_l) for each gated layer.
        expert_layers: where the gates sit, in the order of the gates.
        pretrained_cfg: timm's description of the network.
    """

    gating: GatingNetwork
    expert_layers: tuple[ExpertLayer, ...]
    pretrained_cfg: dict[str, Any]


def deepmoe_networks(module: nn.Module) -> Iterator[GatedNetwork]:
    """All DeepMoE networks inside a module, through any wrapper (DDP, torch.compile, a segmentor, ...)."""
    return (m for m in module.modules() if isinstance(m, GatedNetwork))


def find_deepmoe(module: nn.Module) -> GatedNetwork:
    """The DeepMoE network inside a module.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = list(deepmoe_networks(module))
    if len(found) != 1:
        raise ValueError(f'Expected one DeepMoE network in {type(module).__name__}, found {len(found)}.')
    return found[0]


# Module names inside one residual block. The residual stream, the stem and the shortcuts are never gated.
_BASIC = (ExpertLayer('conv1', 'bn1', 'act1', 'conv2'),)
_BOTTLENECK_B = (ExpertLayer('conv2', 'bn2', 'act2', 'conv3'),)
_BOTTLENECK_A = (ExpertLayer('conv1', 'bn1', 'act1', 'conv2'), *_BOTTLENECK_B)


def block_experts(block: type[nn.Module], bottleneck: str) -> tuple[ExpertLayer, ...]:
    """Gated layers of a residual block, names relative to the block.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`, or a subclass.
        bottleneck: 'A' gates both inner activations of a bottleneck, 'B' only the one after the 3x3 convolution.

    Raises:
        ValueError: unknown block or variant.
    """
    if bottleneck not in ('A', 'B'):
        raise ValueError(f"bottleneck must be 'A' or 'B', got {bottleneck!r}.")
    if issubclass(block, BasicBlock):
        if bottleneck == 'B':
            raise ValueError("bottleneck='B' needs a network of bottleneck blocks; this one has basic blocks.")
        return _BASIC
    if not issubclass(block, Bottleneck):
        raise ValueError(f'block must be BasicBlock or Bottleneck, got {block.__name__}.')
    return _BOTTLENECK_A if bottleneck == 'A' else _BOTTLENECK_B


def resnet_experts(model: nn.Module, bottleneck: str) -> tuple[ExpertLayer, ...]:
    """Gated layers of a timm `ResNet`, in the order in which they run."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock | Bottleneck):
            for layer in block_experts(type(module), bottleneck):
                found += [ExpertLayer(*(f'{name}.{part}' for part in layer))]
    return tuple(found)


def vgg_experts(model: nn.Module) -> tuple[ExpertLayer, ...]:
    """Gated layers of a timm `VGG`: every convolution of `features`; the head's first one reads the last."""
    features = list(model.get_submodule('features').named_children())
    starts = [i for i, (_, module) in enumerate(features) if isinstance(module, nn.Conv2d)]
    has_head_conv = isinstance(getattr(getattr(model, 'pre_logits', None), 'fc1', None), nn.Conv2d)
    found = []
    for i, following in zip(starts, [*starts[1:], None], strict=True):
        act = i + 2 if model.use_norm else i + 1
        consumer = 'pre_logits.fc1' if has_head_conv else ''
        if following is not None:
            consumer = f'features.{features[following][0]}'
        norm = f'features.{features[i + 1][0]}' if model.use_norm else ''
        found.append(ExpertLayer(f'features.{features[i][0]}', norm, f'features.{features[act][0]}', consumer))
    return tuple(found)


def expert_widths(model: nn.Module, layers: Sequence[ExpertLayer]) -> list[int]:
    """Number of experts of each gated layer.

    Raises:
        ValueError: something else is in the place of a convolution.
    """
    return [expert_conv(model, layer.conv).out_channels for layer in layers]


def expert_conv(model: nn.Module, name: str) -> nn.Conv2d:
    """The convolution of this name, one that computes or reads experts.

    Raises:
        ValueError: something else is in its place.
    """
    conv = model.get_submodule(name)
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(
            f'{name} must be a convolution to tell what its experts are, but it {oddity(conv, nn.Conv2d)}: {REMEDY}.'
        )
    return conv


def per_layer(widen: float | Sequence[float], num_layers: int) -> list[float]:
    """Expand `widen` to one factor for each gated layer.

    Raises:
        ValueError: wrong number of factors, or a factor that is not a positive number.
    """
    factors = list(widen) if isinstance(widen, Sequence) and not isinstance(widen, str) else [widen] * num_layers
    if len(factors) != num_layers:
        raise ValueError(
            f'widen needs one factor, or one for each of the {num_layers} gated layers; got {len(factors)}.'
        )
    for factor in factors:
        check_number('widen', factor)
        if not 0 < factor < float('inf'):
            raise ValueError(f'widen must be positive, got {factor}.')
    return factors


def widen_experts(
    model: nn.Module,
    layers: Sequence[ExpertLayer],
    widen: float | Sequence[float],
    norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
) -> None:
    """Give every gated layer `widen` times its channels; the stream between the blocks stays as it is.

    The resized convolutions and norms come with their default initialisation.

    Raises:
        ValueError: see `per_layer`; a convolution is not a plain one, so that a wider one would be another.
    """
    for layer, factor in zip(layers, per_layer(widen, len(layers)), strict=True):
        if factor == 1:
            continue
        conv = expert_conv(model, layer.conv)
        width = max(1, round(conv.out_channels * factor))
        model.set_submodule(layer.conv, _resized(conv, conv.in_channels, width))
        if layer.norm:
            dd = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
            model.set_submodule(layer.norm, norm_layer(width, **dd))
        if layer.consumer:
            consumer = expert_conv(model, layer.consumer)
            model.set_submodule(layer.consumer, _resized(consumer, width, consumer.out_channels))


def _resized(conv: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    odd = oddity(conv, nn.Conv2d)
    if odd or conv.groups != 1:
        raise ValueError(f'widen needs plain convolutions, but one {odd or f"has {conv.groups} groups"}: {REMEDY}.')
    return nn.Conv2d(
        in_channels,
        out_channels,
        _pair(conv.kernel_size),
        stride=_pair(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
        dilation=_pair(conv.dilation),
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
