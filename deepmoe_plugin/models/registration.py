"""Registration with timm from a table: one line for each network, entry points and default configs follow."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

SMALL_IMAGE_EMBEDDING = (16, 32, 64, 128)
WEIGHTS = Path(__file__).with_name('weights')
"""Trained weights that come with the package, NAME.TAG.safetensors, each with a card, NAME.TAG.md."""
_PREFIXES = {'wide': 'wide_deepmoe_', 'narrow': 'narrow_deepmoe_', 'twin': ''}
_IMAGENET = {
    'num_classes': 1000,
    'input_size': (3, 224, 224),
    'pool_size': (7, 7),
    'crop_pct': 0.875,
    'interpolation': 'bilinear',
    'mean': IMAGENET_DEFAULT_MEAN,
    'std': IMAGENET_DEFAULT_STD,
    'license': 'apache-2.0',
}
CIFAR = {
    **_IMAGENET,
    'num_classes': 100,
    'input_size': (3, 32, 32),
    'pool_size': (8, 8),
    'crop_pct': 1.0,
    'mean': (0.5071, 0.4865, 0.4409),
    'std': (0.2673, 0.2564, 0.2762),
}


class Network(NamedTuple):
    """A network of the registry.

    Attributes:
        name: of the entry point.
        title: its docstring.
        args: arguments of the network class.
        cfg: timm's default config.
        tag: of the weights that come with the package, as timm's names have it behind a dot; '' if there are none.
    """

    name: str
    title: str
    args: dict[str, Any]
    cfg: dict[str, Any]
    tag: str = ''


class Base(NamedTuple):
    """A base network and the networks made from it.

    Attributes:
        name: of the base network, as in `wide_deepmoe_NAME`.
        title: what the docstrings of the entry points call it.
        args: arguments of the network class.
        cfg: entries of timm's default config that differ from those of the family.
        variants: 'wide' (experts doubled), 'narrow' (as many as the base network has channels) and 'twin' (the dense
            base network itself, where timm lacks it).
        tags: of trained weights that come with the package, by variant.
    """

    name: str
    title: str
    args: dict[str, Any]
    cfg: dict[str, Any] = {}
    variants: tuple[str, ...] = ('wide', 'narrow')
    tags: dict[str, str] = {}


def register_family(
    module: str, create: Callable[..., nn.Module], first_conv: str, classifier: str, bases: Iterable[Base]
) -> None:
    """Make the entry points of a family in its module, with their default configs, and register them with timm.

    Args:
        module: `__name__` of the family's module.
        create: from (name, pretrained, **arguments) to the network; `gated=False` asks for the dense twin.
        first_conv, classifier: module names in the base network, as timm's default configs have them.
        bases: the table.
    """
    networks = [(f'{_PREFIXES[variant]}{base.name}', base, variant) for base in bases for variant in base.variants]
    table = []
    for name, base, variant in networks:
        common = CIFAR if base.args.get('small_images') else _IMAGENET
        convs = first_conv if variant == 'twin' else (first_conv, 'gating.embedding.layers.0.conv')
        own: dict[str, Any] = {'wide': {'widen': 2}, 'narrow': {'widen': 1}, 'twin': {'gated': False}}[variant]
        kind = {'wide': 'Wide-DeepMoE on', 'narrow': 'Narrow-DeepMoE on', 'twin': 'Dense'}[variant]
        cfg = {**common, 'first_conv': convs, 'classifier': classifier, **base.cfg}
        table.append(Network(name, f'{kind} {base.title}.', {**base.args, **own}, cfg, base.tags.get(variant, '')))
    register_networks(module, create, table)


def register_networks(module: str, create: Callable[..., nn.Module], networks: Iterable[Network]) -> None:
    """Make entry points in a module, with their default configs, and register them with timm.

    Args:
        module: `__name__` of the module.
        create: from (name, pretrained, **arguments) to the network.
        networks: the table.
    """
    family: Any = sys.modules[module]
    networks = list(networks)
    family.default_cfgs = generate_default_cfgs(dict(map(_default_cfg, networks)))
    for network in networks:
        setattr(family, network.name, register_model(_entry_point(module, create, network)))


def _default_cfg(network: Network) -> tuple[str, dict[str, Any]]:
    """Name with tag, and timm's default config, which says where the weights are."""
    if not network.tag:
        return network.name, network.cfg
    name = f'{network.name}.{network.tag}'
    return name, {**network.cfg, 'file': str(WEIGHTS / f'{name}.safetensors')}


def _entry_point(module: str, create: Callable[..., nn.Module], network: Network) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(network.name, pretrained, **{**network.args, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = network.name
    entry_point.__module__ = module
    entry_point.__doc__ = network.title
    return entry_point
