"""The sparse network: a view of the original whose expert layers run on kept experts only."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..experts import GatedNetwork, expert_widths
from ..foreign import check_network
from ..gating import GatingNetwork
from ..plain import is_plain
from . import program
from .conv import WeightCache
from .fold import eval_view, fingerprint
from .gating import NativeGating, suits, trace_of
from .head import LOGITS, head_of, with_head
from .interpret import Interpreter
from .operations import Trace
from .plan import LIMIT
from .trace import trace

SMALL_WORK = 8e6
"""Products of a convolution, for each image and thread, below which a batch takes less time masked where torch runs the
convolutions: what surrounds one, about 0.1 ms for each image, then outweighs what is skipped."""


class Settings:
    """What calibration finds.

    Attributes:
        limits: gated layer to the largest kept fraction for which it runs on compact weights.
        ragged_limit: the largest kept fraction for which batches run ragged on a GPU.
        winograd: run 3x3 convolutions with fewer products where that takes less time; calibration leaves it as it is.
        masked: run the masked network instead; None: where convolutions run by torch, batches of small ones run masked.
    """

    def __init__(self) -> None:
        self.limits: dict[int, float] = {}
        self.ragged_limit: float | None = None
        self.winograd = True
        self.masked: bool | None = None


class Executor:
    """Takes the place of a network's features: runs its trace on kept experts only.

    Args:
        view: of the network, in evaluation mode.
        found: its trace, on this view.
        settings: of calibration.
        cache: holds gathered weights.
    """

    def __init__(self, view: Any, found: Trace, settings: Settings, cache: WeightCache) -> None:
        self.view, self.trace, self.settings, self.cache = view, found, settings, cache
        self.widths = expert_widths(view, view.expert_layers)
        self.head = head_of(found)
        self._whole = dataclasses.replace(found, operations=[*found.operations, *self.head])
        self._fits, self._dtype = program.fits(self._whole), next(view.parameters()).dtype
        self._gating_trace = trace_of(view.gating)
        self._lock = threading.Lock()
        self._program: program.Program | None = None
        self._interpreter: Interpreter | None = None
        self._gating: NativeGating | None = None

    def run(self, x: Tensor, wanted: Sequence[str]) -> list[Tensor]:
        """The wanted values of the trace, for images (B, C, H, W); kept experts are those of the network."""
        if self._runs_natively(x):
            return self._run_natively(x, wanted)
        return self.by_torch().run(x, self.view.gating(x), wanted)

    def run_gated(self, x: Tensor, gates: Sequence[Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """The same with given gates, each (B, C_l)."""
        runs: Any = self.native() if self._runs_natively(x) else self.by_torch()
        return runs.run(x, gates, wanted)

    def _run_natively(self, x: Tensor, wanted: Sequence[str]) -> list[Tensor]:
        if self._gating_trace is not None and suits(x):
            packed = self.gating(self._gating_trace)(x)
            if packed is not None:
                return self.native().run_packed(x, packed, wanted)
        return self.native().run(x, self.view.gating(x), wanted)

    def _runs_natively(self, x: Tensor) -> bool:
        return self._fits and program.available(x) and x.dtype == self._dtype

    def gating(self, found: Trace) -> NativeGating:
        """The gating network in native code, made of its trace at the first call."""
        with self._lock:
            if self._gating is None:
                self._gating = NativeGating(self.view.gating, found)
            return self._gating

    def native(self) -> program.Program:
        """The native program, made at the first call."""
        with self._lock:
            if self._program is None:
                self._program = program.Program(self._whole, self.widths, self.settings.winograd)
                self._apply()
            return self._program

    def by_torch(self) -> Interpreter:
        """What runs by torch, made at the first call."""
        with self._lock:
            if self._interpreter is None:
                self._interpreter = Interpreter(self.trace, self.widths, self.cache)
                self._apply()
            return self._interpreter

    def apply(self) -> None:
        """Run as the settings say from now on."""
        with self._lock:
            self._apply()

    def _apply(self) -> None:
        limits = [self.settings.limits.get(layer, LIMIT) for layer in range(len(self.widths))]
        if self._program is not None:
            self._program.set_limits(limits)
        if self._interpreter is not None:
            self._interpreter.set_limits(limits, self.settings.ragged_limit)

    def forward(self, x: Tensor) -> Tensor:
        """See the network, whose head native code knows."""
        if self._runs_natively(x):
            return self._run_natively(x, [LOGITS])[0].flatten(1)
        return type(self.view).forward(self.view, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """See the network."""
        return self.run(x, [self.trace.result])[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """See the network."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        info = self.view.feature_info
        take_indices, last = feature_take_indices(len(info), indices)
        taps = [self.trace.taps[info[i]['module']] for i in take_indices]
        result = self.trace.taps[info[last]['module']] if stop_early else self.trace.result
        *tapped, features = self.run(x, [*taps, taps[-1] if intermediates_only else result])
        return tapped if intermediates_only else (features, tapped)


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
        values = x.flatten(1)
        # Rows are what takes time, 0.4 GB of them for VGG: images together read each once, an image alone its own.
        together = len(x) > 1 and int(values.count_nonzero()) >= len(self.rows)
        y = values @ self.rows if together else torch.stack([self._row_sum(image) for image in values])
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


