"""What DeepMoE networks of all families share: gates, terms of the loss, freezing."""

from typing import Any

from timm.layers import get_norm_layer
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from .activation import GatedActivation
from .checkpoints import adapt_checkpoint
from .experts import GatedNetwork, deepmoe_networks, expert_widths, find_deepmoe
from .gating import GatingConfig, GatingNetwork, GatingRecord
from .gating.watch import GateWatch
from .losses import gating_loss
from .macs import MacsTable
from .terms import Criterion, Passes, Terms, TermSource

__all__ = ['DeepMoE', 'deepmoe_networks', 'find_deepmoe', 'freeze_gating', 'unfreeze_gating']


class DeepMoE(GatedNetwork, TermSource):
    """Mixin that adds a gating network to a base network of timm; comes before it in the bases.

    The base network keeps timm's state-dict keys; everything new lives under `gating.`. It sets `in_chans`,
    `num_classes` and `expert_layers`.
    """

    in_chans: int
    num_classes: int

    def add_gating(self, config: GatingConfig, min_size: int, kwargs: dict[str, Any]) -> None:
        """Gate the activations of `expert_layers`; call it when the base network is complete.

        Args:
            config: arguments of the gating network.
            min_size: smallest image side in pixels that the network accepts.
            kwargs: the base network's arguments, of which norm layer, device and dtype hold for the gating network too.

        Raises:
            ValueError: `experts_per_gate` does not divide the width of a layer; the message names it.
        """
        layers = self.expert_layers
        widths = expert_widths(self, layers)
        for layer, width in zip(layers, widths, strict=True):
            if width % config.experts_per_gate:
                raise ValueError(
                    f'{layer.conv} has {width} experts, which experts_per_gate={config.experts_per_gate} does not '
                    f'divide: choose a divisor of {width}, or a `widen` that makes it a multiple.'
                )
        for layer in layers:
            channels_last = isinstance(self.get_submodule(layer.conv), nn.Linear)
            gated = GatedActivation(self.get_submodule(layer.act), channels_last, config.has_target)
            self.set_submodule(layer.act, gated)
        gating = GatingNetwork(
            config,
            widths,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            min_size=min_size,
            norm_layer=get_norm_layer(kwargs.get('norm_layer') or nn.BatchNorm2d),
            device=kwargs.get('device'),
            dtype=kwargs.get('dtype'),
        )
        # Hosts take the last parameters for the classifier's and give images to the first module, so that the gating
        # network must be neither: it follows the first part of the base network that has gates.
        first = layers[0].conv.partition('.')[0]
        children = list(self.named_children())
        for name, _ in children:
            del self._modules[name]
        for name, child in children:
            self._modules[name] = child
            if name == first:
                self.gating = gating
        self._table: MacsTable | None = None
        self.watch = GateWatch()
        self.register_load_state_dict_pre_hook(adapt_checkpoint)

    def keep_first_experts(self, num_layers: int) -> None:
        """Forget the gated layers after the first `num_layers`, and the consumers, that have been pruned away."""
        present = {name for name, _ in self.named_modules()}
        self.expert_layers = tuple(
            layer if layer.consumer in present else layer._replace(consumer='')
            for layer in self.expert_layers[:num_layers]
        )
        self.gating.keep_first(num_layers)
        self._table = None

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone: it would close gates that the loss wants kept."""
        return {'gating.gates.weight'}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for layer decay: the gating network trains at the rate of the last group.

        That is the classifier's. Without one, the gating network joins the last part of the base network, so that no
        group is added, which would lower the rates of all others.
        """
        matcher = super().group_matcher(coarse)  # type: ignore[misc] # of the base network
        if any(name.startswith(('fc.', 'head.', 'pre_logits.')) for name, _ in self.named_parameters()):
            return matcher
        return {**matcher, 'gating': [(r'^gating\.', MATCH_PREV_GROUP)]}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """Replace the classifier, and the embedding's where the model has `L_e`."""
        super().reset_classifier(num_classes, global_pool, **kwargs)  # type: ignore[misc] # of the base network
        self.gating.reset_classifier(num_classes)
        self._table = None

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers (and their gates) that no feature in `indices` needs; see timm's networks.

        The embedding classifier stays: `L_e` does not need the classifier of the base network.
        """
        class_scores = self.gating.class_scores
        take_indices = super().prune_intermediate_layers(  # type: ignore[misc] # of the base network
            indices, prune_norm, prune_head
        )
        self.gating.class_scores = class_scores
        present = {name for name, _ in self.named_modules()}
        self.keep_first_experts(sum(layer.conv in present for layer in self.expert_layers))
        return take_indices

    @property
    def passes(self) -> Passes:
        """What the training passes of the gating network left."""
        return self.gating.passes

    @property
    def expects_terms(self) -> bool:
        """Whether the gating network trains and has gates."""
        return self.gating.training and bool(self.gating.gates.widths)

    def check_terms(self) -> None:
        """Refuse a `target_macs` below what the layers without gates cost.

        Raises:
            ValueError: names the cost of these layers.
        """
        if self.gating.budget is not None and self.gating.budget_on_macs:
            self.check_target(self.gating.budget.target)

    def terms(self, record: GatingRecord, target: Any, criterion: Criterion | None) -> Terms:
        """The terms `lambda * L_g` and `mu * L_e` of one pass, and the fraction of experts kept."""
        gating = self.gating
        settings = f'it is {gating.gate_loss_weight:g}, with gate_norm={gating.gate_norm!r}'
        self.watch.see(
            # Not the threshold drawn for this step: it makes experts come and go whatever the image.
            record.preact.detach() > gating.gates.threshold,
            settings,
            recovers=gating.budget is not None and not gating.frozen,
        )
        return gating_loss(gating, record, target, criterion, self._macs)

    def finish_training(self) -> None:
        """Warn if the gates turned out not to look at the image."""
        self.watch.finish()

    def check_target(self, target: float) -> None:
        """Raise ValueError for a fraction of the dense MACs below what the layers without gates cost."""
        self._macs().check_target(target)

    def spent(self, kept: Tensor) -> Tensor:
        """Fraction of the dense MACs that each image costs, of the experts that it keeps."""
        return self._macs().spent(kept)

    def macs_of_experts(self) -> Tensor:
        """Share of each expert in the dense MACs of the gated layers."""
        return self._macs().expert_costs()

    def _macs(self) -> MacsTable:
        """MACs at the nominal image size: only ratios matter, and they hardly change with it."""
        if self._table is None:
            size = getattr(self, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
            self._table = MacsTable(self, (size[1], size[2]))
        return self._table


def freeze_gating(module: nn.Module) -> None:
    """Start stage 2 (Procedure 1): no gating parameter or norm statistic changes any more, both loss weights are 0.

    Create the optimizer afterwards, or after `unfreeze_gating`, so that it holds the right parameters.

    Raises:
        ValueError: `module` holds no DeepMoE network.
    """
    for network in list(deepmoe_networks(module)) or [find_deepmoe(module)]:
        network.gating.freeze()


def unfreeze_gating(module: nn.Module) -> None:
    """Undo `freeze_gating`.

    Raises:
        ValueError: `module` holds no DeepMoE network.
    """
    for network in list(deepmoe_networks(module)) or [find_deepmoe(module)]:
        network.gating.unfreeze()
