"""The sparse network: a view of the original whose expert layers run on compact weights."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from ..activation import GatedActivation
from ..experts import GatedNetwork, expert_widths
from ..foreign import check_network
from ..gating import GatingNetwork
from ..plain import is_plain
from . import ragged
from .conv import FoldedSequence, GatherConv, WeightCache
from .fold import eval_view, fingerprint, flatten
from .native import Queue
from .plan import Group, Kept, Plan, Reader, Segment
from .ragged import RaggedKept

SMALL_WORK = 8e6
"""Products of a convolution, for each image and thread, below which a batch takes less time masked: what surrounds a
convolution, about 0.1 ms for each image, then outweighs what is skipped."""


class PlannedGating(nn.Module):
    """Takes the place of the gating network: maps images to the plan for them.

    The gates are computed as the network computes them, to the last bit, so that both keep the same experts.

    Attributes:
        segments: those of the network, to be set once it stands.
    """

    def __init__(self, gating: nn.Module) -> None:
        super().__init__()
        self.gating = eval_view(gating) if isinstance(gating, GatingNetwork) else gating
        self.segments: list[Segment] = []

    def forward(self, x: Tensor) -> Plan:
        return Plan(self.gating(x), self.segments, ragged.available(x))


class SparseBlock(nn.Module):
    """A residual block of timm on kept experts: residual stream and shortcut dense, the rest compact.

    Args:
        block: `BasicBlock` or `Bottleneck`, its activations gated where `gated` says so.
        first: index of the block's first gated layer.
        gated: for each convolution but the last, whether its output is gated.
        keeps_input: the block's input is also read by others, so that it must not be overwritten.
        cache: holds gathered weights.
    """

    def __init__(self, block: Any, first: int, gated: Sequence[bool], keeps_input: bool, cache: WeightCache) -> None:
        super().__init__()
        count = len(gated) + 1
        convs = [getattr(block, f'conv{i}') for i in range(1, count + 1)]
        self.convs = [GatherConv(conv, getattr(block, f'bn{i}'), cache, i == 1) for i, conv in enumerate(convs, 1)]
        self.acts = [_activation(getattr(block, f'act{i}')) for i in range(1, count + 1)]
        self.blur = None if isinstance(block.aa, nn.Identity) else block.aa
        self.attention: nn.Module | None = block.se
        self.shortcut = None
        if block.downsample is not None:
            self.shortcut = FoldedSequence(list(flatten([block.downsample])), cache)
        self.keeps_input = keeps_input
        self.reads: list[int | None] = [None]
        self.writes: list[int | None] = []
        for is_gated in gated:
            self.writes.append(sum(gated[: len(self.writes)]) if is_gated else None)
            self.reads.append(self.writes[-1])
        self.writes.append(None)
        if getattr(self.blur, 'channels', None) is not None:
            raise ValueError(f'Sparse execution needs an aa_layer for any number of channels, got {self.blur}.')
        self.segment = Segment(first, [conv.out_channels for conv, g in zip(convs, gated, strict=False) if g], [])
        scale = 1.0
        for conv, reads, writes in zip(convs, self.reads, self.writes, strict=True):
            scale /= conv.stride[0] * conv.stride[1]
            self.segment.readers.append(Reader(conv.weight.numel(), scale, reads, writes))

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Map the residual stream (B, C, H, W) to the next; may overwrite its input."""
        if self.shortcut is not None:
            stream = self.shortcut(x)
        else:
            stream = x.clone() if self.keeps_input else x
        groups = plan.groups(self.segment, x.shape[2] * x.shape[3])
        if len(groups) == 1:
            return self._run(x, groups, stream)[0]
        # Convolution by convolution, so that groups in turn find the weights in the cache, or group by group, so that
        # convolutions in turn find the activations there: whichever is larger.
        weights = sum(reader.weights for reader in self.segment.readers)
        batches = [groups] if weights > x.numel() else [[group] for group in groups]
        for batch in batches:
            for group, result in zip(batch, self._run(x, batch, stream), strict=True):
                part = group.part
                if not isinstance(part, slice) or result.data_ptr() != stream[part].data_ptr():
                    stream[part] = result
        return stream

    def _run(self, x: Tensor, groups: Sequence[Group], stream: Tensor) -> list[Tensor]:
        """The next residual stream of each group, computed convolution by convolution."""
        queue = Queue()
        inputs = [x[group.part] for group in groups]
        for i, (conv, act) in enumerate(zip(self.convs[:-1], self.acts, strict=False)):
            inputs = [
                _layer(conv, act, part, group, self.reads[i], self.writes[i], queue)
                for part, group in zip(inputs, groups, strict=True)
            ]
            if self.blur is not None and i == len(self.convs) - 2:
                queue.run()
                inputs = [self.blur(part) for part in inputs]
        results = [
            self._close(inner, group, stream[group.part], queue) for inner, group in zip(inputs, groups, strict=True)
        ]
        queue.run()
        return results

    def _close(self, x: Tensor, group: Group, stream: Tensor, queue: Queue) -> Tensor:
        """The last convolution, added to the residual stream."""
        last = self.reads[-1]
        kept = None if last is None else group.kept[last]
        if self.attention is None and self.acts[-1] is None:
            return self.convs[-1](x, kept, add_to=stream, relu=True, queue=queue)
        x = self.convs[-1](x, kept, queue=queue)
        queue.run()
        if self.attention is not None:
            x = self.attention(x)
        x = stream.add_(x)
        return x.relu_() if self.acts[-1] is None else self.acts[-1](x)