def sparse_view(network: Any, found: Trace, settings: Settings, cache: WeightCache) -> tuple[Any, Executor]:
    """A view of a gated network that runs on kept experts, and what runs its features."""
    view: Any = eval_view(network)
    if not isinstance(network.gating, GatingNetwork):
        view.gating = network.gating
    executor = Executor(view, found.on(view), settings, cache)
    if executor.head:
        view.forward = executor.forward
    view.forward_features = executor.forward_features
    view.forward_intermediates = executor.forward_intermediates
    present = dict(network.named_modules())
    for layer in network.expert_layers:
        conv: Any = present.get(layer.consumer)
        outside = not any(getattr(op, 'conv', None) is conv for op in found.operations)
        if outside and is_plain(conv, nn.Conv2d) and conv.weight.device.type == 'cpu' and conv.padding == (0, 0):
            view.set_submodule(layer.consumer, InputSparseConv(conv))
    return view, executor


class _Views(NamedTuple):
    """How a network runs until it changes.

    Attributes:
        sparse, masked: the views.
        executor: of the sparse view; None if it is the masked one.
        unchanged: whether the network is as it was.
        is_small: see `_is_small`.
    """

    sparse: Any
    masked: Any
    executor: Executor | None
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
        settings: what calibration found; `refresh` after changing them.
    """

    def __init__(self, network: GatedNetwork, cache_mb: float = 128) -> None:
        super().__init__()
        self.network = network
        self.cache_mb = cache_mb
        self.settings = Settings()
        self._trace: tuple[str, Trace] | None = None
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
        decides = x.ndim == 4 and len(x) > 1 and self.settings.masked is None and x.device.type == 'cpu'
        runs_masked = (
            decides and not program.available(x) and views.is_small((x.shape[2], x.shape[3]), torch.get_num_threads())
        )
        return views.masked if runs_masked else views.sparse

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the network's weights anew."""
        unchanged = fingerprint(self.network)
        masked: Any = eval_view(self.network)
        if self.settings.masked:
            self._current = _Views(masked, masked, None, unchanged, lambda size, threads: True)
            return
        check_network(self.network, 'Sparse execution', 'run the model without sparsify')
        structure = str(self.network)
        if self._trace is None or self._trace[0] != structure:
            # Only now: while torch.fx traces, no other thread of the process can call any module.
            self._trace = structure, with_head(trace(self.network))
        cache = WeightCache(int(self.cache_mb * 2**20))
        view, executor = sparse_view(self.network, self._trace[1], self.settings, cache)
        is_small = functools.cache(functools.partial(_is_small, self.network))
        self._current = _Views(view, masked, executor, unchanged, is_small)

    @property
    def executor(self) -> Executor | None:
        """What runs the features; None if the masked network runs."""
        return self._views().executor

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
        return {name: value for name, value in self.__dict__.items() if name not in ('_lock', '_current', '_trace')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()
        self._current = None
        self._trace = None


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
