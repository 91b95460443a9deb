"""Multiply-accumulates (MACs) of every image.

Convention: one multiply-accumulate counts 1. Convolutions and linear layers count, without their biases. Norms,
activations, pooling, additions, the softmax and products of two activations (attention) do not count. The paper's
'FLOPs' are these MACs without the shortcut convolutions (Table 3: its ResNet-50 has 3.73e9), so shortcuts are a group
of their own. An expert layer costs in proportion to (kept inputs) x (kept outputs) of its convolution.

Groups: 'base' is the base network; 'head' is its classifier, or whatever follows the backbone (decode heads of a
segmentor); 'embedding' and 'gate_heads' are the gating network. A segmentor is counted as it runs in `tensor` mode on
the whole image, so without auxiliary heads and without the overlap of sliding windows.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .experts import deepmoe_networks, expert_conv, expert_widths
from .gating import GateHeads
from .stats import kept_experts

GROUPS = ('base', 'shortcut', 'head', 'embedding', 'gate_heads')
GATING_GROUPS = ('embedding', 'gate_heads')


class ModuleCost(NamedTuple):
    """Dense MACs of one module for one image.

    Attributes:
        name: dotted module name.
        group: one of `GROUPS`.
        macs: multiply-accumulates with all experts kept.
        reads: index of the gated layer whose experts the module reads, None if its input is dense.
        writes: index of the gated layer whose experts the module computes, None if its output is dense.
    """

    name: str
    group: str
    macs: int
    reads: int | None
    writes: int | None


class MacsReport(NamedTuple):
    """MACs of each image of a batch.

    Attributes:
        by_module: module name to MACs, each of shape (B,), in the order in which the network runs.
        by_group: the same summed over the groups 'base', 'shortcut', 'head', 'embedding' and 'gate_heads'.
        dense_by_group: MACs of one image if all experts were kept.
    """

    by_module: dict[str, Tensor]
    by_group: dict[str, Tensor]
    dense_by_group: dict[str, int]

    @property
    def total(self) -> Tensor:
        """MACs of each image with everything counted, shape (B,)."""
        return torch.stack(list(self.by_group.values())).sum(0)

    @property
    def without_shortcuts(self) -> Tensor:
        """`total` less the shortcut convolutions, as the paper counts, shape (B,)."""
        return self.total - self.by_group['shortcut']

    @property
    def dense_total(self) -> int:
        """MACs of one image with all experts kept, everything counted."""
        return sum(self.dense_by_group.values())


def module_costs(model: nn.Module, image_size: tuple[int, int]) -> list[ModuleCost]:
    """Dense MACs of each convolution and linear layer, in the order of execution.

    Runs the model once on the meta device: no arithmetic, no copy of the weights.

    Args:
        model: a network of this package or a plain one, taking images (B, in_chans, H, W).
        image_size: (H, W) in pixels.

    Raises:
        ValueError: the model has no convolution, or something else in the place of an expert layer's.
    """
    names = {module: name for name, module in model.named_modules()}
    network = next(deepmoe_networks(model), None)
    layers = network.expert_layers if network is not None else ()
    for name in (name for layer in layers for name in (layer.conv, layer.consumer) if name):
        expert_conv(cast(nn.Module, network), name)
    backbone = network or getattr(model, 'backbone', None)
    prefix = names[backbone] + '.' if backbone is not None and names[backbone] else ''
    writes = {prefix + layer.conv: i for i, layer in enumerate(layers)}
    reads = {prefix + layer.consumer: i for i, layer in enumerate(layers) if layer.consumer}
    classifying = backbone or next((m for m in model.modules() if hasattr(m, 'get_classifier')), None)
    get_classifier = getattr(classifying, 'get_classifier', None)
    classifier = get_classifier() if get_classifier is not None else None
    classifiers = [] if classifier is None else list(classifier.modules())  # each expert may have one
    costs: list[ModuleCost] = []

    def group_of(module: nn.Module, name: str) -> str:
        if isinstance(module, GateHeads):
            return 'gate_heads'
        if not name.startswith(prefix) or module in classifiers or name.startswith(f'{prefix}pre_logits.'):
            return 'head'
        if network is not None and name.startswith(f'{prefix}gating.'):
            return 'embedding'
        block, is_inside, _ = name.partition('.downsample.')
        # A main path may be called `downsample` as well; only a residual block has convolutions beside it.
        return 'shortcut' if is_inside and hasattr(model.get_submodule(block), 'conv1') else 'base'

    def measure(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Every weight is used once for each output position (of a transposed convolution, for each input position).
        positions = args[0] if isinstance(module, _ConvTransposeNd) else output
        positions = positions[0, 0] if isinstance(module, _ConvNd) else positions[..., 0]
        macs = weight.numel() * positions.numel()
        costs.append(ModuleCost(name, group_of(module, name), macs, reads.get(name), writes.get(name)))

    measured = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear | GateHeads)]
    hooks = [module.register_forward_hook(measure) for module in measured]
    first = next((m for m in measured if isinstance(m, nn.Conv2d)), None)
    channels = getattr(model, 'in_chans', None) if first is None else first.in_channels
    if channels is None:
        raise ValueError(f'{type(model).__name__} has no convolution: there is nothing to count for images.')
    image = torch.empty(1, channels, *image_size, device='meta', dtype=next(model.parameters()).dtype)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: tensor.to('meta') for name, tensor in tensors.items()}
    was_training = {module: module.training for module in model.modules()}
    try:
        for module in was_training:  # not by `eval`, which a sparse network does not pass on
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            torch.func.functional_call(model, meta, (image,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return costs


class MacsTable:
    """MACs as a function of the fraction of experts that each gated layer keeps.

    Args:
        model: holds at most one DeepMoE network.
        image_size: (H, W) in pixels.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int]) -> None:
        self.costs = module_costs(model, image_size)
        network = next(deepmoe_networks(model), None)
        self.widths = expert_widths(network, network.expert_layers) if network is not None else []
        self._to('cpu')

    def dense(self, groups: Sequence[str] = GROUPS) -> int:
        """MACs of one image with all experts kept, summed over `groups`."""
        return sum(cost.macs for cost in self.costs if cost.group in groups)

    def by_module(self, kept: Tensor) -> Tensor:
        """MACs of each module for each image.

        Args:
            kept: which experts are kept, shape (B, N), boolean, all layers side by side.

        Returns:
            Shape (B, number of modules), float64: exact integers below 2**53.
        """
        if self._macs.device != kept.device:
            self._to(kept.device)
        fractions = kept.double() @ self._layers / self._layers.sum(0)
        fractions = torch.cat([fractions, fractions.new_ones(len(kept), 1)], dim=1)
        return self._macs * fractions[:, self._reads] * fractions[:, self._writes]

    def spent(self, kept: Tensor) -> Tensor:
        """Fraction of the dense MACs that each image costs, shape (B,); the gating network is not included."""
        macs = self.by_module(kept)
        return macs @ self._charged / (self._macs @ self._charged)

    def _to(self, device: torch.device | str) -> None:
        """Put what `by_module` needs on a device; one product then counts the experts kept in all layers."""
        widths = torch.tensor(self.widths, dtype=torch.long)
        self._layers = torch.eye(len(widths), dtype=torch.float64).repeat_interleave(widths, dim=0).to(device)
        self._macs = torch.tensor([cost.macs for cost in self.costs], dtype=torch.float64, device=device)
        charged = [cost.group not in GATING_GROUPS for cost in self.costs]
        self._charged = torch.tensor(charged, dtype=torch.float64, device=device)
        dense = len(self.widths)  # the column of ones
        reads = [dense if cost.reads is None else cost.reads for cost in self.costs]
        writes = [dense if cost.writes is None else cost.writes for cost in self.costs]
        self._reads, self._writes = torch.tensor([reads, writes], device=device)
        by_layer = [0.0] * dense
        for cost in self.costs:
            for layer in (cost.reads, cost.writes):
                if layer is not None:
                    by_layer[layer] += cost.macs
        shares = torch.cat(
            [torch.full((w,), m / w) for w, m in zip(self.widths, by_layer, strict=True)] or [torch.ones(0)]
        )
        self._expert_costs = (shares / shares.sum()).to(device)

    @functools.cached_property
    def floor(self) -> float:
        """Fraction of the dense MACs that the layers without gates cost."""
        return self.spent(torch.zeros(1, sum(self.widths), dtype=torch.bool)).item()

    def check_target(self, target: float) -> None:
        """Check that a fraction of the dense MACs can be reached.

        Raises:
            ValueError: it is below what the layers without gates cost.
        """
        if target <= self.floor:
            raise ValueError(
                f'A budget of {target} of the dense MACs (target_macs) cannot be reached: the layers without gates '
                f'alone cost {self.floor:.3f} of the dense MACs. Choose a larger target.'
            )

    def expert_costs(self, device: torch.device = torch.device('cpu')) -> Tensor:  # noqa: B008 (never changed)
        """Share of each expert in the dense MACs of all expert layers, shape (N,), summing to one.

        An expert costs its part of the convolution that computes it and of the one that reads it.
        """
        if self._macs.device != device:
            self._to(device)
        return self._expert_costs

    def report(self, kept: Tensor) -> MacsReport:
        """MACs of the images that keep these experts, shape (B, N), boolean."""
        macs = self.by_module(kept).round().long()
        by_module: dict[str, Tensor] = {}
        by_group = {group: torch.zeros_like(macs[:, 0]) for group in GROUPS}
        for cost, column in zip(self.costs, macs.unbind(1), strict=True):
            by_module[cost.name] = by_module[cost.name] + column if cost.name in by_module else column
            by_group[cost.group] = by_group[cost.group] + column
        return MacsReport(by_module, by_group, {group: self.dense((group,)) for group in GROUPS})


