"""`deepmoe_plugin.prune`: static specialisation, for runtimes with fixed shapes (ONNX, TensorRT)."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import get_model_args
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from .experts import ExpertLayer, expert_widths
from .foreign import check_network
from .gating.frozen import FrozenNorm
from .gating.norm_curve import NormCurve
from .network import DeepMoE
from .plain import BATCH_NORMS, IDLE, oddity
from .stats import gate_statistics

Batch = Tensor | tuple[Tensor, ...]


class Pruning(NamedTuple):
    """What `prune` did.

    Attributes:
        widths_before, widths: experts of each gated layer.
        top1_before, top1: accuracy in percent on the calibration images; None without a tolerance or labels.
    """

    widths_before: tuple[int, ...]
    widths: tuple[int, ...]
    top1_before: float | None = None
    top1: float | None = None


def prune(model: nn.Module, loader: Iterable[Batch], tolerance: float = 0.0) -> DeepMoE:
    """Remove the experts that no calibration image keeps; what is left is an ordinary model, only smaller.

    Without a tolerance the result computes exactly what `model` does (to float rounding) for every image that keeps
    none of the removed experts, the calibration images among them. Each layer keeps the experts of at least one gate.

        smaller = deepmoe_plugin.prune(model, loader)
        timm.models.save_for_hf(smaller, 'pruned', safe_serialization=True)
        smaller = timm.create_model('local-dir:pruned', pretrained=True)

    Args:
        model: a classifier made by `timm.create_model`; it is not changed.
        loader: batches of images (B, in_chans, H, W), or tuples that start with one and go on with labels (B,).
        tolerance: remove also the experts that at most this fraction of the images keeps (0 to 1).

    Returns:
        The smaller model, in evaluation mode, with an attribute `pruning`: a `Pruning`. All else is as in `model`:
        what is frozen, hooks, types, drop rates.

    Raises:
        ValueError: `model` was not made by `timm.create_model`, or was changed so that its name and arguments no longer
            tell what it is; `tolerance` is out of range; there are no images, or `loader` cannot be run through again
            to measure what a tolerance costs.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f'tolerance must be a fraction, at least 0 and below 1, got {tolerance}.')
    if tolerance and iter(loader) is loader:
        raise ValueError('loader must be a list or a DataLoader: with a tolerance it is run through several times.')
    if not isinstance(model, DeepMoE) or not hasattr(model, '_model_args'):
        raise ValueError(
            f'prune takes a DeepMoE classifier made by timm.create_model, got a {type(model).__name__}: '
            'only such a model can be built again with fewer experts.'
        )
    check_network(model, 'prune', 'train the experts that stay as they are')
    for layer in model.expert_layers:
        if layer.norm and not isinstance(model.get_submodule(layer.norm), (*BATCH_NORMS, nn.InstanceNorm2d)):
            raise ValueError(
                f'prune needs norms that treat each channel by itself, but {layer.norm} '
                f'{oddity(model.get_submodule(layer.norm), *BATCH_NORMS)}: create the model with batch norms.'
            )
    _check_rebuilt(model)
    stats = gate_statistics(model, loader)
    used = stats.kept.float().mean(0).split(stats.widths)
    kept = _choose(used, model.expert_layers, tolerance, model.gating.gates.experts_per_gate)
    smaller = _without(model, kept).eval()
    top1 = (_top1(model, loader), _top1(smaller, loader)) if tolerance else (None, None)
    cast(Any, smaller).pruning = Pruning(stats.widths, tuple(len(index) for index in kept), *top1)
    return smaller


def _choose(
    used: Sequence[Tensor], layers: Sequence[ExpertLayer], tolerance: float, experts_per_gate: int
) -> list[Tensor]:
    """Indices of the experts that are kept in each layer; all of them where the classifier reads the layer directly.

    Experts of one gate are kept or removed together, as images use them equally often.
    """
    kept = []
    for layer, part in zip(layers, used, strict=True):
        is_kept = part > tolerance if layer.consumer else torch.ones_like(part, dtype=torch.bool)
        best = int(part.argmax()) // experts_per_gate * experts_per_gate
        is_kept[best : best + experts_per_gate] = True
        kept.append(is_kept.nonzero().flatten())
    return kept


def _build(model: DeepMoE, **kwargs: Any) -> DeepMoE:
    """The model that timm builds from the name and the arguments of another, without weights."""
    args = {**get_model_args(model), **kwargs, 'device': 'meta'}
    return cast(DeepMoE, timm.create_model(model.pretrained_cfg['architecture'], **args))


