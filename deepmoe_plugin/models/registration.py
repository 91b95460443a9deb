"""Registration with timm from a table: one line for each network, entry points and default configs follow."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

SMALL_IMAGE_EMBEDDING = (16, 32, 64, 128)
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
_CIFAR = {
    **_IMAGENET,
    'num_classes': 100,
    'input_size': (3, 32, 32),
    'pool_size': (8, 8),
    'crop_pct': 1.0,
    'mean': (0.5071, 0.4865, 0.4409),
    'std': (0.2673, 0.2564, 0.2762),
}


class Base(NamedTuple):
    """A base network and the networks made from it.

    Attributes:
        name: of the base network, as in `wide_deepmoe_NAME`.
        title: what the docstrings of the entry points call it.
        args: arguments of the network class.
        cfg: entries of timm's default config that differ from those of the family.
        variants: 'wide' (experts doubled), 'narrow' (as many as the base network has channels) and 'twin' (the dense
            base network itself, where timm lacks it).
    """

    name: str
    title: str
    args: dict[str, Any]
    cfg: dict[str, Any] = {}
    variants: tuple[str, ...] = ('wide', 'narrow')


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
    family: Any = sys.modules[module]
    networks = [(f'{_PREFIXES[variant]}{base.name}', base, variant) for base in bases for variant in base.variants]
    cfgs = {}
    for name, base, variant in networks:
        common = _CIFAR if base.args.get('small_images') else _IMAGENET
        convs = first_conv if variant == 'twin' else (first_conv, 'gating.embedding.layers.0.conv')
        cfgs[name] = {**common, 'first_conv': convs, 'classifier': classifier, **base.cfg}
    family.default_cfgs = generate_default_cfgs(cfgs)
    for name, base, variant in networks:
        own: dict[str, Any] = {'wide': {'widen': 2}, 'narrow': {'widen': 1}, 'twin': {'gated': False}}[variant]
        setattr(family, name, register_model(_entry_point(module, name, create, base.title, {**base.args, **own})))


def _entry_point(
    module: str, name: str, create: Callable[..., nn.Module], title: str, args: dict[str, Any]
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **{**args, **kwargs})

    kind = {2: 'Wide-DeepMoE on', 1: 'Narrow-DeepMoE on', None: 'Dense'}[args.get('widen')]
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f'{kind} {title}.'
    return entry_point
