"""Where gates sit (Fig. 2): the one definition that networks, losses, counters and sparse execution read."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from timm.layers import GlobalResponseNormMlp
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .arguments import check_number
from .gating import GatingNetwork
from .plain import REMEDY, oddity

Conv = nn.Conv2d | nn.Linear


class ExpertLayer(NamedTuple):
    """One gated layer: its experts are the output channels of `conv`, read by nobody but `consumer`.

    Both are convolutions, or linear layers on channels-last maps, (B, H, W, C), which are 1x1 convolutions of these.

    Attributes:
        conv, norm, act: dotted module names of the convolution, its norm ('' if none) and its activation, whose
            output the gate multiplies.
        consumer: dotted name of the convolution that reads the gated channels, '' if the network ends there.
        late_norm: dotted name of a norm between gate and consumer, '' if there is none. It is called with the gates
            too, and leaves closed experts at zero and out of its statistics.
    """

    conv: str
    norm: str
    act: str
    consumer: str
    late_norm: str = ''


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
    get_classifier: Callable[..., nn.Module]

    def check_target(self, target: float) -> None:
        """Check that a fraction of the dense MACs can be reached.

        Raises:
            ValueError: it is below what the layers without gates cost.
        """
        raise NotImplementedError

    def spent(self, kept: Tensor) -> Tensor:
        """Fraction of the dense MACs that each image costs, shape (B,), of the experts that it keeps, (B, N), boolean;
        at the nominal image size, the gating network not included."""
        raise NotImplementedError

    def macs_of_experts(self) -> Tensor:
        """Share of each expert in the dense MACs of the gated layers, shape (N,), summing to one."""
        raise NotImplementedError


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
    found: list[ExpertLayer] = []
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock | Bottleneck):
            found += [_inside(name, layer) for layer in block_experts(type(module), bottleneck)]
    return tuple(found)


def _inside(block: str, layer: ExpertLayer) -> ExpertLayer:
    """The layer with the names that its modules have outside their block."""
    return ExpertLayer(*(part and f'{block}.{part}' for part in layer))


def convnext_experts(model: nn.Module) -> tuple[ExpertLayer, ...]:
    """Gated layers of a timm `ConvNeXt`, in the order in which they run: the hidden units of each block."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ConvNeXtBlock):
            late_norm = 'grn' if isinstance(module.mlp, GlobalResponseNormMlp) else ''
            found.append(_inside(f'{name}.mlp', ExpertLayer('fc1', '', 'act', 'fc2', late_norm)))
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
    return [num_outputs(expert_conv(model, layer.conv)) for layer in layers]


def expert_conv(model: nn.Module, name: str) -> Conv:
    """The convolution or linear layer of this name, one that computes or reads experts.

    Raises:
        ValueError: something else is in its place.
    """
    conv = model.get_submodule(name)
    if not isinstance(conv, nn.Conv2d | nn.Linear):
        raise ValueError(
            f'{name} must be a convolution or a linear layer to tell what its experts are, but it '
            f'{oddity(conv, nn.Conv2d, nn.Linear)}: {REMEDY}.'
        )
    return conv


def num_outputs(conv: Conv) -> int:
    """Output channels of a convolution or linear layer."""
    return conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels


def num_inputs(conv: Conv) -> int:
    """Input channels of a convolution or linear layer."""
    return conv.in_features if isinstance(conv, nn.Linear) else conv.in_channels


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
) -> list[ExpertLayer]:
    """Give every gated layer `widen` times its channels; the stream between the blocks stays as it is.

    The resized convolutions and norms come with their default initialisation.

    Returns:
        The resized layers.

    Raises:
        ValueError: see `per_layer`; a convolution is not a plain one, so that a wider one would be another.
    """
    resized = []
    for layer, factor in zip(layers, per_layer(widen, len(layers)), strict=True):
        if factor == 1:
            continue
        conv = expert_conv(model, layer.conv)
        width = max(1, round(num_outputs(conv) * factor))
        model.set_submodule(layer.conv, _resized(conv, num_inputs(conv), width))
        for norm in filter(None, (layer.norm, layer.late_norm)):
            dd = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
            model.set_submodule(norm, norm_layer(width, **dd))
        if layer.consumer:
            consumer = expert_conv(model, layer.consumer)
            model.set_submodule(layer.consumer, _resized(consumer, width, num_outputs(consumer)))
        resized.append(layer)
    return resized


def _resized(conv: Conv, inputs: int, outputs: int) -> Conv:
    odd = oddity(conv, nn.Conv2d, nn.Linear)
    if not odd and isinstance(conv, nn.Conv2d) and conv.groups != 1:
        odd = f'has {conv.groups} groups'
    if odd:
        raise ValueError(f'widen needs plain convolutions, but one {odd}: {REMEDY}.')
    dd: dict[str, Any] = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
    if isinstance(conv, nn.Linear):
        return nn.Linear(inputs, outputs, bias=conv.bias is not None, **dd)
    return nn.Conv2d(
        inputs,
        outputs,
        _pair(conv.kernel_size),
        stride=_pair(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
        dilation=_pair(conv.dilation),
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        **dd,
    )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
