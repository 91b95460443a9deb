"""Gates for a trained network: what its experts are worth, and which image needs which (ours).

A trained dense network knows two things that its gates would otherwise have to find out while they close:

* What an expert is worth. The gradient of the loss with respect to its gate, at one, is the first-order change of the
  loss if the gate closes (Molchanov et al. 2017, the Taylor criterion); divided by its MACs, it ranks the experts of
  all layers.
* Which images use it. The activations of an expert on one image, relative to its average, say how much there is to
  lose for this image. No label enters, so that the gates know the image and not the answer.

The shallow embedding learns to predict the second from the image, with the gate heads as the linear map from its
mixture to the experts. `W e` is then the rank of each expert for each image, spread around one, and the threshold of
the gates can close the least useful experts first.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .experts import GatedNetwork, find_deepmoe

SPREAD = 0.2
"""Standard deviation of `W e` over experts, about one: gates scale channels, and this much does not disturb."""
IMAGE_SHARE = 0.3
"""Weight of the image beside the average: the logarithm of an expert's relative activation is predicted only in part,
and with more weight its errors close experts that the image needs."""
LIMIT = 2.5  # of the standardised rank, either way: outliers would only stretch the scale
LEARNING_RATE = 0.01  # of Adam, for the embedding; falls to zero along a cosine, epoch by epoch
FLOOR = 0.05  # of the average activation, added to that of an image before the logarithm

Batch = Sequence[Any]


def warm_start(
    model: nn.Module,
    loader: Iterable[Batch],
    criterion: Callable[[Any, Any], Tensor],
    epochs: int = 4,
    importance_images: int = 4000,
    progress: bool = True,
) -> None:
    """Initialise the gating network of a trained network; what the network computes hardly changes.

    Call it once the weights of the dense twin are loaded and before training; all gates are kept afterwards.
    Consumers are divided by the average gate of what they read.

    Args:
        model: holds one DeepMoE network with trained base weights, all of its experts kept.
        loader: batches of (images, targets), those of the training; runs through it `epochs` + 1 times at most.
        criterion: the loss of the base network, from (output, target) to a scalar that is the mean over images.
        epochs: passes over the loader in which the embedding learns; the base network runs forward only.
        importance_images: images that the worth of the experts is measured on.
        progress: shows progress bars.

    Raises:
        ValueError: `model` holds no DeepMoE network, or several; or `loader` has no batch.
    """
    network = find_deepmoe(model)
    was_training = model.training
    model.eval()
    try:
        worth, activation = _measure(model, network, loader, criterion, importance_images, progress)
        gates = network.gating.gates
        macs = gates.by_gate(network.macs_of_experts()).to(worth.device)
        rank = (worth / macs).clamp(min=torch.finfo(worth.dtype).tiny).log()
        # The median: dead experts, whose logarithm is far below all others, would draw a mean to themselves.
        rank = (rank - rank.median()).clamp(-LIMIT, LIMIT)
        rows, offset = _train_embedding(model, network, loader, activation, epochs, progress)
        with torch.no_grad():
            # The mixture sums to one, so that a constant of the prediction is a constant of each row.
            static = rank + IMAGE_SHARE * (offset - rows.sum(1))
            heads = 1 + SPREAD * (static[:, None] + IMAGE_SHARE * rows.shape[1] * rows)
            gates.weight.copy_(heads)
            gates.threshold.zero_()
            _divide_consumers(network, gates.by_expert(1 + SPREAD * (rank + IMAGE_SHARE * offset)))
    finally:
        model.train(was_training)


def _measure(
    model: nn.Module,
    network: GatedNetwork,
    loader: Iterable[Batch],
    criterion: Callable[[Any, Any], Tensor],
    images: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Mean worth of each gate (|gradient|, per image) and of the activation behind it, both of shape (gates,)."""
    gates: list[Tensor] = []

    def open_all(_module: nn.Module, _args: Any, preact: Tensor) -> Tensor:
        gates.append(torch.ones_like(preact).requires_grad_())
        return gates[-1]

    hook = network.gating.gates.register_forward_hook(open_all)
    worth: Tensor | float = 0.0
    activation: Tensor | float = 0.0
    seen = 0
    try:
        with _Activations(network) as activations:
            for inputs, target in _batches(network, loader, 'importance', progress, images):
                gates.clear()
                loss = criterion(model(inputs), target) * len(inputs)
                (gradient,) = torch.autograd.grad(loss, gates)
                worth = worth + network.gating.gates.by_gate(gradient).abs().sum(0)
                activation = activation + activations.take().sum(0)
                seen += len(inputs)
    finally:
        hook.remove()
    if not seen:
        raise ValueError('loader has no batch: there is nothing to measure the experts on.')
    assert isinstance(worth, Tensor)
    assert isinstance(activation, Tensor)
    return worth / seen, activation / seen


