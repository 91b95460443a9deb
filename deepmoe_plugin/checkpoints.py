"""Checkpoints: of the dense twin, of either training stage, of other class counts; and clear errors for the rest."""

import argparse
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

GATING_PREFIX = 'gating.'
# What a checkpoint may have or not: what only training needs, threshold and curve, which earlier versions lack, and the
# norm curve, which few have.
_OPTIONAL = tuple(
    GATING_PREFIX + name for name in ('class_scores.', 'budget.', 'gates.threshold', 'curve.', 'norm_curve.')
)
# Names of earlier versions, which contain the `head`, `classifier` and `fc` that users and hosts select parameters by.
_RENAMED = {'heads.': 'gates.', 'classifier.': 'class_scores.', 'embedding.fc.': 'embedding.mixture.'}
_NAMED = 5  # tensors that an error message names


def build_with_checks(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    convert: Callable[..., dict[str, Any]] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with a clear error where the file of pretrained weights does not fit.

    Args:
        model_cls, variant, pretrained, **kwargs: see timm.
        convert: timm's filter of the base network's checkpoints, from (state dict, model) to the state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or is not a checkpoint of this network; the message names it.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    cfg = resolve_pretrained_cfg(
        variant,
        pretrained_cfg=kwargs.get('pretrained_cfg'),
        pretrained_cfg_overlay=kwargs.get('pretrained_cfg_overlay'),
    )
    source = 'pretrained_cfg state_dict'
    if cfg.file and not cfg.state_dict and cfg.source != 'local-dir':  # timm chooses the file in a folder
        check_readable(cfg.file)
        source = str(cfg.file)
    keeps_classifier = not kwargs.get('features_only')

    def check(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        cfg = _pretrained_cfg(model)
        if convert is not None:
            state_dict = convert(state_dict, model)
        rename_old(state_dict)
        check_complete(state_dict, model, source, cfg['architecture'], (f'{cfg["classifier"]}.',))
        if keeps_classifier:
            _check_class_count(state_dict, model, source)
        return state_dict

    return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=check, **kwargs)


def check_readable(file: str | Path, field: str = '`file` in pretrained_cfg_overlay') -> None:
    """Check that a checkpoint file can be read without running code from it; tensors are mapped, not loaded.

    Args:
        file: path of the checkpoint.
        field: where the user gave it, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, is no checkpoint, or needs unpickling; the message names it.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f'There is no checkpoint {file}: correct {field}.')
    if str(file).endswith('.safetensors'):
        try:
            with safe_open(str(file), 'pt'):
                return
        except SafetensorError as error:
            raise ValueError(
                f'{file} is not a complete safetensors file ({error}): copy, download or save it again.'
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their arguments
            checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{file} holds more than tensors, or is no checkpoint at all. Loading it could run code, so it is refused: '
            f'save the state dict of its model alone, best as .safetensors.'
        ) from error
    except Exception as error:  # bytes that are no checkpoint end the unpickler in any way
        raise ValueError(
            f'{file} is cut short, damaged or no checkpoint at all ({type(error).__name__}): copy, download or save it '
            f'again.'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{file} holds a {type(checkpoint).__name__}, not a state dict: save model.state_dict().')


def rename_old(state_dict: dict[str, Any], prefix: str = '') -> None:
    """Give the tensors of a checkpoint of an earlier version their present names, in place.

    Args:
        prefix: of the network's tensors.
    """
    for old, new in _RENAMED.items():
        start = prefix + GATING_PREFIX
        for key in [key for key in state_dict if key.startswith(start + old)]:
            state_dict[start + new + key.removeprefix(start + old)] = state_dict.pop(key)


def check_complete(
    state_dict: Mapping[str, Any], model: nn.Module, source: str, name: str, optional: Iterable[str] = ()
) -> None:
    """Check that a checkpoint has the tensors of a network.

    Frameworks load what fits without looking at the rest, and a wrong checkpoint then is a random network.

    Args:
        source: what the user gave as the checkpoint, for the message.
        name: of the network, for the message.
        optional: prefixes of tensors that either side may lack, as the classifier's.

    Raises:
        ValueError: tensors are missing or unknown, or are none; the message names `source` and the first of them.
    """
    ignored = (*optional, *_OPTIONAL)
    own = {key for key in model.state_dict() if not key.startswith(ignored)}
    loaded = {key for key in state_dict if not key.startswith(ignored)}
    if not any(key.startswith(GATING_PREFIX) for key in loaded):
        own = {key for key in own if not key.startswith(GATING_PREFIX)}
    values = [key for key in sorted(own & loaded) if not isinstance(state_dict[key], Tensor)]
    if values:
        raise ValueError(
            f'{source} holds a {type(state_dict[values[0]]).__name__} for {values[0]}: save the model again.'
        )
    missing = sorted(key for key in own - loaded if not key.endswith('num_batches_tracked'))
    unknown = sorted(loaded - own)
    if unknown and not missing and all(key.startswith(GATING_PREFIX) for key in unknown):
        raise ValueError(
            f'{source} is a checkpoint of a gated network, whose convolutions do not work without their gates: leave '
            f'out gated=False, or give the checkpoint of a dense {name}.'
        )
    if missing or unknown:
        parts = [
            f'{len(keys)} {what}, as {", ".join(keys[:_NAMED])}'
            for what, keys in (('missing', missing), ('unknown', unknown))
            if keys
        ]
        raise ValueError(
            f'{source} is not a checkpoint of {name} (tensors: {"; ".join(parts)}): '
            f'give the checkpoint of {name} or of its dense twin.'
        )


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    cfg = model.pretrained_cfg
    assert isinstance(cfg, dict)
    return cfg


def _check_class_count(state_dict: Mapping[str, Any], model: nn.Module, source: str) -> None:
    """timm drops the classifier if `num_classes` of the cfg is not the model's, whatever the checkpoint holds."""
    cfg = _pretrained_cfg(model)
    weight = state_dict.get(f'{cfg["classifier"]}.weight')
    declared = cfg['num_classes']
    if weight is None or declared < 0 or len(weight) == declared:
        return
    if getattr(model, 'num_classes', None) in (len(weight), declared):
        raise ValueError(
            f'{source} has a classifier of {len(weight)} classes, but the pretrained cfg says num_classes={declared}: '
            f'add num_classes={len(weight)} to pretrained_cfg_overlay, or -1 to leave the classifier out.'
        )


def adapt_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let checkpoints of the dense twin, of stage 1 and of other class counts load; name what cannot.

    A pre-hook of `load_state_dict`, so it works for every framework's way to load.

    Raises:
        ValueError: a tensor has the wrong shape; the message names it and the argument that decides about it.
    """
    rename_old(state_dict, prefix)
    gating: Any = model.gating
    gating.norm_curve.make_room(state_dict, f'{prefix}{GATING_PREFIX}norm_curve.')
    own = {prefix + key: value for key, value in model.state_dict().items()}
    optional = tuple(prefix + key for key in _OPTIONAL)
    for key in [key for key in state_dict if key.startswith(optional)]:
        if key not in own or own[key].shape != state_dict[key].shape:
            _logger.info('%s of the checkpoint is not used by this model.', key)
            del state_dict[key]
    check_shapes(model, own, state_dict, prefix)
    start = prefix + GATING_PREFIX
    if not any(key.startswith(start) for key in state_dict):
        _logger.info('Checkpoint of a dense network: its weights go to the base network, the gates stay as they are.')
        state_dict.update({key: value for key, value in own.items() if key.startswith(start)})
    for key, value in own.items():
        if key.startswith(optional) and key not in state_dict:
            _logger.info('%s is not in the checkpoint and keeps its value.', key)
            state_dict[key] = value


def check_shapes(model: Any, own: Mapping[str, Tensor], state_dict: Mapping[str, Any], prefix: str = '') -> None:
    """Check that the tensors of a checkpoint have the shapes of the network's own.

    Args:
        model: a network of this package, gated or dense.
        own: its state dict, each key with `prefix`.

    Raises:
        ValueError: a shape differs; the message names the tensor and the argument that decides about it.
    """
    wrong = [
        key
        for key, value in own.items()
        if isinstance(state_dict.get(key), Tensor) and state_dict[key].shape != value.shape
    ]
    if not wrong:
        return
    expert_weights = {f'{prefix}{layer.conv}.weight' for layer in model.expert_layers}
    key = next((key for key in wrong if key in expert_weights), wrong[0])
    if key in expert_weights:
        remedy = (
            'create the model with the `widen` and the `bottleneck` of the checkpoint (the narrow_ models are '
            'unwidened; wide_resnet50_2 is the dense twin of wide_deepmoe_resnet50)'
        )
    elif key == f'{prefix}{GATING_PREFIX}gates.weight':
        shared = _experts_per_gate(model, own[key], state_dict[key])
        of_gates = f'experts_per_gate={shared}' if shared else '`num_latent_experts` and the `widen`'
        remedy = f'create the model with the {of_gates} and the `bottleneck` of the checkpoint'
    elif key.startswith(prefix + GATING_PREFIX):
        remedy = 'create the model with the `num_latent_experts`, `embedding_channels` and `in_chans` of the checkpoint'
    else:
        remedy = 'create the model with the `num_classes`, `in_chans` and architecture of the checkpoint'
    raise ValueError(
        f'{key} has shape {tuple(state_dict[key].shape)} in the checkpoint and {tuple(own[key].shape)} in this model '
        f'({len(wrong)} tensors differ): {remedy}.'
    )


def _experts_per_gate(model: Any, own: Tensor, loaded: Tensor) -> int:
    """How many experts share a gate in a checkpoint of gate heads, if that is all that differs; otherwise 0."""
    experts = sum(model.gating.gates.widths)
    if own.shape[1:] != loaded.shape[1:] or not len(loaded) or experts % len(loaded):
        return 0
    return experts // len(loaded)
