"""What the gates keep and what images cost, in the log of training, validation and testing."""

import dataclasses
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from mmengine.visualization import TensorboardVisBackend, WandbVisBackend
from torch import Tensor, nn

from ...information import gate_entropy, use_entropy
from ...macs import MacsTable
from ...network import DeepMoE, deepmoe_networks
from ...stats import dynamic_share, join_kept
from ..backbones import Backbone
from .lookup import model_of, network_of


class _Tally:
    """Forward hook of a gating network (or of a dense backbone): remembers what each pass keeps, at which size."""

    def __init__(self) -> None:
        self.passes: list[tuple[tuple[int, int], Tensor]] = []
        self.mixtures: list[Tensor] = []

    def look_at_mixture(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """Forward hook of gate heads."""
        if not args[0].is_meta:
            self.mixtures.append(args[0].detach())

    def clear(self) -> None:
        self.passes.clear()
        self.mixtures.clear()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        (images,) = args
        if images.is_meta:  # the MAC counter is at work
            return
        gates = torch.cat(output, dim=1) if isinstance(output, list) else images.new_zeros(len(images), 0)
        self.passes.append(((images.shape[2], images.shape[3]), gates.detach() > 0))


@dataclasses.dataclass
class _Sums:
    """Over passes.

    Attributes:
        macs: MACs.
        images, seen: images, and images as the gates count them.
        times_kept: how many of the latter keep each expert, shape (N,).
        entropy: of the mixtures, in bits.
        mixture: the mixtures, shape (K,).
        missed, missed_right: pixels of classes that the embedding does not see, and those of them with the right label.
    """

    macs: float = 0
    images: int = 0
    seen: int = 0
    times_kept: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    entropy: float = 0
    mixture: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    missed: int = 0
    missed_right: int = 0

    def add(self, other: '_Sums') -> None:
        for name in ('macs', 'images', 'seen', 'entropy', 'missed', 'missed_right'):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ('times_kept', 'mixture'):
            own, others = getattr(self, name), getattr(other, name)
            setattr(self, name, own + others if len(own) and len(others) else own if len(own) else others)

    def of_all_processes(self) -> '_Sums':
        values = dataclasses.asdict(self)
        parts = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in values.values()]
        facts = torch.cat(parts)
        all_reduce(facts)
        found = dict(zip(values, facts.split([len(part) for part in parts]), strict=True))
        return _Sums(
            **{
                name: found[name].to(value.dtype) if isinstance(value, Tensor) else type(value)(found[name].item())
                for name, value in values.items()
            }
        )

    def averages(self) -> dict[str, float]:
        averages = {}
        if self.seen and len(self.times_kept):
            averages['kept_experts'] = self.times_kept.double().mean().item() / self.seen
            averages['dynamic_experts'] = dynamic_share(self.times_kept, self.seen).item()
            averages['gate_entropy'] = self.entropy / self.seen
            averages['use_entropy'] = use_entropy(self.mixture[None] / self.seen).item()
        if self.missed:
            averages['right_where_embedding_wrong'] = self.missed_right / self.missed
        return {**averages, 'gmacs': self.macs / self.images / 1e9} if self.images else averages


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
    """Logs `kept_experts` (fraction of experts kept, 0..1), `dynamic_experts` (fraction of experts that some images
    keep and others do not), the entropies of the latent mixture in bits (`gate_entropy` of each image's mixture,
    `use_entropy` of their mean) and `gmacs` (10^9 multiply-accumulates of an image).

    They are averages over the images of a training batch, or of all images validated or tested, processes together.
    `gmacs` is what the backbone costs, gating network included and decode heads not, as `count_macs` counts, at the
    size that the backbone sees; all windows or augmentations of an image add up. In `dynamic_experts` each counts as an
    image. A dense backbone has `gmacs` only.

    In validation and testing, a backbone with `embed_loss_weight > 0` also gets `right_where_embedding_wrong`: of the
    pixels whose class the embedding's classifier does not see in the image, the fraction that the network labels
    rightly. It is left out where the network runs more than once for an image.

    TensorBoard and W&B, if they are among the `vis_backends`, also get `kept_experts` of each layer and its histograms
    over images and over experts, in the sections `val_gates` and `test_gates`. These are of the images of the main
    process, and count each window or augmentation as an image.
    """

    def __init__(self) -> None:
        self._network: nn.Module | None = None
        self._tally = _Tally()
        self._handles: list[Any] = []
        self._tables: dict[tuple[int, int], MacsTable] = {}
        self._sums = _Sums()
        self._backends: list[Any] = []
        self._kept: list[Tensor] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log the batch, without what the loss hook logs."""
        sums = self._take(None)
        for name, value in sums.averages().items():
            if name not in (outputs or {}):
                runner.message_hub.update_scalar(f'train/{name}', value)

    def _before_epoch(self, runner: Any, mode: str = 'train') -> None:
        """Start anew."""
        if mode != 'train':
            self._start(runner)

    def _after_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = 'train'
    ) -> None:
        """Add the batch."""
        if mode != 'train':
            self._add(outputs)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Log the epoch; mmengine's logger shows it to the visualizer."""
        self._finish(runner, 'val', metrics)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Log the epoch, to the visualizer too, which mmengine's logger leaves out."""
        averages = self._finish(runner, 'test', metrics)
        runner.visualizer.add_scalars({f'test/{name}': value for name, value in averages.items()})

    def before_train(self, runner: Any) -> None:
        """Watch the gates of the model.

        Raises:
            ValueError: the model holds no backbone of this package or several.
        """
        model = model_of(runner)
        dense = [m for m in model.modules() if isinstance(m, Backbone) and not isinstance(m, DeepMoE)]
        found = len(dense) == 1 and not any(True for _ in deepmoe_networks(model))
        network: nn.Module = dense[0] if found else network_of(runner, self)
        if network is self._network:
            return
        for handle in self._handles:
            handle.remove()
        watched = network.gating if isinstance(network, DeepMoE) else network
        self._handles = [watched.register_forward_hook(self._tally)]
        if isinstance(network, DeepMoE):
            self._handles.append(network.gating.gates.register_forward_hook(self._tally.look_at_mixture))
        self._network = network
        self._tables = {}

    before_val = before_test = before_train

    def _start(self, runner: Any) -> None:
        self._tally.clear()
        self._sums = _Sums()
        if isinstance(self._network, DeepMoE):  # a process without images adds up with the others
            gates = self._network.gating.gates
            self._sums.times_kept = torch.zeros(sum(gates.widths), dtype=torch.long)
            self._sums.mixture = torch.zeros(gates.weight.shape[1], dtype=torch.float64)
        self._kept.clear()
        backends = runner.visualizer._vis_backends.values() if is_main_process() else ()
        self._backends = [b for b in backends if isinstance(b, TensorboardVisBackend | WandbVisBackend)]

    def _add(self, outputs: Any) -> None:
        if self._backends and isinstance(self._network, DeepMoE):
            self._kept += [kept.cpu() for _, kept in self._tally.passes]
        self._sums.add(self._missed(outputs))
        self._sums.add(self._take(len(outputs)))

    @torch.no_grad()
    def _missed(self, outputs: Any) -> _Sums:
        """Pixels of classes that the embedding's classifier does not see, and how many of them are labelled rightly."""
        sums = _Sums()
        seen = sum(len(mixture) for mixture in self._tally.mixtures)
        if not isinstance(self._network, DeepMoE) or seen != len(outputs):
            return sums
        logits = self._network.gating.class_logits(torch.cat(self._tally.mixtures))
        if logits is None or not all('gt_sem_seg' in sample and 'pred_sem_seg' in sample for sample in outputs):
            return sums
        for sample, is_seen in zip(outputs, logits > 0, strict=True):
            truth = sample.gt_sem_seg.data.flatten().long().to(logits.device)
            found = sample.pred_sem_seg.data.flatten().to(logits.device)
            is_class = truth < logits.shape[1]  # what is ignored has a larger label
            missed = is_class & ~is_seen[truth.clamp(max=logits.shape[1] - 1)]
            sums.missed += int(missed.sum())
            sums.missed_right += int((found == truth)[missed].sum())
        return sums

    def _take(self, num_images: int | None) -> _Sums:
        """Of the passes since the last call; their images are counted where their number is not given."""
        assert self._network is not None
        sums = _Sums()
        for size, kept in self._tally.passes:
            if size not in self._tables:
                self._tables[size] = MacsTable(self._network, size)
            macs = self._tables[size].by_module(kept).sum()
            sums.add(_Sums(float(macs), len(kept) if num_images is None else 0, len(kept), kept.sum(0).cpu()))
        for mixture in self._tally.mixtures:
            sums.entropy += gate_entropy(mixture).item() * len(mixture)
            total = mixture.double().sum(0).cpu()
            sums.mixture = sums.mixture + total if len(sums.mixture) else total
        self._tally.clear()
        sums.images += num_images or 0
        return sums

    def _finish(self, runner: Any, mode: str, metrics: dict[str, float] | None) -> dict[str, float]:
        averages = self._sums.of_all_processes().averages()
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