def _train_embedding(
    model: nn.Module, network: GatedNetwork, loader: Iterable[Batch], mean: Tensor, epochs: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Teach the embedding to predict the logarithm of each expert's relative activation.

    Returns:
        rows (gates, K) and offset (gates,) of the prediction `offset + rows (K e - 1)`: K times the mixture is one on
        average, so that the rows have the scale of what they predict; zero where there is nothing to learn.
    """
    gating = network.gating
    count = gating.gates.weight.shape[1]
    rows = nn.Parameter(0.1 * torch.randn(len(mean), count, device=mean.device))
    offset: Tensor | None = None
    missed, varied = torch.zeros_like(mean), torch.zeros_like(mean)
    nn.init.normal_(gating.embedding.mixture.weight, std=0.05)
    gating.embedding.requires_grad_(True)
    optimizer = torch.optim.Adam([*gating.embedding.parameters(), rows], lr=LEARNING_RATE)
    steps = 0
    for epoch in range(epochs):
        for inputs, _ in _batches(network, loader, f'embedding {epoch + 1}/{epochs}', progress):
            with torch.no_grad(), _Activations(network) as activations:
                model(inputs)
                relative = ((activations.take() + FLOOR * mean) / ((1 + FLOOR) * mean).clamp(min=1e-6)).clamp(0.02, 50)
            goal = relative.log()
            if offset is None:
                offset = goal.mean(0)
            for group in optimizer.param_groups:
                group['lr'] = LEARNING_RATE * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
            steps += 1
            offset.lerp_(goal.mean(0), 1 / steps)
            gating.embedding.train()
            errors = (offset + (count * gating.embedding(inputs) - 1) @ rows.t() - goal).square()
            loss = errors.mean()
            gating.embedding.eval()
            if epoch == epochs - 1:
                missed += errors.detach().sum(0)
                varied += (goal - offset).square().sum(0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if offset is None:
        return torch.zeros_like(rows), torch.zeros_like(mean)
    # An expert whose use the embedding predicts worse than its mean stays the same for all images.
    return rows.detach() * (missed < varied)[:, None], offset


@torch.no_grad()
def _divide_consumers(network: GatedNetwork, gates: Tensor) -> None:
    """Divide the weights that read each expert by its average gate, so that the network stays what it was.

    Experts that no layer of the network reads are read by the classifier, if there is one.
    """
    for layer, gate in zip(network.expert_layers, gates.split(network.gating.gates.widths), strict=True):
        reader = network.get_submodule(layer.consumer) if layer.consumer else network.get_classifier()
        weight = getattr(reader, 'weight', None)
        if isinstance(weight, Tensor):
            weight.div_(gate.to(weight.dtype).reshape(1, -1, *[1] * (weight.ndim - 2)))


class _Activations:
    """While entered, the root mean square over positions of what each gate multiplies, of the latest forward pass."""

    def __init__(self, network: GatedNetwork) -> None:
        self._modules = [network.get_submodule(layer.act) for layer in network.expert_layers]
        self._by_gate = network.gating.gates.by_gate
        self._found: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> '_Activations':
        for i, module in enumerate(self._modules):
            positions = (1, 2) if getattr(module, 'channels_last', False) else (2, 3)
            self._hooks.append(module.register_forward_hook(self._keep(i, positions)))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, index: int, positions: tuple[int, int]) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._found[index] = output.detach().float().square().mean(positions).sqrt()

        return hook

    def take(self) -> Tensor:
        """The mean over the experts of each gate, of all layers side by side, shape (B, gates)."""
        return self._by_gate(torch.cat([self._found[i] for i in range(len(self._modules))], dim=1))


def _batches(
    network: GatedNetwork, loader: Iterable[Batch], title: str, progress: bool, images: int | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """Batches of images and targets on the network's device, and at most so many images."""
    device = network.gating.gates.weight.device
    seen = 0
    for inputs, target in tqdm(loader, desc=title, unit='batch', ncols=100, disable=not progress):
        yield inputs.to(device), target.to(device) if isinstance(target, Tensor) else target
        seen += len(inputs)
        if images is not None and seen >= images:
            return
