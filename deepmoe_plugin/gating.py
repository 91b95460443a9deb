"""The gating network of DeepMoE (section 3.3): shallow embedding, gate heads, and what training needs of them."""

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, List, Literal, NamedTuple, Optional  # noqa: UP035 (TorchScript reads these)

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .experts import check_number
from .frozen import freeze_norms, unfreeze_norms

_logger = logging.getLogger(__name__)

GATE_NORMS = ('mean', 'sum', 'macs')
GateNorm = Literal['mean', 'sum', 'macs']


@dataclasses.dataclass(frozen=True)
class GatingConfig:
    """Arguments of the gating network; every DeepMoE model takes them as keyword arguments.

    Raises:
        ValueError: an argument is out of range or contradicts another one; the message names it.
    """

    num_latent_experts: int = 64
    """K, length of the latent mixture weights `e`."""
    gate_loss_weight: float | None = None
    """lambda of Eq. 7; 1 by default, 0 when gating is frozen. With a target: its initial value, by default one that
    moves a gate by 1 in about 300 steps of SGD (learning rate 0.1, momentum 0.9), whatever the size of the network."""
    embed_loss_weight: float = 0.0
    """mu of Eq. 7; 0 creates no embedding classifier (paper: 1 for CIFAR, 0 for ImageNet)."""
    gate_norm: GateNorm = 'mean'
    """L_g: 'mean' over all gates, 'sum' per image (Eq. 8 to the letter), 'macs' weighs an expert by its MACs."""
    target_kept: float | None = None
    """Fraction of experts to keep on average; lambda then adjusts itself during training."""
    target_macs: float | None = None
    """Fraction of the base network's dense MACs to spend on average; lambda then adjusts itself."""
    freeze_gating: bool = False
    """Stage 2 of Procedure 1: gates stay as loaded, norm statistics included; both weights are 0."""
    embedding_channels: Sequence[int] = (16, 32, 64, 128, 256)
    """Widths of the stride-2 layers of the shallow embedding."""

    def __post_init__(self) -> None:
        if not _is_width(self.num_latent_experts):
            raise ValueError(f'num_latent_experts must be a whole number >= 1, got {self.num_latent_experts!r}.')
        if not isinstance(self.freeze_gating, bool):
            raise ValueError(f'freeze_gating must be True or False, got {self.freeze_gating!r}.')
        if self.gate_norm not in GATE_NORMS:
            raise ValueError(f'gate_norm must be one of {", ".join(GATE_NORMS)}, got {self.gate_norm!r}.')
        for name in ('gate_loss_weight', 'embed_loss_weight'):
            value = getattr(self, name)
            if value is None:
                continue
            check_number(name, value)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f'{name} must be a finite number >= 0, got {value}.')
        for name in ('target_kept', 'target_macs'):
            value = getattr(self, name)
            if value is None:
                continue
            check_number(name, value)
            if not 0 < value < 1:
                raise ValueError(f'{name} must lie between 0 and 1 (a fraction), got {value}.')
        if self.target_kept is not None and self.target_macs is not None:
            raise ValueError('target_kept and target_macs contradict each other: give one of them.')
        if self.has_target and self.gate_loss_weight == 0:
            raise ValueError('gate_loss_weight must be > 0 with target_kept or target_macs: it is where lambda starts.')
        channels = self.embedding_channels
        if not isinstance(channels, Sequence) or not channels or not all(_is_width(width) for width in channels):
            raise ValueError(f'embedding_channels must be a list of whole numbers >= 1, got {channels!r}.')
        if self.freeze_gating and (self.gate_loss_weight or self.embed_loss_weight or self.has_target):
            raise ValueError(
                'freeze_gating=True leaves nothing for gate_loss_weight, embed_loss_weight, target_kept or '
                'target_macs to train: set them to 0 or leave them out.'
            )

    @property
    def has_target(self) -> bool:
        return self.target_kept is not None or self.target_macs is not None

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> 'GatingConfig':
        """Take this class's arguments out of a model's keyword arguments."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: kwargs.pop(name) for name in names if name in kwargs})


def _default_weight(config: GatingConfig, widths: Sequence[int]) -> float:
    """lambda where none is given.

    One step of SGD at learning rate r and momentum 0.9 moves a gate by about 10 r lambda / (N K): its share in the
    mean over N gates is 1/N, and the squares of K even mixture weights sum to 1/K.
    """
    if not config.has_target:
        return 1.0
    return config.num_latent_experts / 300 * (1 if config.gate_norm == 'sum' else sum(widths))


def _is_width(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


class GatingRecord(NamedTuple):
    """What one training forward pass leaves for its loss.

    Attributes:
        preact: `W e` before the ReLU, shape (B, N), N the number of experts of all layers together; with a target,
            without gradient to `e`.
        embed_logits: class logits of the embedding, shape (B, num_classes), or None without `L_e`.
    """

    preact: Tensor
    embed_logits: Tensor | None


class ShallowEmbedding(nn.Module):
    """Image to latent mixture weights: stride-2 3x3 conv-norm-ReLU layers, global average pool, linear, softmax."""

    def __init__(
        self,
        in_chans: int,
        channels: Sequence[int],
        num_latent_experts: int,
        norm_layer: Any = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        layers = []
        for width_in, width in zip([in_chans, *channels[:-1]], channels, strict=True):
            conv = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False, **dd)
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            layer = OrderedDict(conv=conv, norm=norm_layer(width, **dd), act=nn.ReLU(inplace=True))
            layers.append(nn.Sequential(layer))
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels[-1], num_latent_experts, **dd)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to latent mixture weights (B, K), positive and summing to one."""
        x = self.fc(self.layers(x).mean(dim=(2, 3)))
        return x.softmax(dim=1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


class GateHeads(nn.Module):
    """One linear gate head per gated layer, kept as rows of a single matrix so that all gates cost one product.

    `weight` has shape (N, K): the rows of gated layer l follow those of layer l - 1. Rows start at random around one,
    with a mean of exactly one; as the embedding starts at the even mixture, 1/K for every image, all gates then are one
    and the network is its dense base. The spread lets the experts part ways as soon as the mixtures of images do:
    from equal rows, the L1 norm drives all gates shut at once, and no gradient reaches the embedding.

    Args:
        widths: experts of each gated layer, in the order in which the network runs them.
    """

    def __init__(self, widths: Sequence[int], num_latent_experts: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.widths: List[int] = [int(width) for width in widths]  # noqa: UP006
        # Steps of 1/64, in pairs of opposite sign, add up to zero without rounding, in bfloat16 too.
        spread = torch.randn(sum(self.widths), num_latent_experts // 2, device=device, dtype=torch.float32)
        spread = (spread / 2).clamp(-1, 1).mul(64).round() / 64
        spread = torch.cat([spread, -spread, spread.new_zeros(len(spread), num_latent_experts % 2)], dim=1)
        spread = spread.gather(1, torch.rand_like(spread).argsort(dim=1))
        self.weight = nn.Parameter((1 + spread).to(dtype or torch.get_default_dtype()))

    def forward(self, mixture: Tensor) -> Tensor:
        """Map mixture weights (B, K) to `W e`, shape (B, N), at least in float32 whatever autocast says."""
        weight = self.weight.to(mixture.dtype)
        if torch.jit.is_scripting():
            return F.linear(mixture, weight)
        if not torch.amp.is_autocast_available(mixture.device.type):
            return F.linear(mixture, weight)
        with torch.autocast(mixture.device.type, enabled=False):
            return F.linear(mixture, weight)

    def split(self, packed: Tensor) -> List[Tensor]:  # noqa: UP006
        """Cut (B, N) into one (B, C_l) for each gated layer."""
        return list(packed.split(self.widths, dim=1))

    def keep_first(self, num_layers: int) -> None:
        """Drop the heads of all gated layers but the first `num_layers`; without any, `weight` is no parameter."""
        self.widths = self.widths[:num_layers]
        weight = self.weight.detach()[: sum(self.widths)].clone()
        if self.widths:
            self.weight = nn.Parameter(weight, self.weight.requires_grad)
        else:
            del self.weight
            self.register_buffer('weight', weight)


class GateBudget(nn.Module):
    """Steers lambda so that the average cost (kept experts or MACs) settles at a target.

    The cost itself says nothing before the first gate reaches zero, and then most follow at once. What lambda answers
    to is the distance that gates still have to go: the threshold t at which experts with a gate above t would cost
    just the target. Gates move at a speed proportional to lambda, so with lambda proportional to t they approach the
    target and slow down on the way; below the target t and lambda are negative, and the gates above t, closed ones
    included, are to be lifted again. The factor, `strength`, finds its own scale: it grows while the running average
    of the error in cost is outside the tolerance, and shrinks each time that average changes sign after having been
    outside. All of it is saved with the model.

    Args:
        target: fraction to settle at.
        strength: the factor to start with.
    """

    growth = 0.01
    shrink = 0.7
    tolerance = 0.01
    momentum = 0.95
    bisections = 12
    sample = 16  # images that the threshold is found on

    def __init__(self, target: float, strength: float, device: Any = None) -> None:
        super().__init__()
        self.target = target
        self.strength: Tensor
        self.error: Tensor
        self.peak: Tensor
        self.register_buffer('strength', torch.tensor(float(strength), device=device))
        self.register_buffer('error', torch.tensor(0.0, device=device))
        self.register_buffer('peak', torch.tensor(0.0, device=device))

    @torch.no_grad()
    def step(self, preact: Tensor, cost: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Look at one batch.

        Args:
            preact: gates before their ReLU, shape (B, N).
            cost: maps the experts that images keep (B, N, boolean) to the fraction that each image spends (B,).

        Returns:
            lambda, a scalar, signed, and the threshold t, -inf where no gate is near enough to spend the target.
        """
        error = (_average(cost(preact > 0)) - self.target).to(self.strength.dtype)
        average = torch.lerp(error, self.error, self.momentum)
        crossed = average * self.error < 0
        overshot = crossed & (self.peak > 2 * self.tolerance)
        self.strength.mul_(torch.where(overshot, self.shrink, 1.0))
        self.strength.mul_(torch.where(average.abs() > self.tolerance, 1 + self.growth, 1.0))
        self.peak.copy_(torch.where(crossed, average.abs(), torch.maximum(self.peak, average.abs())))
        self.error.copy_(average)
        distance = self._distance(preact[: self.sample], cost)
        return self.strength * distance, torch.where(distance < -0.99, -torch.inf, distance)

    def _distance(self, preact: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
        """The threshold at which the target is spent, at most 1 either way; found without leaving the device."""
        low, high = self.strength.new_tensor([-1.0, 1.0])
        for _ in range(self.bisections):
            middle = (low + high) / 2
            too_much = _average(cost(preact > middle)) > self.target
            low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        return (low + high) / 2


def _average(values: Tensor) -> Tensor:
    """Mean over a batch, that of all processes."""
    mean = values.mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


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
        self.gate_loss_weight = _default_weight(config, widths)
        if config.gate_loss_weight is not None:
            self.gate_loss_weight = config.gate_loss_weight
        self.budget_on_macs = config.target_macs is not None
        self.frozen = False
        self.embedding: nn.Module = ShallowEmbedding(
            in_chans, config.embedding_channels, config.num_latent_experts, norm_layer=norm_layer, **dd
        )
        self.heads = GateHeads(widths, config.num_latent_experts, **dd)
        self.classifier: Optional[nn.Linear] = None  # noqa: UP045
        if config.embed_loss_weight > 0 and num_classes < 1:
            raise ValueError(
                f'embed_loss_weight={config.embed_loss_weight} trains a classifier on the embedding, but '
                f'num_classes={num_classes}: set num_classes, or embed_loss_weight=0.'
            )
        self.reset_classifier(num_classes)
        target = config.target_macs if self.budget_on_macs else config.target_kept
        self.budget = None if target is None else GateBudget(target, self.gate_loss_weight, device)
        self._record: GatingRecord | None = None
        if config.freeze_gating:
            self.freeze()

    @torch.jit.unused
    def reset_classifier(self, num_classes: int) -> None:
        """Make the embedding classifier predict `num_classes` classes; none without `L_e` or classes."""
        self.classifier = None
        if self.embed_loss_weight > 0 and num_classes > 0 and self.heads.widths:
            weight = self.heads.weight
            self.classifier = nn.Linear(weight.shape[1], num_classes, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> List[Tensor]:  # noqa: UP006
        """Map images (B, in_chans, H, W) to gates, one (B, C_l) for each gated layer, non-negative, float32.

        Raises:
            ValueError: the images have the wrong shape, channels, type or size, or are not finite.
        """
        return self.heads.split(self.packed_gates(x))

    def packed_gates(self, x: Tensor) -> Tensor:
        """The gates of all layers side by side, shape (B, N)."""
        if not torch.jit.is_scripting():
            self._check_images(x)
            self._stay_frozen()
        if len(self.heads.widths) == 0:
            return x.new_zeros((x.shape[0], 0))
        mixture = self.embedding(x)
        if not torch.jit.is_scripting():
            self._check_finite(mixture)
        preact = self.heads(mixture)
        if not torch.jit.is_scripting():
            self._leave_record(mixture, preact)
        return preact.relu()

    @torch.jit.unused
    def keep_first(self, num_layers: int) -> None:
        """Drop the gates of all layers but the first `num_layers`, and the embedding if none is left."""
        self.heads.keep_first(num_layers)
        if not self.heads.widths:
            self.embedding = nn.Identity()
            self.classifier = None

    @torch.jit.unused
    def _leave_record(self, mixture: Tensor, preact: Tensor) -> None:
        if not (self.training or self.frozen) or not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return
        if self.budget is not None:
            # A lambda as large as a target may ask for would drive the mixture to its cheapest latent expert, the
            # same for every image: towards a target, L_g trains the gate heads and leaves the embedding alone.
            preact = self.heads(mixture.detach())
        logits = None
        if self.classifier is not None:
            # Mixture weights average 1/K; scaled to average 1 they train the classifier at ordinary learning rates.
            scaled = mixture * mixture.shape[1]
            logits = self.classifier(scaled.to(self.classifier.weight.dtype))
        self._record = GatingRecord(preact, logits)

    @torch.jit.unused
    def take_record(self) -> GatingRecord | None:
        """Hand over what the last training forward pass left, at most once; None without one."""
        record, self._record = self._record, None
        return record

    def __getstate__(self) -> dict[str, Any]:
        # A copy (EMA, deepcopy, pickle) starts without a pending record: its graph belongs to this module.
        return {**self.__dict__, '_record': None}

    @torch.jit.unused
    def freeze(self) -> None:
        """Stop training every gating parameter and statistic, whatever `train()` is told later."""
        self.frozen = True
        self.requires_grad_(False)
        freeze_norms(self)
        self.eval()

    @torch.jit.unused
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

    @torch.jit.unused
    def _stay_frozen(self) -> None:
        # Hosts that unfreeze a backbone after some epochs set this on all of its parameters.
        if self.frozen and not torch.compiler.is_compiling():
            for parameter in self.parameters():
                if parameter.requires_grad and isinstance(parameter, nn.Parameter):  # not what torch.func puts there
                    parameter.requires_grad_(False)

    @torch.jit.unused
    def _check_images(self, x: Tensor) -> None:
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

    @torch.jit.unused
    def _check_finite(self, mixture: Tensor) -> None:
        # On an accelerator this would stop the host at every step, so it runs where looking costs nothing.
        if mixture.device.type != 'cpu' or torch.compiler.is_compiling():
            return
        finite = mixture.isfinite().all(dim=1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f'The latent mixture weights of image(s) {bad} in the batch are not finite: the images hold NaN or '
                'infinite values, or training has diverged (lower the learning rate).'
            )