def _activation(act: nn.Module) -> nn.Module | None:
    """The activation under a gate; None for ReLU, which is fused."""
    act = act.act if isinstance(act, GatedActivation) else act
    return None if is_plain(act, nn.ReLU) else act


def _layer(
    conv: GatherConv,
    act: nn.Module | None,
    x: Tensor,
    group: Group,
    reads: int | None,
    writes: int | None,
    queue: Queue,
) -> Tensor:
    """Convolution, norm, activation and gate of one layer: there when the queue has run."""
    kept_in = None if reads is None else group.kept[reads]
    kept_out = None if writes is None else group.kept[writes]
    gate = None if writes is None else group.gates[writes]
    if act is None:
        return conv(x, kept_in, kept_out, gate, relu=True, queue=queue)
    x = conv(x, kept_in, kept_out, queue=queue)
    queue.run()
    x = act(x)
    if gate is None:
        return x
    if isinstance(kept_out, Kept):
        gate = gate.index_select(1, kept_out.index)
    return x * gate.to(x.dtype)[:, :, None, None]


def sparse_resnet(network: Any, cache: WeightCache) -> Any:
    """A view of a gated ResNet that runs on kept experts; its methods are the network's own.

    Raises:
        ValueError: the network has parts that cannot run so.
    """
    view = eval_view(network)
    view.gating = PlannedGating(network.gating)
    view.conv1 = FoldedSequence(list(flatten([network.conv1, network.bn1, network.act1])), cache)
    view.bn1 = view.act1 = nn.Identity()
    view.maxpool = FoldedSequence(list(flatten([network.maxpool])), cache)
    gated_convs = [layer.conv for layer in network.expert_layers]
    first = 0
    for stage_name, stage in network.named_children():
        for i, (block_name, block) in enumerate(stage.named_children() if stage_name.startswith('layer') else ()):
            if not isinstance(block, BasicBlock | Bottleneck):
                raise ValueError(f'Sparse execution does not know blocks of type {type(block).__name__}.')
            path = f'{stage_name}.{block_name}'
            inner = ('conv1',) if isinstance(block, BasicBlock) else ('conv1', 'conv2')
            gated = [f'{path}.{name}' in gated_convs for name in inner]
            sparse = SparseBlock(view.get_submodule(path), first, gated, keeps_input=i == 0, cache=cache)
            view.set_submodule(path, sparse)
            first += sum(gated)
    view.gating.segments = segments(view)
    return view


class SparseFeatures(nn.Module):
    """The convolution stack of a gated VGG on kept experts.

    Args:
        network: gated VGG.
        cache: holds gathered weights.
    """

    def __init__(self, network: Any, cache: WeightCache) -> None:
        super().__init__()
        convs = {layer.conv: i for i, layer in enumerate(network.expert_layers)}
        gated = {layer.act for layer in network.expert_layers}
        norms = {layer.norm for layer in network.expert_layers}
        widths = expert_widths(network, network.expert_layers)
        self.segment = Segment(0, widths, [])
        self.steps: list[tuple[int, Any, Any]] = []
        scale = 1.0
        for index, (name, module) in enumerate(network.features.named_children()):
            path = f'features.{name}'
            if path in convs:
                layer = network.expert_layers[convs[path]]
                norm = network.get_submodule(layer.norm) if layer.norm else None
                act = _activation(network.get_submodule(layer.act))
                self.steps.append((index, GatherConv(module, norm, cache), act))
                reads = convs[path] - 1 if convs[path] else None
                self.segment.readers.append(Reader(module.weight.numel(), scale, reads, convs[path]))
            elif path in gated:
                self.steps[-1] = (index, *self.steps[-1][1:])
            elif path not in norms:
                self.steps.append((index, module, None))
                scale /= 4
        self.widths = widths

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Map images (B, C, H, W) to features, all channels."""
        return self.run(x, plan, ())[0]

    def run(self, x: Tensor, plan: Plan, taps: Sequence[int], stop: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Features after the last module (or module `stop`) and after each module in `taps`, all channels."""
        groups = plan.groups(self.segment, x.shape[2] * x.shape[3])
        if len(groups) == 1:
            return self._run(x, groups[0], taps, stop)
        results = [self._run(x[group.where], group, taps, stop) for group in groups]
        order = torch.cat([group.where for group in groups]).argsort()
        merge: Callable[..., Tensor] = lambda *parts: torch.cat(parts).index_select(0, order)  # noqa: E731
        outputs, tapped = zip(*results, strict=True)
        return merge(*outputs), [merge(*parts) for parts in zip(*tapped, strict=True)]

    def _run(self, x: Tensor, group: Group, taps: Sequence[int], stop: int | None) -> tuple[Tensor, list[Tensor]]:
        layer = -1
        tapped = []
        queue = Queue()
        for index, step, act in self.steps:
            if stop is not None and index > stop:
                break
            if isinstance(step, GatherConv):
                x = _layer(step, act, x, group, layer if layer >= 0 else None, layer + 1, queue)
                layer += 1
            else:
                queue.run()
                x = step(x)
            if index in taps:
                queue.run()
                tapped.append(_widened(x, group.kept[layer], self.widths[layer]))
        queue.run()
        return _widened(x, group.kept[layer], self.widths[layer]), tapped


