"""`init_cfg=dict(type='Pretrained', ...)` of our backbones: mmengine's only warns about weights that do not fit."""

import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit, update_init_info
from timm.models import load_state_dict

from ..checkpoints import GATING_PREFIX, check_complete, check_readable, check_shapes, rename_old

_FIELD = '`checkpoint` in init_cfg'
# What classifiers on top of the networks are called by timm, torchvision, mmpretrain and mmengine.
_HEADS = ('fc.', 'head.', 'classifier.', 'pre_logits.')


class StrictPretrained(PretrainedInit):
    """Loads weights of timm, torchvision or mmengine into a backbone, all of them or none.

    Args:
        checkpoint: path of a `.pth` or `.safetensors` file, an `http(s)://` address or `torchvision://NAME`.
        prefix: take only the tensors whose names start so. By default the backbone is taken out of a whole segmentor.
        map_location: unused, mmengine's configs may name it: weights go to the device of the backbone.
    """

    def __call__(self, module: Any) -> None:
        """Load the weights.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be read, or does not fit the backbone; the message names what is missing.
        """
        load_pretrained(module, _read(str(self.checkpoint)), str(self.checkpoint), self.prefix)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())


def _read(checkpoint: str) -> dict[str, Any]:
    if checkpoint.startswith('torchvision://'):
        from torchvision.models import get_model_weights

        checkpoint = get_model_weights(checkpoint.removeprefix('torchvision://')).DEFAULT.url
    if checkpoint.startswith(('http://', 'https://')):
        state_dict = torch.hub.load_state_dict_from_url(checkpoint, map_location='cpu', weights_only=True)
        return dict(state_dict.get('state_dict', state_dict))
    allow_histories()  # whoever allowed the same for a while has taken it back
    check_readable(checkpoint, _FIELD)
    return load_state_dict(checkpoint)


def load_pretrained(backbone: Any, weights: dict[str, Any], source: str, prefix: str | None = None) -> None:
    """Load weights into a backbone, all of them or none.

    Args:
        backbone: a `Backbone` of this package.
        weights: state dict of a network, of its dense twin, or of a model that holds it as `backbone`.
        source: what the user gave, for the messages.
        prefix: take only the tensors whose names start so.

    Raises:
        ValueError: the weights do not fit; the message names what is missing.
    """
    if isinstance(weights.get('model'), dict):  # of ConvNeXt's authors
        weights = weights['model']
    if prefix is None and any(key.startswith('backbone.') for key in weights):
        prefix = 'backbone'
    if prefix is not None:
        prefix = prefix.removesuffix('.') + '.'
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if not weights:
            raise ValueError(f'{source} holds no tensor whose name starts with {prefix!r}: correct `prefix`.')
    weights = backbone.converted(weights)
    if not hasattr(backbone, 'stem') and any(key.startswith('stem.') for key in weights):
        raise ValueError(
            f'{source} has a deep stem (ResNetV1c or V1d, three 3x3 convolutions), which {backbone.title} has not: '
            f'give the checkpoint of a plain ResNet, as torchvision:// and timm have them.'
        )
    weights = {key: value for key, value in weights.items() if not backbone.leaves_out(key)}
    rename_old(weights)
    optional = (*_HEADS, *backbone.output_norms)
    check_complete(weights, backbone, source, backbone.title, optional)
    own = backbone.state_dict()
    check_shapes(backbone, own, weights)
    absent = (key for key in own if key.endswith('num_batches_tracked') or key.startswith(optional))
    counters = {key: own[key] for key in absent if key not in weights}
    counters = {key: value for key, value in counters.items() if not key.startswith(GATING_PREFIX)}
    backbone.load_state_dict({**counters, **{key: weights[key] for key in weights if not key.startswith(_HEADS)}})


def _history_method(owner: Any, name: str) -> Any:
    """Stands in for `getattr` in mmengine's checkpoints, where it only fetches the methods of `HistoryBuffer`."""
    if owner is not HistoryBuffer or not isinstance(name, str) or name.startswith('_'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is refused: a checkpoint has no use for it.')
    return getattr(owner, name)


def allow_histories() -> None:
    """Let `torch.load(weights_only=True)` read mmengine's own checkpoints, whose log histories are no plain tensors."""
    arrays: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in (np.float64, np.int64, np.uint32)}]
    core = getattr(np, '_core', None) or np.core
    functions = [core.multiarray._reconstruct, core.multiarray.scalar]
    torch.serialization.add_safe_globals([HistoryBuffer, *arrays, *functions, (_history_method, 'builtins.getattr')])
