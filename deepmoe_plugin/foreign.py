"""Where experts are left out, everything around them must be as it was built: anything else is refused by name."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from .activation import GatedActivation
from .experts import expert_widths
from .models.deepmoe_convnext import GatedConvNeXtBlock, GatedMlp, GatedResponseNorm, GatedResponseNormMlp
from .models.deepmoe_resnet import GatedBasicBlock, GatedBottleneck
from .models.deepmoe_vgg import GatedFeatures
from .plain import BATCH_NORMS, IDLE, REMEDY, is_plain, oddity

_POOLS = (*IDLE, nn.MaxPool2d, nn.AvgPool2d)
NOT_BY_CHANNEL = 'does not treat each channel by itself'


def check_network(network: Any, action: str, instead: str) -> None:
    """Check that experts can be left out of a network without leaving out anything else.

    Args:
        action: who does it, for the message.
        instead: what works all the same, for the message.

    Raises:
        ValueError: a module is not as it was built; the message names it and the remedy.
    """
    for name, odd in _found(network):
        if odd:
            raise ValueError(f'{action} needs {name} as it was built, but this {odd}: {REMEDY}, or {instead}.')


def _found(network: Any) -> Iterator[tuple[str, str]]:
    """Modules that must be as they were built, with what is odd about them ('' if nothing)."""
    widths = expert_widths(network, network.expert_layers)
    for layer, width in zip(network.expert_layers, widths, strict=True):
        act = network.get_submodule(layer.act)
        yield layer.act, oddity(act, GatedActivation)
        yield f'{layer.act}.act', _odd_by_channel(act.act, width)
    if hasattr(network, 'features'):
        yield 'features', oddity(network.features, GatedFeatures)
        acts = {layer.act for layer in network.expert_layers}
        convs = {layer.conv for layer in network.expert_layers}
        norms = {layer.norm for layer in network.expert_layers}
        for child, module in network.features.named_children():
            name = f'features.{child}'
            kinds = (nn.Conv2d,) if name in convs else BATCH_NORMS if name in norms else _POOLS
            if name not in acts and (name not in norms or isinstance(module, BATCH_NORMS)):
                yield name, oddity(module, *kinds)
        return
    for name, block in network.named_modules():
        if isinstance(block, BasicBlock | Bottleneck):
            yield name, oddity(block, GatedBasicBlock, GatedBottleneck)
            for child, module in block.named_children():
                yield f'{name}.{child}', _odd_in_block(child, module)
        if isinstance(block, ConvNeXtBlock):
            yield name, oddity(block, GatedConvNeXtBlock)
            yield f'{name}.mlp', oddity(block.mlp, GatedMlp, GatedResponseNormMlp)
            for child, module in block.mlp.named_children():
                if child != 'act':
                    yield f'{name}.mlp.{child}', oddity(module, nn.Conv2d, nn.Linear, GatedResponseNorm, *IDLE)


def _odd_in_block(name: str, module: nn.Module) -> str:
    if name.startswith('conv'):
        return oddity(module, nn.Conv2d)
    if name.startswith('bn') and isinstance(module, BATCH_NORMS):  # callers refuse other norms
        return oddity(module, *BATCH_NORMS)
    if name in ('drop_block', 'drop_path'):
        return oddity(module, *IDLE)
    if name == 'aa' and getattr(module, 'channels', None) is None:  # others are refused where they run
        return _odd_by_channel(module, 8)
    return ''


def _odd_by_channel(module: nn.Module, width: int) -> str:
    """What keeps a module from running on some of its channels, '' if nothing does."""
    odd = oddity(module, type(module))
    return odd or ('' if is_plain(module, nn.ReLU) or _acts_by_channel(module, width) else NOT_BY_CHANNEL)


@torch.no_grad()
def _acts_by_channel(module: nn.Module, width: int) -> bool:
    """Whether the outputs of some channels are the same without the others."""
    tensor = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0))
    x = torch.linspace(-3, 3, 16 * width, device=tensor.device).view(16, width).t().to(tensor.dtype)
    x = x.reshape(1, width, 4, 4)
    module = copy.deepcopy(module).eval()
    try:
        return torch.allclose(module(x.clone())[:, ::2], module(x[:, ::2].clone()), rtol=1e-2, atol=1e-3)
    except (RuntimeError, ValueError):
        return False