def _widened(x: Tensor, kept: Kept | RaggedKept | None, width: int) -> Tensor:
    """All channels of compact features: those not computed are zero."""
    if kept is None:
        return x
    if isinstance(kept, RaggedKept):
        return kept.widened(x, width)
    out = x.new_zeros(x.shape[0], width, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
    return out.index_copy_(1, kept.index, x)


class InputSparseConv(nn.Module):
    """A convolution that covers its whole input, skipping the inputs that are zero: those of closed experts are."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.rows = conv.weight.detach().flatten(1).t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        if x.shape[2:] != self.conv.weight.shape[2:]:
            return self.conv(x)
        outputs = [self._row_sum(image) for image in x.flatten(1)]
        y = torch.stack(outputs)
        if self.conv.bias is not None:
            y = y + self.conv.bias.detach()
        return y[:, :, None, None]

    def _row_sum(self, values: Tensor) -> Tensor:
        rows = values.nonzero()[:, 0]
        if not len(rows):
            return self.rows.new_zeros(self.rows.shape[1])
        parts = torch.get_num_threads() if values.device.type == 'cpu' else 1
        starts = torch.arange(parts, device=rows.device) * len(rows) // parts
        sums = F.embedding_bag(rows, self.rows, starts, mode='sum', per_sample_weights=values[rows])
        return sums.sum(0)


def sparse_vgg(network: Any, cache: WeightCache) -> Any:
    """A view of a gated VGG that runs on kept experts; its methods are the network's own but for the features.

    Raises:
        ValueError: the network has parts that cannot run so.
    """
    view = eval_view(network)
    view.gating = PlannedGating(network.gating)
    features = view.features = SparseFeatures(network, cache)
    view.gating.segments = segments(view)
    if any(layer.consumer == 'pre_logits.fc1' for layer in network.expert_layers):
        conv = network.pre_logits.fc1
        if is_plain(conv, nn.Conv2d) and conv.weight.device.type == 'cpu' and conv.padding == (0, 0):
            view.pre_logits.fc1 = InputSparseConv(conv)

    def forward_intermediates(
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, last = feature_take_indices(len(network.feature_ends), indices)
        taps = [network.feature_ends[i] for i in take_indices]
        x, tapped = features.run(x, view.gating(x), taps, network.feature_ends[last] if stop_early else None)
        return tapped if intermediates_only else (x, tapped)

    view.forward_intermediates = forward_intermediates
    return view


class _Views(NamedTuple):
    """How a network runs until it changes.

    Attributes:
        sparse, masked: the views.
        unchanged: whether the network is as it was.
        is_small: see `_is_small`.
    """

    sparse: Any
    masked: Any
    unchanged: Callable[[], bool]
    is_small: Callable[[tuple[int, int], int], bool]


class SparseNetwork(nn.Module):
    """A DeepMoE network for inference that computes, for each image, only the experts that its gates keep.

    Calls, `forward_features`, `forward_intermediates`, `forward_head` and every attribute are those of the network.
    Always in evaluation mode, whatever mode the network is in; no gradients. Any number of threads may use it.
    `torch.compile` leaves it as it is.
    Changes of the network (a training step, `load_state_dict`, `.to`, another classifier) are noticed at the next
    call, which then folds anew. Only changes through `.data` go unnoticed: call `refresh` after them.

    Args:
        network: stays as it is and shares its weights with this module.
        cache_mb: MiB of gathered weights kept for gates that come again.

    Attributes:
        limits: gated layer to the largest kept fraction for which it runs on compact weights; by calibration.
        ragged_limits: first gated layer of a segment to the largest kept fraction for which a batch runs ragged on it;
            by calibration.
        masked: run the masked network instead: found faster or slower by calibration; without it (None), batches run
            masked whose convolutions are too small.
    """

    def __init__(self, network: GatedNetwork, cache_mb: float = 128) -> None:
        super().__init__()
        self.network = network
        self.cache_mb = cache_mb
        self.limits: dict[int, float] = {}
        self.ragged_limits: dict[int, float] = {}
        self.masked: bool | None = None
        self._lock = threading.Lock()
        self._current: _Views | None = None
        self.training = False
        self.view()

    def view(self) -> Any:
        """The network's view that runs sparsely, folded anew if the network has changed.

        Raises:
            RuntimeError: called during export.
        """
        return self._views().sparse

    def _views(self) -> '_Views':
        if torch.compiler.is_exporting():
            raise RuntimeError(
                'Sparse execution chooses shapes by the gates of each image, which no graph can hold. Export the '
                'network itself: it runs masked.'
            )
        current = self._current
        if current is not None and current.unchanged():
            return current
        with self._lock:
            current = self._current
            if current is None or not current.unchanged():
                self.refresh()
            assert self._current is not None
            return self._current

    def _view_for(self, x: Tensor) -> Any:
        """The view that takes least time for these images."""
        views = self._views()
        decides = self.masked is None and x.ndim == 4 and len(x) > 1 and x.device.type == 'cpu'
        return (
            views.masked
            if decides and views.is_small((x.shape[2], x.shape[3]), torch.get_num_threads())
            else views.sparse
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the network's weights anew."""
        unchanged = fingerprint(self.network)
        masked: Any = eval_view(self.network)
        if self.masked:
            self._current = _Views(masked, masked, unchanged, lambda size, threads: True)
            return
        check_network(self.network, 'Sparse execution', 'run the model without sparsify')
        cache = WeightCache(int(self.cache_mb * 2**20))
        build = sparse_vgg if hasattr(self.network, 'features') else sparse_resnet
        view = build(self.network, cache)
        for segment in segments(view):
            segment.ragged_limit = self.ragged_limits.get(segment.first, segment.ragged_limit)
            for layer in range(len(segment.widths)):
                segment.limits[layer] = self.limits.get(segment.first + layer, segment.limits[layer])
        is_small = functools.cache(functools.partial(_is_small, self.network))
        self._current = _Views(view, masked, unchanged, is_small)

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the network returns in evaluation mode, to float rounding."""
        return self._runs(x)(x, *args, **kwargs)

    @torch.compiler.disable
    @torch.no_grad()
    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features, all channels."""
        return self._runs(x).forward_features(x)

    @torch.compiler.disable
    @torch.no_grad()
    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (or pooled features with `pre_logits=True`) of the unpooled features."""
        return self._runs(x).forward_head(x, *args, **kwargs)

    @torch.compiler.disable
    @torch.no_grad()
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Features at several depths; see the network for the arguments."""
        return self._runs(x).forward_intermediates(x, *args, **kwargs)

    def _runs(self, x: Tensor) -> Any:
        """What runs on `x`: without values to look at, the network itself, whose modules a counter knows."""
        return self.network if x.is_meta else self._view_for(x)

    def train(self, mode: bool = True) -> 'SparseNetwork':
        """Do nothing: this module is for inference, and the network's own mode is not its business."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith('_') or name == 'network':
                raise
            return getattr(self.network, name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file needs the network alone: the view is made again at the first call.
        return {name: value for name, value in self.__dict__.items() if name not in ('_lock', '_current')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()
        self._current = None


def _is_small(network: Any, size: tuple[int, int], threads: int) -> bool:
    """Whether gated convolutions of one image, (H, W), have less than `SMALL_WORK` products to do, on average."""
    order = {name: i for i, (name, _) in enumerate(network.named_modules())}
    products = []
    for layer in network.expert_layers:
        # The first feature that is taken in or behind the layer's stage tells the stride.
        later = (
            info
            for info in network.feature_info
            if layer.conv.startswith(f'{info["module"]}.') or order.get(info['module'], 0) > order[layer.conv]
        )
        reduction = next((info['reduction'] for info in later), network.feature_info[-1]['reduction'])
        products.append(network.get_submodule(layer.conv).weight.numel() * size[0] * size[1] / reduction**2)
    return sum(products) < SMALL_WORK * threads * len(products)


def segments(view: nn.Module) -> list[Segment]:
    """The segments of a view, in the order in which they run."""
    return [m.segment for m in view.modules() if isinstance(m, SparseBlock | SparseFeatures)]
