"""What gates tell, in bits: how sure they are, how evenly experts are used, and what the chosen expert says."""

import torch
from torch import Tensor


def gate_entropy(gates: Tensor) -> Tensor:
    """H_s: entropy of the gates of each image, averaged over the images, in bits; low is confident.

    Args:
        gates: p(e|x), shape (B, experts).
    """
    return _entropy(gates).mean()


def use_entropy(gates: Tensor) -> Tensor:
    """H_u: entropy of the mean gate, in bits; log2 of the number of experts if all are used alike.

    Args:
        gates: p(e|x), shape (B, experts).
    """
    return _entropy(gates.mean(0))


def mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """Mutual information of two labels of the same images, in bits, from how often they occur together.

    With the chosen expert (largest gate) first, and second the class that this expert predicts, this is I(E;Y) of
    Krishnamurthy et al.; with the true class, or the shift of a digit, it says what the choice tells about that.

    Args:
        first, second: whole numbers >= 0, shape (B,).
    """
    width = int(second.max()) + 1
    joint = torch.bincount(first * width + second, minlength=(int(first.max()) + 1) * width).view(-1, width)
    joint = joint.double() / len(first)
    return _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint.flatten())


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1) / torch.log(probabilities.new_tensor(2.0))
