"""The DeepMoE network in the model of a Runner."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from ...network import DeepMoE, deepmoe_networks


def model_of(runner: Any) -> nn.Module:
    """The model of a Runner, taken out of its wrapper for distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def network_of(runner: Any, hook: Hook) -> DeepMoE:
    """The DeepMoE network in the model of a Runner.

    Raises:
        ValueError: there is none, or more than one; the message names the hook that needs it.
    """
    networks = [network for network in deepmoe_networks(model_of(runner)) if isinstance(network, DeepMoE)]
    if len(networks) != 1:
        raise ValueError(
            f'{type(hook).__name__} needs one DeepMoE network in {type(model_of(runner)).__name__}, found '
            f'{len(networks)}: use a DeepMoE backbone with gated=True, or take the hook out of custom_hooks.'
        )
    return networks[0]