# The latest table of each model, and what it was made for: running a network on the meta device takes longer than a
# small network takes for a small batch.
_tables: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], str], MacsTable]] = WeakKeyDictionary()


def macs_table(model: nn.Module, image_size: tuple[int, int]) -> MacsTable:
    """The table of a model, made again only if the image size or the model's modules have changed since.

    Raises:
        ValueError: see `module_costs`.
    """
    key = (image_size, repr(model))
    known = _tables.get(model)
    if known is not None and known[0] == key:
        return known[1]
    table = MacsTable(model, image_size)
    _tables[model] = (key, table)
    return table


@torch.no_grad()
def count_macs(model: nn.Module, x: Tensor) -> MacsReport:
    """Count the MACs of every image in a batch; runs the gating network only.

    Args:
        model: a classifier of this package, a dense network (all its images cost the same), or a segmentor around
            either, called as `model(x)`.
        x: images (B, in_chans, H, W), normalised as the model expects them.

    Raises:
        ValueError: the images do not fit the model, or it holds several DeepMoE networks.
    """
    if isinstance(model, nn.DataParallel):  # takes one batch apart for several devices
        model = model.module
    networks = list(deepmoe_networks(model))
    if len(networks) > 1:
        raise ValueError(f'Expected at most one DeepMoE network in {type(model).__name__}, found {len(networks)}.')
    kept = kept_experts(networks[0], x) if networks else torch.ones(len(x), 0, dtype=torch.bool)
    return macs_table(model, (x.shape[2], x.shape[3])).report(kept)
