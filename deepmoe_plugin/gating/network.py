"""The gating network (section 3.3): the gates of all layers from the image, before the base network runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..specialisation import SpecialisationConfig
from ..terms import Passes
from ..tracing import is_traced
from .budget import GateBudget
from .config import GatingConfig
from .curve import BudgetCurve
from .embedding import ShallowEmbedding
from .frozen import freeze_norms, unfreeze_norms
from .heads import GateHeads
from .norm_curve import NormCurve


class GatingRecord(NamedTuple):
    """What one training forward pass leaves for its loss.

    Attributes:
        preact: `W e`, shape (B, N), N the number of experts of all layers together.
        embed_logits: class logits of the embedding, shape (B, num_classes), or None without `L_e`.
        mixture: latent mixture weights, shape (B, K); its graph only with a loss of `SpecialisationConfig`.
        samples: what the similarity loss takes distances of, shape (B, ...), where it is asked for.
    """

    preact: Tensor
    embed_logits: Tensor | None
    mixture: Tensor
    samples: Tensor | None = None


@register_notrace_module
class GatingNetwork(nn.Module):
    """Computes the gates of all layers from the image, before the base network runs.

    Args:
        config: arguments of the gating network.
        widths: experts of each gated layer.
        in_chans: channels of the image.
        num_classes: classes of the embedding classifier (`L_e`); used only with `embed_loss_weight > 0`.
        min_size: smallest image side in pixels that the network accepts.
    """

    def __init__(
        self,
        config: GatingConfig,
        widths: Sequence[int],
        in_chans: int = 3,
        num_classes: int = 0,
        min_size: int = 1,
        norm_layer: Any = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.min_size = min_size
        self.gate_norm = config.gate_norm
        self.embed_loss_weight = config.embed_loss_weight
        weight = config.gate_loss_weight
        self.gate_loss_weight = (0.0 if config.has_target else 1.0) if weight is None else weight
        self.specialisation: SpecialisationConfig = config
        self.similarity_of = config.similarity_of
        self.budget_on_macs = config.target_macs is not None
        self.frozen = False
        self.embedding: Any = ShallowEmbedding(
            in_chans, config.embedding_channels, config.num_latent_experts, norm_layer=norm_layer, **dd
        )
        self.gates = GateHeads(widths, config.num_latent_experts, config.experts_per_gate, **dd)
        self.class_scores: nn.Linear | None = None
        if config.embed_loss_weight > 0 and num_classes < 1:
            raise ValueError(
                f'embed_loss_weight={config.embed_loss_weight} trains a classifier on the embedding, but '
                f'num_classes={num_classes}: set num_classes, or embed_loss_weight=0.'
            )
        self.reset_classifier(num_classes)
        target = config.target_macs if self.budget_on_macs else config.target_kept
        self.budget = None if target is None else GateBudget(target, config.target_steps, device)
        self.curve = BudgetCurve(**dd)
        self.norm_curve = NormCurve()
        self.passes = Passes()
        if config.freeze_gating:
            self.freeze()

    def reset_classifier(self, num_classes: int) -> None:
        """Make the embedding classifier predict `num_classes` classes; none without `L_e` or classes."""
        self.class_scores = None
        if self.embed_loss_weight > 0 and num_classes > 0 and self.gates.widths:
            weight = self.gates.weight
            self.class_scores = nn.Linear(weight.shape[1], num_classes, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, in_chans, H, W) to gates, one (B, C_l) for each gated layer, non-negative, float32.

        Raises:
            ValueError: the images have the wrong shape, channels, type or size, or are not finite.
        """
        return self.gates.split(self.packed_gates(x))

    def packed_gates(self, x: Tensor) -> Tensor:
        """The gates of all layers side by side, shape (B, N)."""
        checked = not is_traced(x)
        if checked:
            self.check_images(x)
            self._stay_frozen()
        if not self.gates.widths:
            return x.new_zeros((x.shape[0], 0))
        samples = None
        if self.training and self.specialisation.needs_samples and self.similarity_of == 'features':
            samples = self.embedding.pool(x)
            mixture = self.embedding.mix(samples)
        else:
            mixture = self.embedding(x)
        preact = self.gates(mixture)
        if checked:
            self._check_finite(mixture, preact)
        trains = self.budget is not None and self.training
        gates = self.gates.cut(preact, straight_through=trains, threshold=self.threshold)
        if (self.training or self.frozen) and self.passes.wanted(x):
            return self.passes.leave(self._record(mixture, preact, x if samples is None else samples), gates)
        return gates

    @property
    def threshold(self) -> Tensor:
        """Above which a gate is kept: of a range of targets, another one in each training step."""
        drawn = self.budget.drawn if self.budget is not None and self.training else None
        return self.gates.threshold if drawn is None else drawn

    def keep_first(self, num_layers: int) -> None:
        """Drop the gates of all layers but the first `num_layers`, and the embedding if none is left."""
        self.gates.keep_first(num_layers)
        self.forget_budgets()
        if not self.gates.widths:
            self.embedding = nn.Identity()
            self.class_scores = None

    def forget_budgets(self) -> None:
        """Mark both curves as not measured: the experts are others now."""
        self.curve.forget()
        self.norm_curve.forget()

    def _record(self, mixture: Tensor, preact: Tensor, samples: Tensor) -> GatingRecord:
        specialisation = self.specialisation
        return GatingRecord(
            preact,
            self.class_logits(mixture),
            mixture if specialisation.active else mixture.detach(),
            samples.detach() if specialisation.needs_samples else None,
        )

    def class_logits(self, mixture: Tensor) -> Tensor | None:
        """Map mixture weights (B, K) to what the embedding classifier makes of them, (B, num_classes); None without."""
        if self.class_scores is None:
            return None
        # Mixture weights average 1/K; scaled to average 1 they train the classifier at ordinary learning rates.
        scaled = mixture * mixture.shape[1]
        return self.class_scores(scaled.to(self.class_scores.weight.dtype))

    def freeze(self) -> None:
        """Stop training every gating parameter and statistic; `train()` does not undo it."""
        self.frozen = True
        self.requires_grad_(False)
        freeze_norms(self)
        self.eval()

    def unfreeze(self) -> None:
        """Undo `freeze`."""
        self.frozen = False
        unfreeze_norms(self)
        self.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> 'GatingNetwork':
        """Switch to training mode, unless frozen: then the norm statistics must not move either."""
        self._stay_frozen()
        return super().train(mode and not self.frozen)

    def _stay_frozen(self) -> None:
        # Hosts that unfreeze a backbone after some epochs set this on all of its parameters.
        if self.frozen:
            for parameter in self.parameters():
                if parameter.requires_grad and isinstance(parameter, nn.Parameter):  # not what torch.func puts there
                    parameter.requires_grad_(False)

    def check_images(self, x: Any) -> None:
        """Check that images are what the network takes.

        Raises:
            TypeError: they are no tensor.
            ValueError: they have the wrong shape, channels, type or size.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f'Expected images as a tensor, got a {type(x).__name__}: use torch.as_tensor.')
        if x.ndim != 4:
            raise ValueError(f'Expected images of shape (batch, {self.in_chans}, height, width), got {tuple(x.shape)}.')
        if x.shape[1] != self.in_chans:
            raise ValueError(
                f'Expected images with {self.in_chans} channels (in_chans), got {x.shape[1]}: '
                f'convert the images or create the model with in_chans={x.shape[1]}.'
            )
        if not x.is_floating_point():
            raise ValueError(f'Expected floating-point images, got {x.dtype}: scale and normalise them first.')
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f'Expected images of at least {self.min_size}x{self.min_size} pixels, '
                f'got {x.shape[2]}x{x.shape[3]}: resize them.'
            )

    def _check_finite(self, mixture: Tensor, preact: Tensor) -> None:
        # On an accelerator this would stop the host at every step, so it runs where looking costs nothing.
        if preact.device.type != 'cpu':
            return
        finite = preact.isfinite().all(dim=1)
        if not finite.all():
            if mixture.isfinite().all():
                raise ValueError(
                    'gating.gates.weight is not finite: the checkpoint is damaged, or training has diverged (lower the '
                    'learning rate).'
                )
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f'The latent mixture weights of image(s) {bad} in the batch are not finite: the images hold NaN or '
                'infinite values, or training has diverged (lower the learning rate).'
            )
