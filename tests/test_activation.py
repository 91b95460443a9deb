"""The gated activation computes the plain formula, at the memory cost of the ungated activation."""

import pytest
import torch
from small_networks import SMALL, images, randomise, small
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from deepmoe_plugin.activation import GatedActivation

ACTIVATIONS = {
    'relu': lambda: nn.ReLU(inplace=True),
    'silu': lambda: nn.SiLU(inplace=True),
    'tanh': lambda: nn.Tanh(),
    'leaky': lambda: nn.LeakyReLU(0.2, inplace=True),
}
activations = pytest.mark.parametrize('act', ACTIVATIONS)


def inputs(seed=0):
    """An activation map away from the kink of the ReLU, and pre-activations of gates, three of twelve closed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, generator=generator)
    x = torch.where(x.abs() < 0.1, 0.5, x)
    preact = torch.rand(2, 6, dtype=torch.float64, generator=generator) + 0.2
    preact[0, 1] = preact[1, 2] = -0.7
    preact[0, 4] = -0.3
    return x.requires_grad_(), preact.requires_grad_()


def gated(act):
    module = GatedActivation(ACTIVATIONS[act]())
    return lambda x, preact: module(x.clone(), preact.relu())


def plain(act):
    module = ACTIVATIONS[act]()
    return lambda x, preact: module(x.clone()) * preact.relu()[:, :, None, None]


@activations
def test_output_and_gradients_are_those_of_the_plain_formula(act):
    results = []
    for function in (gated(act), plain(act)):
        x, preact = inputs()
        y = function(x, preact)
        weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad((y * weights).sum() + y.pow(3).sum(), (x, preact))
        results.append((y.detach(), *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@activations
@pytest.mark.parametrize('transposed', [False, True])
def test_channels_last_maps_get_the_same(act, transposed):
    module, weights = GatedActivation(ACTIVATIONS[act](), channels_last=True), torch.arange(1, 109).view(2, 6, 3, 3)
    results = []
    for function in (lambda x, p: module(x.permute(0, 2, 3, 1).clone(), p.relu()).permute(0, 3, 1, 2), gated(act)):
        x, preact = inputs()
        x = x.detach().mT.requires_grad_() if transposed else x
        y = function(x, preact)
        results.append((y.detach(), *torch.autograd.grad((y * weights).sum(), (x, preact))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@activations
def test_gradcheck(act):
    assert gradcheck(gated(act), inputs())


@activations
def test_gradgradcheck(act):
    assert gradgradcheck(gated(act), inputs())


@activations
def test_closed_gates_leave_exact_zeros_and_stop_the_gradient(act):
    x, preact = inputs()
    y = gated(act)(x, preact)
    closed = (preact <= 0).nonzero().tolist()
    assert len(closed) == 3
    grad_x, grad_preact = torch.autograd.grad(y.sum(), (x, preact))
    for image, channel in closed:
        assert torch.equal(y[image, channel], torch.zeros(3, 3, dtype=torch.float64))
        assert not grad_x[image, channel].any()
        assert grad_preact[image, channel] == 0


def test_only_what_needs_a_gradient_gets_one():
    x, preact = inputs()
    (grad,) = torch.autograd.grad(gated('relu')(x.detach(), preact).sum(), preact)
    assert grad.shape == preact.shape
    (grad,) = torch.autograd.grad(gated('relu')(x, preact.detach()).sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_maps_with_float32_gates(dtype):
    x, preact = (tensor.detach().float() for tensor in inputs())
    x, preact = x.to(dtype).requires_grad_(), preact.requires_grad_()
    y = gated('relu')(x, preact)
    expected = plain('relu')(x.detach().float(), preact.detach())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    grad_x, grad_preact = torch.autograd.grad(y.float().sum(), (x, preact))
    assert grad_x.dtype == dtype
    assert grad_preact.dtype == torch.float32
    totals = x.detach().float().relu().sum((2, 3)) * (preact > 0)
    torch.testing.assert_close(grad_preact, totals, rtol=2e-2, atol=2e-2)


def saved(model, x):
    """Bytes that a forward pass keeps for the backward pass, by storage, parameters and images left out."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), x)}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


@pytest.mark.parametrize('structure', SMALL)
def test_training_keeps_as_much_as_the_network_without_gates(structure):
    x = images(size=64)
    model = randomise(small(structure))
    dense = randomise(small(structure, gated=False))
    own = saved(nn.Sequential(model.gating.embedding, model.gating.gates), x)
    gates = sum(model.gating.gates.widths) * len(x) * 4
    with_gates, without = saved(model, x), saved(dense, x)
    assert without > 10 * gates
    # Beside the gating network: the gates, before and after their ReLU, and cut up by layer.
    assert with_gates <= without + own + 3 * gates


def test_keeping_one_more_map_for_each_gate_would_be_noticed(monkeypatch):
    monkeypatch.setattr(
        GatedActivation, 'forward', lambda self, x, gate: self.act(x) * gate.to(x.dtype)[:, :, None, None]
    )
    with pytest.raises(AssertionError):
        test_training_keeps_as_much_as_the_network_without_gates('basic')
