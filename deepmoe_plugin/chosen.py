"""Inference that runs only the experts that each image chooses."""

from typing import Any

from torch import Tensor, nn

from .arguments import check_whole
from .models.specialised_moe import AttentiveGate, SpecialisedMoE
from .tracing import at_least_float32


class ChosenExperts(nn.Module):
    """Runs for each image the experts with its largest gates, which are scaled to sum to one.

    Equals the network to rounding where the gates of all other experts are zero. Shares the weights of the network, in
    evaluation mode. See `chosen_experts`.
    """

    def __init__(self, network: SpecialisedMoE, top_k: int) -> None:
        super().__init__()
        self.network = network
        self.top_k = top_k
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the log of the mixed probabilities, (B, num_classes)."""
        network = self.network
        network.check_images(x)
        assert network.gate is not None
        own = network.gate(x)
        dtype = at_least_float32(own)
        gates, chosen = network.gate.score(own, own).softmax(1, dtype=dtype).topk(self.top_k, dim=1)
        log_gates = (gates / gates.sum(1, keepdim=True)).log()
        output = log_gates.new_empty(x.shape[0], self.top_k, network.num_classes)
        experts: Any = network.experts
        for index, expert in enumerate(experts):
            images, places = (chosen == index).nonzero(as_tuple=True)
            if len(images) > 0:
                logits = expert.head(expert(x[images]).relu())
                output[images, places] = log_gates[images, places, None] + logits.to(dtype).log_softmax(1)
        return output.logsumexp(1)

    def train(self, mode: bool = True) -> 'ChosenExperts':
        """Stay in evaluation mode: what is not chosen would not be trained.

        Raises:
            ValueError: training mode is asked for.
        """
        if mode:
            raise ValueError('ChosenExperts is for inference: train the network that it was made from.')
        return super().train(False)


def chosen_experts(model: nn.Module, top_k: int = 1) -> ChosenExperts:
    """Make a network that runs, for each image, only the `top_k` experts with its largest gates.

    Args:
        model: of `moe_mnist`, `moe_fashion_mnist` or `moe_cifar100`, with the softmax gate; it is put into evaluation
            mode. An attentive gate reads the hidden vectors of all experts: distil it first (`distilled='output'`).

    Raises:
        ValueError: the network's gate needs all experts, or there are fewer than `top_k`.
    """
    if not isinstance(model, SpecialisedMoE) or model.gate is None:
        raise ValueError(f'{type(model).__name__} has no experts to choose from: give a moe_* network with a gate.')
    if isinstance(model.gate, AttentiveGate):
        raise ValueError("An attentive gate needs all experts: train gate='softmax' with distilled='output' from it.")
    if model.num_classes == 0:
        raise ValueError('num_classes=0 leaves the experts without classifiers: reset_classifier first.')
    check_whole('top_k', top_k)
    if top_k > len(model.experts):
        raise ValueError(f'top_k must be at most {len(model.experts)}, the number of experts, got {top_k}.')
    return ChosenExperts(model, top_k)
