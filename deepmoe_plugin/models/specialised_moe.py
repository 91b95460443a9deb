"""Mixtures of convolutional experts with a softmax or an attentive gate (Krishnamurthy, Watkins, Gaertner 2023)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_whole
from ..checkpoints import build_with_checks
from ..mixture import Mixture, MixtureRecord, image_size, refuse_checkpointing, refuse_pooling
from ..specialisation import SpecialisationConfig
from ..tracing import at_least_float32, is_symbolic
from .registration import CIFAR, Network, register_networks

Gate = Literal['softmax', 'attentive']
GATES = ('softmax', 'attentive')
Distilled = Literal['output', 'gate']
DISTILLED = ('output', 'gate')
Features = tuple[Tensor, Tensor]


class Sizes(NamedTuple):
    """Sizes of a network up to its last hidden layer.

    Attributes:
        channels: outputs of each 3x3 convolution, which ReLU and 2x2 max pooling follow.
        hidden: outputs of each linear layer; ReLU between them, none after the last.
        norms: which convolutions, counted from 0, a batch norm follows, before the ReLU.
        padding: of the convolutions.
    """

    channels: Sequence[int]
    hidden: Sequence[int]
    norms: Sequence[int] = ()
    padding: int = 0


class Branch(nn.Module):
    """An expert, or the network of a gate: `start` is the first convolution with ReLU and pooling, `trunk` the rest up
    to the last hidden layer before its ReLU, `head` what reads that layer.

    Args:
        outputs: of the head; 0 for none.
    """

    def __init__(self, sizes: Sizes, in_chans: int, img_size: tuple[int, int], outputs: int, **dd: Any) -> None:
        super().__init__()
        stages: list[nn.Sequential] = []
        height, width = img_size
        for i, channels in enumerate(sizes.channels):
            norm = [nn.BatchNorm2d(channels, **dd)] if i in sizes.norms else []
            conv = nn.Conv2d(in_chans, channels, 3, padding=sizes.padding, **dd)
            stages.append(nn.Sequential(conv, *norm, nn.ReLU(), nn.MaxPool2d(2)))
            height, width = ((side + 2 * sizes.padding - 2) // 2 for side in (height, width))
            in_chans = channels
        if height < 1 or width < 1:
            raise ValueError(f'img_size={img_size} is too small for {len(sizes.channels)} convolutions with pooling.')
        self.start = stages[0]
        layers: list[nn.Module] = [*stages[1:], nn.Flatten()]
        features = in_chans * height * width
        for i, hidden in enumerate(sizes.hidden):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Linear(features, hidden, **dd))
            features = hidden
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(features, outputs, **dd) if outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the hidden vectors (B, h)."""
        return self.trunk(self.start(x))


def start_together(branches: Sequence[Branch], x: Tensor) -> list[Tensor]:
    """The starts of all branches on the same images (B, C, H, W).

    On grey images their convolutions are too small to run well one by one. Those without norm become one product: of
    the pixels that one output of the pooling sees, and of all kernels at the four places where it looks.
    """
    joined: list[Any] = [branch for branch in branches if x.shape[1] == 1 and len(branch.start) == 3]
    if not joined:
        return [branch.start(x) for branch in branches]
    convs = [branch.start[0] for branch in joined]
    kernels = torch.cat([conv.weight for conv in convs])
    bias = torch.cat([conv.bias for conv in convs])
    places = [F.pad(kernels, (dx, 1 - dx, dy, 1 - dy)) for dy in (0, 1) for dx in (0, 1)]
    seen = F.pad(x[:, 0], [convs[0].padding[0]] * 4).unfold(1, 4, 2).unfold(2, 4, 2)
    outputs = torch.stack(places, 1).flatten(2).flatten(0, 1) @ seen.permute(3, 4, 0, 1, 2).reshape(16, -1)
    outputs = F.relu(outputs.unflatten(0, (-1, 4)).amax(1) + bias[:, None])
    parts = outputs.unflatten(1, seen.shape[:3]).split([len(conv.weight) for conv in convs])
    pooled = dict(zip(joined, (part.transpose(0, 1) for part in parts), strict=True))
    return [pooled[branch] if branch in pooled else branch.start(x) for branch in branches]


class SoftmaxGate(Branch):
    """The original gate: a network of its own with one output for each expert."""

    def score(self, own: Tensor, hidden: Tensor) -> Tensor:
        """Map the hidden vectors of the gate (B, h) to one score for each expert, (B, experts)."""
        return self.head(F.relu(own))


class AttentiveGate(Branch):
    """Scores are (W_q g(x)) . (W_k h_e(x)) / sqrt(h): gradient flows into the experts."""

    def __init__(self, sizes: Sizes, in_chans: int, img_size: tuple[int, int], **dd: Any) -> None:
        super().__init__(sizes, in_chans, img_size, 0, **dd)
        features = sizes.hidden[-1]
        self.query = nn.Linear(features, features, bias=False, **dd)
        self.key = nn.Linear(features, features, bias=False, **dd)

    def score(self, own: Tensor, hidden: Tensor) -> Tensor:
        """Map the hidden vectors of the gate (B, h) and of the experts (B, experts, h) to scores (B, experts)."""
        return torch.einsum('bh,beh->be', self.query(own) / math.sqrt(self.query.in_features), self.key(hidden))


