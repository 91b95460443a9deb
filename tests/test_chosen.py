"""Running only the chosen experts: exact for one-hot gates, a mixture of the largest gates otherwise."""

import pytest
import timm
import torch
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.models.specialised_moe import log_mixture


def network(sharpness: float = 1.0, name: str = 'moe_mnist') -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        model.gate.head.weight.mul_(sharpness)
        model.gate.head.bias.zero_()
    return model


def images(model: nn.Module, batch: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.2, 5, batch)[:, None, None, None]
    return scale * torch.randn(batch, model.in_chans, *model.img_size, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize('name', ['moe_mnist', 'moe_fashion_mnist'])
def test_exact_for_one_hot_gates(name: str) -> None:
    model = network(1e6, name)
    x = images(model)
    gates = model.look(x).gates[0]
    assert gates.max(1).values.min() == 1
    assert len(gates.argmax(1).unique()) > 1
    torch.testing.assert_close(deepmoe_plugin.chosen_experts(model)(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize('top_k', [1, 2, 5])
def test_mixture_of_the_largest_gates(top_k: int) -> None:
    model = network(20)
    x = images(model)
    hidden, gates = model.forward_features(x)
    kept = gates >= gates.topk(top_k, dim=1).values[:, -1:]
    gates = gates * kept / (gates * kept).sum(1, keepdim=True)
    expected = log_mixture(model.expert_logits(hidden), gates)
    torch.testing.assert_close(deepmoe_plugin.chosen_experts(model, top_k)(x), expected)


@torch.no_grad()
def test_only_chosen_experts_see_their_images() -> None:
    model = network(1e6)
    x = images(model)
    seen = [0] * 5
    for index, expert in enumerate(model.experts):
        expert.register_forward_hook(lambda _module, args, _out, index=index: seen.__setitem__(index, len(args[0])))
    deepmoe_plugin.chosen_experts(model)(x)
    assert seen == torch.bincount(model.look(x).gates[0].argmax(1), minlength=5).tolist()


def test_what_cannot_run_so_is_refused() -> None:
    chosen_experts = deepmoe_plugin.chosen_experts
    with pytest.raises(ValueError, match='attentive'):
        chosen_experts(timm.create_model('moe_mnist', gate='attentive'))
    with pytest.raises(ValueError, match='no experts to choose from'):
        chosen_experts(timm.create_model('moe_mnist', num_experts=1))
    with pytest.raises(ValueError, match='top_k'):
        chosen_experts(network(), 6)
    with pytest.raises(ValueError, match='num_classes'):
        chosen_experts(timm.create_model('moe_mnist', num_classes=0))
    with pytest.raises(ValueError, match='inference'):
        chosen_experts(network()).train()
