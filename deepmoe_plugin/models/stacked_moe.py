"""Deep mixture of experts (Eigen, Ranzato, Sutskever 2013): layers of experts, each with a gate of its own."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_whole
from ..balance import BalancedSoftmax
from ..checkpoints import build_with_checks
from ..mixture import Mixture, MixtureRecord, image_size, refuse_checkpointing, refuse_pooling
from .registration import Network, register_networks

Form = Literal['mixture', 'single', 'concat']
FORMS = ('mixture', 'single', 'concat')


class MixtureLayer(nn.Module):
    """z = sum_i g_i(x) f_i(x): experts are linear with ReLU; the gate is linear, ReLU, linear, softmax.

    All experts are rows of one matrix, so that they cost one product.

    Args:
        in_features, num_experts, hidden: inputs, experts, and outputs of each expert.
        gate_hidden: hidden units of the gate.
        form: 'mixture'; or without gate: 'single', one expert alone, or 'concat', all outputs side by side. A mixture
            of one expert has no gate either.
        balance_margin: see `BalancedSoftmax`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        hidden: int,
        gate_hidden: int,
        form: Form = 'mixture',
        balance_margin: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_experts = 1 if form == 'single' else num_experts
        self.out_features = num_experts * hidden if form == 'concat' else hidden
        self.experts = nn.Linear(in_features, self.num_experts * hidden, **dd)
        self.gate: nn.Module | None = None
        if form == 'mixture' and num_experts > 1:
            self.gate = nn.Sequential(
                nn.Linear(in_features, gate_hidden, **dd), nn.ReLU(), nn.Linear(gate_hidden, num_experts, **dd)
            )
            self.balance = BalancedSoftmax(num_experts, balance_margin, device=device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (B, in_features) to (B, out_features), and the gates (B, num_experts) where there are any."""
        outputs = F.relu(self.experts(x))
        if self.gate is None:
            return outputs, None
        gates = self.balance(self.gate(x))
        outputs = outputs.unflatten(1, (self.num_experts, -1))
        return (outputs * gates.to(outputs.dtype)[..., None]).sum(1), gates


class StackedMoE(Mixture):
    """Layers of mixtures, each reading the output of the one before, and a linear classifier.

    Args:
        experts: experts of each layer; as many layers as there are numbers.
        hidden: outputs of the experts of each layer.
        gate_hidden: hidden units of the gate of each layer.
        second_layer: form of the last layer, see `MixtureLayer`; with one layer, of that one.
        balance_margin: see `BalancedSoftmax`; None: phase 2, or no constraint at all.
        img_size: height and width of the images.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        experts: Sequence[int] = (4, 4),
        hidden: Sequence[int] = (100, 100),
        gate_hidden: Sequence[int] = (50, 50),
        second_layer: Form = 'mixture',
        balance_margin: float | None = None,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 36,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, sizes in (('experts', experts), ('hidden', hidden), ('gate_hidden', gate_hidden)):
            _check_sizes(name, sizes, len(experts) if isinstance(experts, Sequence) else 0)
        if second_layer not in FORMS:
            raise ValueError(f'second_layer must be one of {", ".join(FORMS)}, got {second_layer!r}.')
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = image_size(img_size)
        self.drop_rate = drop_rate
        width = in_chans * self.img_size[0] * self.img_size[1]
        self.layers = nn.ModuleList()
        for i in range(len(experts)):
            form = second_layer if i == len(experts) - 1 else 'mixture'
            layer = MixtureLayer(width, experts[i], hidden[i], gate_hidden[i], form, balance_margin, **dd)
            self.layers.append(layer)
            width = layer.out_features
        self.num_features = self.head_hidden_size = width
        self.head = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the output of the last layer, (B, num_features)."""
        return self.mix(x)[0]

    def mix(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map images to the output of the last layer and the gates of each layer that has some, (B, experts)."""
        self.check_images(x)
        x = x.flatten(1)
        gates = []
        for layer in self.layers:
            x, chosen = layer(x)
            if chosen is not None:
                gates.append(chosen)
        return x, gates

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (B, num_features) to logits (B, num_classes)."""
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        features, gates = self.mix(x)
        logits = self.forward_head(features)
        if self.num_classes == 0:
            return logits
        return self.leave(logits, lambda: MixtureRecord(gates, logits.argmax(1), x), x)

    @property
    def has_gates(self) -> bool:
        """Whether there is anything to choose."""
        return any(layer.gate is not None for layer in self.layers)

    @torch.no_grad()
    def look(self, x: Tensor) -> MixtureRecord:
        features, gates = self.mix(x)
        return MixtureRecord(gates, self.forward_head(features).argmax(1), x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; none with `num_classes=0`."""
        refuse_pooling(global_pool)
        weight = self.layers[0].experts.weight
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        refuse_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth of each parameter for layer-wise learning rates: one step for each layer."""
        del coarse
        return {'stem': r'^layers\.0\.', 'blocks': r'^layers\.(\d+)\.'}


def _check_sizes(name: str, sizes: Any, layers: int) -> None:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ValueError(f'{name} must be a list with a whole number for each layer, got {sizes!r}.')
    if len(sizes) != layers or not sizes:
        raise ValueError(f'{name} must have a number for each of the {layers} layers (experts), got {sizes!r}.')
    for size in sizes:
        check_whole(name, size)


def _create_stacked_moe(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if kwargs.get('features_only'):
        raise RuntimeError(f'features_only is not implemented for {variant}: its features are vectors, not maps.')
    return build_with_checks(StackedMoE, variant, pretrained, **kwargs)


_MNIST = {
    'num_classes': 10,
    'input_size': (1, 36, 36),
    'fixed_input_size': True,
    'pool_size': None,
    'crop_pct': 1.0,
    'interpolation': 'bilinear',
    'mean': (0.1307,),
    'std': (0.3081,),
    'first_conv': (),
    'classifier': 'head',
    'license': 'apache-2.0',
}


def _stacked(name: str, experts: Sequence[int], hidden: Sequence[int], gate_hidden: Sequence[int]) -> Network:
    sizes = ', '.join(f'{n} of {width} units' for n, width in zip(experts, hidden, strict=True))
    title = f'Stacked mixture of experts for jittered digits: {sizes}.'
    return Network(name, title, dict(experts=experts, hidden=hidden, gate_hidden=gate_hidden), _MNIST)


def _dnn(name: str, hidden: Sequence[int]) -> Network:
    widths = ' and '.join(map(str, hidden))
    title = f'Fully connected, {widths} hidden units: about as many parameters as {name}.'
    args = dict(experts=(1, 1), hidden=hidden, gate_hidden=(1, 1))
    return Network(name.replace('dmoe', 'dmoe_dnn', 1), title, args, _MNIST)


register_networks(
    __name__,
    _create_stacked_moe,
    (
        _stacked('dmoe_4x100_4x100', (4, 4), (100, 100), (50, 50)),
        _stacked('dmoe_4x100_4x20', (4, 4), (100, 20), (50, 50)),
        _stacked('dmoe_4x50_4x20', (4, 4), (50, 20), (20, 20)),
        _stacked('dmoe_4x100', (4,), (100,), (50,)),
        _dnn('dmoe_4x100_4x100', (451, 100)),
        _dnn('dmoe_4x100_4x20', (453, 20)),
        _dnn('dmoe_4x50_4x20', (221, 20)),
    ),
)