class SpecialisedMoE(Mixture):
    """y = sum_e p(e|x) softmax(logits_e(x)); the output is log y, so that cross-entropy of it is -log y.

    Features are the experts' last hidden vectors before the ReLU, and the gates. Without a classifier the output is the
    mixture of the hidden vectors after the ReLU (our choice).

    Args:
        expert, gate_sizes: of the experts and of the gate's network; their last hidden layers are equally wide.
        num_experts: 1 is the single network, without gate.
        gate: 'softmax' or 'attentive'.
        distilled: the experts, norm statistics included, stay as a checkpoint of the attentive gate has them, and an
            ordinary output layer takes the place of its attention: 'output' trains this layer alone, 'gate' the whole
            network of the gate.
        drop_rate: dropout before the experts' last layers.
        **kwargs: the arguments of `SpecialisationConfig`.

    Raises:
        ValueError: an argument is out of range or contradicts another; the message names it.
    """

    def __init__(
        self,
        expert: Sizes,
        gate_sizes: Sizes,
        num_experts: int = 5,
        gate: Gate = 'softmax',
        distilled: Distilled | None = None,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f'gate must be one of {", ".join(GATES)}, got {gate!r}.')
        if distilled not in (None, *DISTILLED):
            raise ValueError(f'distilled must be None or one of {", ".join(DISTILLED)}, got {distilled!r}.')
        if distilled and (gate != 'softmax' or num_experts == 1):
            raise ValueError("distilled needs gate='softmax' and several experts: it replaces an attentive gate.")
        check_whole('num_experts', num_experts)
        self.specialisation = SpecialisationConfig.pop_from(kwargs)
        if kwargs:
            raise TypeError(f'SpecialisedMoE has no argument {next(iter(kwargs))!r}.')
        if num_experts == 1 and self.specialisation.active:
            raise ValueError('num_experts=1 has no gate: importance_loss_weight and similarity_loss_weight need one.')
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = image_size(img_size)
        self.drop_rate = drop_rate
        self.distilled = distilled
        self.num_features = self.head_hidden_size = expert.hidden[-1]
        shape = (in_chans, self.img_size)
        self.experts = nn.ModuleList(Branch(expert, *shape, num_classes, **dd) for _ in range(num_experts))
        self.gate: SoftmaxGate | AttentiveGate | None = None
        if num_experts > 1 and gate == 'softmax':
            self.gate = SoftmaxGate(gate_sizes, *shape, num_experts, **dd)
        elif num_experts > 1:
            self.gate = AttentiveGate(gate_sizes, *shape, **dd)
        if distilled:
            self.experts.requires_grad_(False)
            self.register_load_state_dict_pre_hook(_replace_attention)
        if distilled == 'output':
            self.gate.start.requires_grad_(False)
            self.gate.trunk.requires_grad_(False)
        self.train()

    @property
    def has_gates(self) -> bool:
        """Whether there is anything to choose."""
        return self.gate is not None

    def train(self, mode: bool = True) -> 'SpecialisedMoE':
        """Switch to training mode; the norm statistics of what is frozen do not move either."""
        super().train(mode)
        if self.distilled:
            self.experts.eval()
        if self.distilled == 'output':
            self.gate.eval()
        return self

    def forward_features(self, x: Tensor) -> Features:
        """Map images to the hidden vectors of the experts, (B, experts, num_features), and the gates, (B, experts)."""
        self.check_images(x)
        branches = [*self.experts] if self.gate is None else [*self.experts, self.gate]
        together = self.training and not is_symbolic(x)
        starts = start_together(branches, x) if together else [branch.start(x) for branch in branches]
        own = [branch.trunk(start) for branch, start in zip(branches, starts, strict=True)]
        hidden = torch.stack(own[: len(self.experts)], 1)
        scores = hidden.new_zeros(x.shape[0], 1) if self.gate is None else self.gate.score(own[-1], hidden)
        return hidden, scores.softmax(1, dtype=at_least_float32(hidden))

    def expert_logits(self, hidden: Tensor) -> Tensor:
        """Map hidden vectors to the logits of each expert, (B, experts, num_classes)."""
        hidden = F.dropout(F.relu(hidden), self.drop_rate, self.training)
        return torch.stack([expert.head(hidden[:, i]) for i, expert in enumerate(self.experts)], 1)

    def forward_head(self, x: Features, pre_logits: bool = False) -> Tensor:
        """Map features to the log of the mixed probabilities, (B, num_classes), or to mixed hidden vectors."""
        hidden, gates = x
        if pre_logits or self.num_classes == 0:
            return (F.relu(hidden) * gates[..., None]).sum(1).to(hidden.dtype)
        return self._output(self.expert_logits(hidden), gates)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the log of the mixed probabilities, (B, num_classes)."""
        hidden, gates = self.forward_features(x)
        if self.num_classes == 0:
            return self.forward_head((hidden, gates))
        logits = self.expert_logits(hidden)
        output = self._output(logits, gates)
        return self.leave(output, lambda: MixtureRecord([gates], predicted_by_chosen(gates, logits), x), x)

    def _output(self, logits: Tensor, gates: Tensor) -> Tensor:
        return log_mixture(logits, gates).to(self.experts[0].head.weight.dtype)

    @torch.no_grad()
    def look(self, x: Tensor) -> MixtureRecord:
        hidden, gates = self.forward_features(x)
        return MixtureRecord([gates], predicted_by_chosen(gates, self.expert_logits(hidden)), x)

    def get_classifier(self) -> nn.ModuleList:
        """The last layers of the experts."""
        return nn.ModuleList(expert.head for expert in self.experts)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer of each expert; none with `num_classes=0`."""
        refuse_pooling(global_pool)
        weight = next(self.parameters())
        self.num_classes = num_classes
        for expert in self.experts:
            expert.head = None
            if num_classes > 0:
                head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
                expert.head = head.train(expert.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        refuse_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth of each parameter for layer-wise learning rates: starts, trunks, heads."""
        del coarse
        return {'stem': r'.*\.start\.', 'blocks': r'.*\.trunk\.'}


def _replace_attention(model: SpecialisedMoE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint of the attentive gate load into a distilled one, which has an output layer of its own."""
    attention = [f'{prefix}gate.{name}.weight' for name in ('query', 'key')]
    if all(key in state_dict for key in attention):
        for key in attention:
            del state_dict[key]
        for name, value in model.gate.head.state_dict().items():
            state_dict[f'{prefix}gate.head.{name}'] = value


def log_mixture(logits: Tensor, gates: Tensor) -> Tensor:
    """log sum_e p(e|x) softmax(logits_e), at least in float32.

    Args:
        logits: of each expert, shape (B, experts, classes).
        gates: p(e|x), shape (B, experts).
    """
    smallest = torch.finfo(at_least_float32(gates)).tiny  # the gradient of the logarithm stays finite
    return (gates.clamp_min(smallest).log()[..., None] + logits.to(gates.dtype).log_softmax(2)).logsumexp(1)


def predicted_by_chosen(gates: Tensor, logits: Tensor) -> Tensor:
    """Class that the expert with the largest gate predicts, shape (B,)."""
    chosen = gates.argmax(1)
    return logits.argmax(2).gather(1, chosen[:, None])[:, 0]


def _create_specialised_moe(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if kwargs.get('features_only'):
        raise RuntimeError(f'features_only is not implemented for {variant}: each expert has features of its own.')
    return build_with_checks(SpecialisedMoE, variant, pretrained, **kwargs)


_GREY = {
    'num_classes': 10,
    'input_size': (1, 28, 28),
    'fixed_input_size': True,
    'pool_size': None,
    'crop_pct': 1.0,
    'interpolation': 'bilinear',
    'license': 'apache-2.0',
}


def _ends(num_experts: int) -> dict[str, tuple[str, ...]]:
    """Entries of the default config that name the first and the last layers of all experts."""
    experts = [f'experts.{i}' for i in range(num_experts)]
    return {
        'first_conv': tuple(f'{branch}.start.0' for branch in (*experts, 'gate')),
        'classifier': tuple(f'{expert}.head' for expert in experts),
    }


register_networks(
    __name__,
    _create_specialised_moe,
    (
        Network(
            'moe_mnist',
            'Mixture of 5 experts of 1,382 parameters for digits.',
            dict(expert=Sizes((1,), (5, 32)), gate_sizes=Sizes((1,), (128, 32))),
            {**_GREY, 'mean': (0.1307,), 'std': (0.3081,), **_ends(5)},
        ),
        Network(
            'moe_fashion_mnist',
            'Mixture of 5 experts for grey images of clothes.',
            dict(expert=Sizes((1,), (64, 32)), gate_sizes=Sizes((8,), (512, 32), norms=(0,))),
            {**_GREY, 'mean': (0.2859,), 'std': (0.3530,), **_ends(5)},
        ),
        Network(
            'moe_cifar100',
            'Mixture of 20 experts for 32x32 images of 100 classes.',
            dict(
                expert=Sizes((16, 32, 64, 128), (1024, 256), norms=(1, 3), padding=1),
                gate_sizes=Sizes((64, 128, 256, 512), (1024, 256), norms=(1, 3), padding=1),
                num_experts=20,
                num_classes=100,
                in_chans=3,
                img_size=32,
            ),
            {**CIFAR, 'pool_size': None, 'fixed_input_size': True, **_ends(20)},
        ),
    ),
)
