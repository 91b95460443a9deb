"""What the gates keep and what images cost, in the log of training, validation and testing."""

from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from mmengine.visualization import TensorboardVisBackend, WandbVisBackend
from torch import Tensor, nn

from ...macs import MacsTable
from ...network import DeepMoE, deepmoe_networks
from ...stats import join_kept
from ..backbones import Backbone
from .lookup import model_of, network_of


class _Tally:
    """Forward hook of a gating network (or of a dense backbone): remembers what each pass keeps, at which size."""

    def __init__(self) -> None:
        self.passes: list[tuple[tuple[int, int], Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        (images,) = args
        if images.is_meta:  # the MAC counter is at work
            return
        gates = torch.cat(output, dim=1) if isinstance(output, list) else images.new_zeros(len(images), 0)
        self.passes.append(((images.shape[2], images.shape[3]), gates.detach() > 0))


class _WandbRow(dict[str, Any]):
    """Takes what `GateStatistics.log_to` writes as one row of W&B's log."""

    def __init__(self, wandb: Any) -> None:
        super().__init__()
        self._histogram = wandb.Histogram

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self[tag] = value

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self[tag] = self._histogram(values.numpy())


@HOOKS.register_module()
class GateStatisticsHook(Hook):
    """Logs `kept_experts` (fraction of experts kept, 0..1) and `gmacs` (10^9 multiply-accumulates of an image).

    Both are averages over the images of a training batch, or of all images validated or tested, processes together.
    `gmacs` is what the backbone costs, gating network included and decode heads not, as `count_macs` counts, at the
    size that the backbone sees; all windows or augmentations of an image add up. A dense backbone has `gmacs` only.

    TensorBoard and W&B, if they are among the `vis_backends`, also get `kept_experts` of each layer and its histograms
    over images and over experts, in the sections `val_gates` and `test_gates`. These are of the images of the main
    process, and count each window or augmentation as an image.
    """

    def __init__(self) -> None:
        self._network: nn.Module | None = None
        self._tally = _Tally()
        self._handle: Any = None
        self._tables: dict[tuple[int, int], MacsTable] = {}
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._backends: list[Any] = []
        self._kept: list[Tensor] = []

    def before_train(self, runner: Any) -> None:
        """Watch the gates of the model.

        Raises:
            ValueError: the model holds no backbone of this package or several.
        """
        self._watch(runner)

    def before_val(self, runner: Any) -> None:
        """Watch the gates of the model; see `before_train`."""
        self._watch(runner)

    def before_test(self, runner: Any) -> None:
        """Watch the gates of the model; see `before_train`."""
        self._watch(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log the batch; `kept_experts` only if the loss hook does not."""
        sums = self._take(None)
        for name, value in self._averages(sums).items():
            if name not in (outputs or {}):
                runner.message_hub.update_scalar(f'train/{name}', value)

    def before_val_epoch(self, runner: Any) -> None:
        """Start anew."""
        self._start(runner)

    def before_test_epoch(self, runner: Any) -> None:
        """Start anew."""
        self._start(runner)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Add the batch."""
        self._add(len(outputs))

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Add the batch."""
        self._add(len(outputs))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Log the epoch; mmengine's logger shows it to the visualizer."""
        self._finish(runner, 'val', metrics)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Log the epoch, to the visualizer too, which mmengine's logger leaves out."""
        averages = self._finish(runner, 'test', metrics)
        runner.visualizer.add_scalars({f'test/{name}': value for name, value in averages.items()})

    def _watch(self, runner: Any) -> None:
        model = model_of(runner)
        dense = [m for m in model.modules() if isinstance(m, Backbone) and not isinstance(m, DeepMoE)]
        found = len(dense) == 1 and not any(True for _ in deepmoe_networks(model))
        network: nn.Module = dense[0] if found else network_of(runner, self)
        if network is self._network:
            return
        if self._handle is not None:
            self._handle.remove()
        watched = network.gating if isinstance(network, DeepMoE) else network
        self._handle = watched.register_forward_hook(self._tally)
        self._network = network
        self._tables = {}

    def _start(self, runner: Any) -> None:
        self._tally.passes.clear()
        self._sums.zero_()
        self._kept.clear()
        backends = runner.visualizer._vis_backends.values() if is_main_process() else ()
        self._backends = [b for b in backends if isinstance(b, TensorboardVisBackend | WandbVisBackend)]

    def _add(self, num_images: int) -> None:
        if self._backends and isinstance(self._network, DeepMoE):
            self._kept += [kept.cpu() for _, kept in self._tally.passes]
        self._sums += self._take(num_images)

    def _take(self, num_images: int | None) -> Tensor:
        """Experts kept, experts there, MACs and images of the passes since the last call, shape (4,)."""
        assert self._network is not None
        sums = torch.zeros(4, dtype=torch.float64)
        for size, kept in self._tally.passes:
            if size not in self._tables:
                self._tables[size] = MacsTable(self._network, size)
            macs = self._tables[size].by_module(kept).sum()
            images = len(kept) if num_images is None else 0
            sums += torch.tensor([int(kept.sum()), kept.numel(), float(macs), images], dtype=torch.float64)
        self._tally.passes.clear()
        sums[3] += num_images or 0
        return sums

    @staticmethod
    def _averages(sums: Tensor) -> dict[str, float]:
        kept, experts, macs, images = sums.tolist()
        averages = {'kept_experts': kept / experts} if experts else {}
        return {**averages, 'gmacs': macs / images / 1e9} if images else averages

    def _finish(self, runner: Any, mode: str, metrics: dict[str, float] | None) -> dict[str, float]:
        all_reduce(self._sums)
        averages = self._averages(self._sums)
        for name, value in averages.items():
            runner.message_hub.update_scalar(f'{mode}/{name}', value)
        self._show(runner, f'{mode}_gates/')
        if metrics is not None:
            metrics.update(averages)
        return averages

    def _show(self, runner: Any, prefix: str) -> None:
        if not self._kept:
            return
        assert isinstance(self._network, DeepMoE)
        stats = join_kept(self._network, self._kept)
        self._kept.clear()
        loop = runner._train_loop  # `runner.iter` would build it, with the data of training, for a mere test
        step = loop.iter if isinstance(loop, BaseLoop) else 0
        for backend in self._backends:
            if isinstance(backend, TensorboardVisBackend):
                stats.log_to(backend.experiment, step, prefix)
            else:
                row = _WandbRow(backend.experiment)
                stats.log_to(row, step, prefix)
                backend.add_scalars(row)
