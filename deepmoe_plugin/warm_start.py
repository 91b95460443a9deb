"""Gates for a trained network: what its experts are worth, and which images use them (ours).

A trained dense network holds two facts that its gates would otherwise have to learn while they close:

* What an expert is worth. The gradient of the loss with respect to its gate, at one, is the first-order change of the
  loss if the gate closes (Molchanov et al. 2017, the Taylor criterion); its root mean square over images, divided by a
  power of the expert's MACs, ranks the experts of all layers.
* Which images use it. The activations of an expert on one image, relative to its average, say how much there is to
  lose for this image. No label enters, so that the gates know the image and not the answer.

The shallow embedding learns to predict the second from the image. Then the images fall into as many groups as there
are latent experts, each of images that use the network alike, and the mixture names the group. An image keeps what its
group keeps. A few fixed sets of experts train better than a set of its own for each image: the network learns to do
without what a group closes, as it does with static pruning, while experts that come and go at random disturb it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .arguments import check_number
from .experts import GatedNetwork, find_deepmoe
from .gating.budget import BISECTIONS, find_threshold
from .stats import dynamic_share, fraction_kept

SPREAD = 0.05
"""Standard deviation of `W e` over experts, about one: gates scale channels, and this much does not disturb."""
DYNAMIC = 0.25
"""Share of the experts that depend on the image. More of them cost accuracy: what only some images keep learns from
these alone. See docs/results/cifar10_compress.md."""
IMAGE_SHARE = 0.5
"""Weight of what an image uses beside what an expert is worth, where no budget tells how many experts that changes."""
LEAST, MOST = 0.05, 4.0  # of that weight: below, no threshold tells gates apart; above, groups close what is worth most
SHARPNESS = 8.0
"""Of the mixture: its logits are the negative squared distances to the groups, this many times over their mean."""
NEAREST = 1e-3  # of the mean squared distance to all images' mean: the mean squared distance to the groups is no less
PRICE = 0.7
"""Power of the MACs that the worth of an expert is divided by: at 1, expensive layers end with hardly an expert."""
NEARNESS = 0.5  # groups differ in experts whose rank is this near to the last one that the budget has room for
LIMIT = 2.5  # of the centred rank, either way: outliers would only stretch the scale
LEARNING_RATE = 0.01  # of Adam, for the embedding; falls to zero along a cosine, epoch by epoch
FLOOR = 0.05  # of the average activation, added to that of an image before the logarithm
SMALLEST = 0.05  # gate of a kept expert: at zero it would be closed for good
GROUPED_IMAGES = 20_000  # images that the groups are found on
LLOYD_STEPS = 30

Batch = Sequence[Any]


def warm_start(
    model: nn.Module,
    loader: Iterable[Batch],
    criterion: Callable[[Any, Any], Tensor],
    epochs: int = 4,
    importance_images: int = 4000,
    dynamic_experts: float = DYNAMIC,
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
        dynamic_experts: fraction of the experts that some groups of images keep and others close, once the network
            spends its budget (`target_macs` or `target_kept`, or the smaller of two). At 0, all images keep the same.
        progress: shows progress bars.

    Raises:
        ValueError: `model` holds no DeepMoE network, or several, or one whose experts make no difference, as it is not
            trained; `loader` has no batch; or `dynamic_experts` is no fraction.
    """
    check_number('dynamic_experts', dynamic_experts)
    if not 0 <= dynamic_experts <= 1:
        raise ValueError(f'dynamic_experts must lie between 0 and 1 (a fraction), got {dynamic_experts}.')
    network = find_deepmoe(model)
    was_training = model.training
    model.eval()
    try:
        worth, activation = _measure(model, network, loader, criterion, importance_images, progress)
        gates = network.gating.gates
        macs = gates.by_gate(network.macs_of_experts()).to(worth.device)
        rank = (worth / macs.pow(PRICE)).clamp(min=torch.finfo(worth.dtype).tiny).log()
        # Dead experts, whose logarithms lie far below all others, would move a mean, but not the median.
        rank = (rank - rank.median()).clamp(-LIMIT, LIMIT)
        latent = gates.weight.shape[1]
        if dynamic_experts:
            use = _train_embedding(model, network, loader, activation, epochs, progress)
            weights = macs.sqrt() * _nearness(network, rank)
            groups = _group_images(network, loader, use.rows * weights[:, None], progress)
            uses = use.mean[:, None] + use.rows @ groups.centers.t()
            heads, shares = _mixed(network, rank, uses, groups.shares, dynamic_experts), groups.shares
        else:
            heads, shares = (1 + SPREAD * rank)[:, None].expand(-1, latent), rank.new_full((latent,), 1 / latent)
        heads = heads.clamp(min=SMALLEST)
        with torch.no_grad():
            gates.weight.copy_(heads)
            gates.threshold.zero_()
            _divide_consumers(network, gates.by_expert(heads @ shares))
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
    """Worth of each gate (root mean square of its gradient) and mean activation behind it, both of shape (gates,)."""
    gates: list[Tensor] = []

    def keep_all(_module: nn.Module, _args: Any, preact: Tensor) -> Tensor:
        gates.append(torch.ones_like(preact).requires_grad_())
        return gates[-1]

    hook = network.gating.gates.register_forward_hook(keep_all)
    worth: Tensor | float = 0.0
    activation: Tensor | float = 0.0
    seen = 0
    try:
        with _Activations(network) as activations:
            for inputs, target in _batches(network, loader, 'importance', progress, images):
                gates.clear()
                loss = criterion(model(inputs), target) * len(inputs)
                (gradient,) = torch.autograd.grad(loss, gates)
                worth = worth + network.gating.gates.by_gate(gradient).square().sum(0)
                activation = activation + activations.take().sum(0)
                seen += len(inputs)
    finally:
        hook.remove()
    if not seen:
        raise ValueError('loader has no batch: there is nothing to measure the experts on.')
    assert isinstance(worth, Tensor)
    if not worth.any():
        raise ValueError(
            'No expert makes any difference to the loss: warm_start needs a trained network. The last norm of each '
            'residual block is zero in a new one (zero_init_last).'
        )
    assert isinstance(activation, Tensor)
    return (worth / seen).sqrt(), activation / seen