def _check_rebuilt(model: DeepMoE) -> None:
    """Check that name and arguments still tell what the model is: by them, the smaller one is saved and loaded.

    Raises:
        ValueError: names the part that was changed, and the remedy.
    """
    own, built = dict(model.named_modules()), dict(_build(model).named_modules())
    for name in (*own, *built):
        odd = _difference(own.get(name), built.get(name))
        if not odd:
            continue
        if name == model.pretrained_cfg['classifier']:
            remedy = f'use model.reset_classifier({getattr(own[name], "out_features", 0)}) to replace the classifier'
        else:
            remedy = 'build it by arguments of timm.create_model, or take it out'
        raise ValueError(f'prune needs the model that timm.create_model built, but {name} {odd}: {remedy}.')


def _difference(own: nn.Module | None, built: nn.Module | None) -> str:
    """How a module differs from what timm builds, '' if it does not: state may differ, and how it trains."""
    # A norm curve has the shapes of what it was measured on, and the smaller model has none.
    if all(module is None or isinstance(module, (*IDLE, NormCurve)) for module in (own, built)):
        return ''
    norms = (*BATCH_NORMS, FrozenNorm)
    if type(own) is not type(built) and not (isinstance(own, norms) and isinstance(built, norms)):
        return 'was taken out' if own is None else 'was added' if built is None else oddity(own, type(built))
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        for module in (own, built)
        if module is not None
    )
    wrong = [name for name in {**shapes, **expected} if '.' not in name and shapes.get(name) != expected.get(name)]
    return f'has a {wrong[0]} of shape {shapes.get(wrong[0])}, not {expected.get(wrong[0])}' if wrong else ''


def _without(model: DeepMoE, kept: Sequence[Tensor]) -> DeepMoE:
    """A copy that has the kept experts only."""
    smaller = copy.deepcopy(model)
    widths = [len(index) for index in kept]
    plain = _build(model, widen=1)
    full = expert_widths(plain, plain.expert_layers)
    built: Any = _build(model, widen=[width / all_of_it for width, all_of_it in zip(widths, full, strict=True)])
    for name in ('_model_args', 'feature_info', 'num_features'):
        setattr(smaller, name, getattr(built, name))
    starts = torch.tensor([0, *model.gating.gates.widths]).cumsum(0)
    rows = torch.cat([start + index for start, index in zip(starts, kept, strict=False)])
    experts_per_gate = model.gating.gates.experts_per_gate
    _keep(smaller.gating.gates, rows[::experts_per_gate] // experts_per_gate)
    smaller.gating.gates.widths = widths
    smaller.gating.forget_budgets()
    leave_only(smaller, kept)
    return smaller


def leave_only(network: Any, kept: Sequence[Tensor]) -> None:
    """Take all but some experts out of the layers of a network, gated or dense, in place; gate heads stay as they are.

    Args:
        network: has `expert_layers`. Experts that none of its layers reads are read by the classifier.
        kept: indices of the experts of each layer that stay, ascending.
    """
    for layer, index in zip(network.expert_layers, kept, strict=True):
        conv: Any = network.get_submodule(layer.conv)
        _keep(conv, index)
        setattr(conv, 'out_features' if isinstance(conv, nn.Linear) else 'out_channels', len(index))
        if layer.late_norm:
            _keep(network.get_submodule(layer.late_norm), index)
        if layer.norm:
            norm: Any = network.get_submodule(layer.norm)
            _keep(norm, index)
            norm.num_features = len(index)
        reader: Any = network.get_submodule(layer.consumer) if layer.consumer else network.get_classifier()
        if isinstance(reader, nn.Conv2d | nn.Linear):
            reader.weight = _selected(reader.weight, index, 1)
            setattr(reader, 'in_features' if isinstance(reader, nn.Linear) else 'in_channels', len(index))


def _keep(module: nn.Module, index: Tensor) -> None:
    """Keep these rows of all tensors of a module."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.ndim:
                tensors[name] = _selected(tensor, index, 0)


def _selected(tensor: Tensor, index: Tensor, dim: int) -> Any:
    """Some rows or columns, with the properties of the whole."""
    memory = torch.channels_last if tensor.ndim == 4 and not tensor.is_contiguous() else torch.contiguous_format
    part = tensor.detach().index_select(dim, index.to(tensor.device)).contiguous(memory_format=memory)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


@torch.inference_mode()
def _top1(model: DeepMoE, loader: Iterable[Batch]) -> float | None:
    """Accuracy in percent, None without labels."""
    was_training = model.training
    model.eval()
    meter = AverageMeter()
    device = model.gating.gates.weight.device
    for batch in loader:
        if isinstance(batch, Tensor) or len(batch) < 2:
            return None
        images, labels = batch[0].to(device), batch[1].to(device)
        meter.update(accuracy(model(images), labels)[0].item(), len(images))
    model.train(was_training)
    return meter.avg
