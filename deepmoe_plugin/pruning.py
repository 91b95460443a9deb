"""`deepmoe_plugin.prune`: static specialisation, for runtimes with fixed shapes (ONNX, TensorRT)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import get_model_args
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from .experts import ExpertLayer, expert_widths
from .network import DeepMoE
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
    none of the removed experts, the calibration images among them. At least one expert of each layer is kept.

        smaller = deepmoe_plugin.prune(model, loader)
        timm.models.save_for_hf(smaller, 'pruned', safe_serialization=True)
        smaller = timm.create_model('local-dir:pruned', pretrained=True)

    Args:
        model: a classifier made by `timm.create_model`; it is not changed.
        loader: batches of images (B, in_chans, H, W), or tuples that start with one and go on with labels (B,).
        tolerance: remove also the experts that at most this fraction of the images keeps (0 to 1).

    Returns:
        The smaller model, in evaluation mode, with an attribute `pruning`: a `Pruning`.

    Raises:
        ValueError: `model` was not made by `timm.create_model`, `tolerance` is out of range, there are no images, or
            `loader` cannot be run through again to measure what a tolerance costs.
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
    stats = gate_statistics(model, loader)
    kept = _choose(stats.kept.float().mean(0).split(stats.widths), model.expert_layers, tolerance)
    smaller = _rebuild(model, [len(index) for index in kept])
    smaller.load_state_dict(_slice(model.state_dict(), model.expert_layers, kept))
    smaller.eval()
    top1 = (_top1(model, loader), _top1(smaller, loader)) if tolerance else (None, None)
    cast(Any, smaller).pruning = Pruning(stats.widths, tuple(len(index) for index in kept), *top1)
    return smaller


def _choose(used: Sequence[Tensor], layers: Sequence[ExpertLayer], tolerance: float) -> list[Tensor]:
    """Indices of the experts that are kept in each layer; all of them where the classifier reads the layer directly."""
    kept = []
    for layer, part in zip(layers, used, strict=True):
        is_kept = part > tolerance if layer.consumer else torch.ones_like(part, dtype=torch.bool)
        is_kept[part.argmax()] = True
        kept.append(is_kept.nonzero().flatten())
    return kept


def _rebuild(model: DeepMoE, widths: Sequence[int]) -> DeepMoE:
    """A model of the same name and arguments with other widths of the gated layers."""
    weight = model.gating.gates.weight

    def build(widen: float | list[float], **kwargs: Any) -> DeepMoE:
        args = {**get_model_args(model), 'widen': widen, **kwargs}
        return cast(DeepMoE, timm.create_model(model.pretrained_cfg['architecture'], **args))

    plain = build(1, device='meta')
    factors = zip(widths, expert_widths(plain, plain.expert_layers), strict=True)
    return build([width / full for width, full in factors], device=weight.device, dtype=weight.dtype)


def _slice(state_dict: dict[str, Tensor], layers: Sequence[ExpertLayer], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of the smaller model."""
    sliced = dict(state_dict)
    gates = 'gating.gates.weight'
    ends = torch.tensor([0, *(len(sliced[f'{layer.conv}.weight']) for layer in layers)]).cumsum(0)
    rows = torch.cat([start + index for start, index in zip(ends[:-1], kept, strict=True)])
    sliced[gates] = sliced[gates][rows.to(sliced[gates].device)]
    for layer, index in zip(layers, kept, strict=True):
        index = index.to(sliced[gates].device)
        for key in [key for key in sliced if key.startswith((f'{layer.conv}.', f'{layer.norm or layer.conv}.'))]:
            if sliced[key].ndim:
                sliced[key] = sliced[key][index]
        if layer.consumer:
            sliced[f'{layer.consumer}.weight'] = sliced[f'{layer.consumer}.weight'][:, index]
    return sliced


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