class _Use(NamedTuple):
    """How the logarithm of a gate's relative activation depends on the embedding's features: mean + rows (f - f mean).

    Attributes:
        rows: shape (gates, C); zero where the embedding predicts worse than the mean.
        mean: shape (gates,).
    """

    rows: Tensor
    mean: Tensor


def _train_embedding(
    model: nn.Module, network: GatedNetwork, loader: Iterable[Batch], mean: Tensor, epochs: int, progress: bool
) -> _Use:
    """Teach the embedding features from which the relative activation behind each gate follows."""
    embedding = network.gating.embedding
    rows = nn.Parameter(mean.new_zeros(len(mean), embedding.mixture.in_features))
    offset = nn.Parameter(torch.zeros_like(mean))
    average, missed, varied = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    embedding.requires_grad_(True)
    optimizer = torch.optim.Adam([*embedding.layers.parameters(), rows, offset], lr=LEARNING_RATE)
    steps = 0
    for epoch in range(epochs):
        for inputs, _ in _batches(network, loader, f'embedding {epoch + 1}/{epochs}', progress):
            with torch.no_grad(), _Activations(network) as activations:
                model(inputs)
                relative = ((activations.take() + FLOOR * mean) / ((1 + FLOOR) * mean).clamp(min=1e-6)).clamp(0.02, 50)
            goal = relative.log()
            steps += 1
            average.lerp_(goal.mean(0), 1 / steps)
            if steps == 1:
                offset.data.copy_(average)
            for group in optimizer.param_groups:
                group['lr'] = LEARNING_RATE * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
            embedding.train()
            errors = (F.linear(embedding.pool(inputs).float(), rows, offset) - goal).square()
            loss = errors.mean()
            embedding.eval()
            if epoch == epochs - 1:
                missed += errors.detach().sum(0)
                varied += (goal - average).square().sum(0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _Use(rows.detach() * (missed < varied)[:, None], average)


class _Groups(NamedTuple):
    """Groups of images, one for each latent expert.

    Attributes:
        centers: mean of the embedding's features in each group less that of all images, shape (K, C).
        shares: fraction of the images in each group, shape (K,).
    """

    centers: Tensor
    shares: Tensor


@torch.no_grad()
def _group_images(network: GatedNetwork, loader: Iterable[Batch], rows: Tensor, progress: bool) -> _Groups:
    """Group images by what they use (k-means), and let the mixture name the group of an image.

    Args:
        rows: what the features say about each gate, times the weight of the gate, shape (gates, C).
    """
    embedding = network.gating.embedding
    found = [
        embedding.pool(inputs).float()
        for inputs, _ in _batches(network, loader, 'groups of images', progress, GROUPED_IMAGES)
    ]
    features = torch.cat(found)
    middle = features.mean(0)
    features = features - middle
    # Distances between predictions, rows (f - g), are distances between features in this metric.
    metric = rows.double().t() @ rows.double()
    values, vectors = torch.linalg.eigh(metric)
    points = (features.double() @ (vectors * values.clamp(min=0).sqrt())).float()
    mixture = embedding.mixture
    nearest, distance = _nearest_means(points, mixture.out_features)
    sizes = torch.bincount(nearest, minlength=mixture.out_features).to(features)
    centers = (
        torch.zeros(mixture.out_features, features.shape[1], device=features.device).index_add_(0, nearest, features)
        / sizes.clamp(min=1)[:, None]
    )
    # The softmax of negative squared distances is linear in the features: the term that all groups share cancels.
    # With no more images than groups each is its own group, at a distance of zero.
    least = NEAREST * points.square().sum(1).mean()
    scale = SHARPNESS / distance.clamp(min=least.clamp(min=torch.finfo(distance.dtype).eps))
    pull = scale * centers @ metric.float()
    mixture.weight.copy_(2 * pull)
    far = torch.where(sizes > 0, 0, -torch.inf).nan_to_num(neginf=-1e4)  # no image belongs to an empty group
    mixture.bias.copy_(far - (pull * centers).sum(1) - 2 * pull @ middle)
    return _Groups(centers, sizes / sizes.sum())


def _nearest_means(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """K-means by Lloyd's iteration: the group of each point (n, C), and the mean squared distance to its mean."""
    means = points[torch.randint(len(points), (count,), device=points.device)]
    for _ in range(LLOYD_STEPS):
        nearest = torch.cdist(points, means).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(means).index_add_(0, nearest, points)
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
    distance, nearest = torch.cdist(points, means).min(1)
    return nearest, distance.square().mean()


def _threshold(network: GatedNetwork, values: Tensor) -> Tensor | None:
    """The threshold at which gates (gates,), positive, of all images alike spend the budget; None without a budget."""
    gating = network.gating
    if gating.budget is None:
        return None
    cost = network.spent if gating.budget_on_macs else fraction_kept
    return find_threshold(gating.gates.by_expert(values)[None], cost, gating.budget.target)


def _nearness(network: GatedNetwork, rank: Tensor) -> Tensor:
    """How much the budget depends on whether a gate closes, by its rank, (gates,): from 0 to 1; 1 without a budget."""
    shift = 2 * LIMIT  # makes ranks positive
    last = _threshold(network, rank + shift)
    return torch.ones_like(rank) if last is None else (-((rank + shift - last) / NEARNESS).square()).exp()


def _mixed(network: GatedNetwork, rank: Tensor, uses: Tensor, shares: Tensor, dynamic: float) -> Tensor:
    """Gates (gates, K) from what each is worth (gates,) and what each group of images uses (gates, K).

    The second counts as much as it takes for groups to differ in the wanted share of the experts.
    """

    def gates(weight: float) -> Tensor:
        return _spend_alike(network, 1 + SPREAD * (rank[:, None] + weight * uses))

    if network.gating.budget is None:
        return gates(IMAGE_SHARE)
    low, high = LEAST, MOST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        heads = gates(middle)
        last = _threshold(network, heads[:, 0])
        assert last is not None  # there is a budget
        too_few = dynamic_share((heads > last).float() @ shares, 1) < dynamic
        low, high = (middle, high) if too_few else (low, middle)
    return gates(high)


def _spend_alike(network: GatedNetwork, heads: Tensor) -> Tensor:
    """Shift the gates of each group of images (gates, K) so that at one threshold all groups spend the budget.

    An image with weak activations is not an easy one: without this, a dark image would keep fewer experts.
    """
    found = [_threshold(network, column) for column in heads.t()]
    thresholds = [threshold for threshold in found if threshold is not None]
    if not thresholds:
        return heads
    each = torch.stack(thresholds)
    return heads + each.mean() - each


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
