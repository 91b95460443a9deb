"""What all DeepMoE networks share, whatever their base: gates, freezing, widths."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoints import adapt_checkpoint
from .experts import ExpertLayer, expert_widths
from .gating import GatingConfig, GatingNetwork


class DeepMoE(nn.Module):
    """Mixin that adds a gating network to a base network of timm.

    The base network keeps timm's state-dict keys; everything new lives under `gating.`.

    Attributes:
        gating: maps images (B, C, H, W) to one gate tensor (B, C_l) for each gated layer.
        expert_layers: where the gates sit, in the order of the gates.
    """

    if TYPE_CHECKING:  # TorchScript would try to compile these annotations
        gating: GatingNetwork
        expert_layers: tuple[ExpertLayer, ...]

    @torch.jit.ignore
    def add_gating(
        self, config: GatingConfig, layers: tuple[ExpertLayer, ...], in_chans: int, num_classes: int, **kwargs: Any
    ) -> None:
        """Create the gating network for the gated `layers`; call once the base network stands."""
        widths = expert_widths(self, layers)
        self.expert_layers = layers
        self.gating = GatingNetwork(config, widths, in_chans=in_chans, num_classes=num_classes, **kwargs)
        self.register_load_state_dict_pre_hook(adapt_checkpoint)

    @torch.jit.ignore
    def keep_first_experts(self, num_layers: int) -> None:
        """Forget the gated layers after the first `num_layers`, and the consumers, that have been pruned away."""
        present = {name for name, _ in self.named_modules()}
        self.expert_layers = tuple(
            layer if layer.consumer in present else layer._replace(consumer='')
            for layer in self.expert_layers[:num_layers]
        )
        self.gating.keep_first(num_layers)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone: it would close gates that the loss wants open."""
        return {'gating.heads.weight'}


def deepmoe_networks(module: nn.Module) -> Iterator[DeepMoE]:
    """All DeepMoE networks inside a module, through any wrapper (DDP, torch.compile, a segmentor, ...)."""
    return (m for m in module.modules() if isinstance(m, DeepMoE))


def find_deepmoe(module: nn.Module) -> DeepMoE:
    """The DeepMoE network inside a module.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = list(deepmoe_networks(module))
    if len(found) != 1:
        raise ValueError(f'Expected one DeepMoE network in {type(module).__name__}, found {len(found)}.')
    return found[0]


def freeze_gating(module: nn.Module) -> None:
    """Start stage 2 (Procedure 1): no gating parameter or norm statistic changes any more, both loss weights are 0.

    Create the optimizer afterwards, or after `unfreeze_gating`, so that it holds the right parameters.

    Raises:
        ValueError: `module` holds no DeepMoE network.
    """
    for network in list(deepmoe_networks(module)) or [find_deepmoe(module)]:
        network.gating.freeze()


def unfreeze_gating(module: nn.Module) -> None:
    """Undo `freeze_gating`.

    Raises:
        ValueError: `module` holds no DeepMoE network.
    """
    for network in list(deepmoe_networks(module)) or [find_deepmoe(module)]:
        network.gating.unfreeze()
