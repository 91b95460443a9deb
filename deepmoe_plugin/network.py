"""What all DeepMoE networks share, whatever their base: gates, freezing, widths, checkpoints."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .experts import ExpertLayer, expert_widths
from .gating import GatingConfig, GatingNetwork

_logger = logging.getLogger(__name__)

GATING_PREFIX = 'gating.'


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
        self.register_load_state_dict_pre_hook(_adapt_checkpoint)

    @torch.jit.ignore
    def keep_first_experts(self, num_layers: int) -> None:
        """Forget the gated layers after the first `num_layers`, whose blocks have been pruned away."""
        self.expert_layers = self.expert_layers[:num_layers]
        self.gating.heads.keep_first(num_layers)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone: it would close gates that the loss wants open."""
        return {'gating.heads.weight'}


def _adapt_checkpoint(model: DeepMoE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let checkpoints of the dense twin, of stage 1 and of other class counts load; name what cannot."""
    own = {prefix + key: value for key, value in model.state_dict().items()}
    _check_widths(model, state_dict, prefix)
    gating = prefix + GATING_PREFIX
    if not any(key.startswith(gating) for key in state_dict):
        _logger.info('Checkpoint of a dense network: its weights go to the base network, all gates start at 1.')
        state_dict.update({key: value for key, value in own.items() if key.startswith(gating)})
        return
    optional = (gating + 'classifier.', gating + 'budget.')
    for key in [key for key in state_dict if key.startswith(optional)]:
        if key not in own or own[key].shape != state_dict[key].shape:
            _logger.info('%s of the checkpoint is not used by this model.', key)
            del state_dict[key]
    for key, value in own.items():
        if key.startswith(optional) and key not in state_dict:
            _logger.info('%s is not in the checkpoint and keeps its initial value.', key)
            state_dict[key] = value


def _check_widths(model: DeepMoE, state_dict: dict[str, Any], prefix: str) -> None:
    for layer in model.expert_layers:
        key = f'{prefix}{layer.conv}.weight'
        own = model.get_submodule(layer.conv).weight
        loaded = state_dict.get(key)
        if isinstance(loaded, Tensor) and loaded.ndim == 4 and loaded.shape[0] != own.shape[0]:
            raise ValueError(
                f'{key} has {loaded.shape[0]} experts in the checkpoint and {own.shape[0]} in this model: create the '
                f'model with the `widen` of the checkpoint (widen=1, the narrow_ models, for an unwidened network; '
                f'wide_resnet50_2 is the dense twin of wide_deepmoe_resnet50).'
            )


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
