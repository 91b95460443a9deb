"""The one way to the terms of the loss: which passes it finds, what it leaves behind, and for which outputs."""

import copy
import dataclasses
import gc
import io
from typing import Any

import pytest
import torch
from small_networks import images, randomise, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepmoe_plugin import DeepMoELoss, gating_terms

TARGET = torch.tensor([1, 2])


def network(**kwargs: Any) -> Any:
    model = randomise(small('cifar', **{'gate_loss_weight': 0.5, **kwargs})).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0
    return model


def batch(seed: int) -> Tensor:
    return (1 + seed) * images(seed=seed, dtype=torch.float64)


def gate_loss(model: Any, x: Tensor) -> Tensor:
    return 0.5 * torch.cat(model.gating(x), 1).mean()


@dataclasses.dataclass
class Output:
    logits: Tensor


OUTPUTS = {
    'dictionary': (lambda logits: {'logits': logits}, lambda output: output['logits']),
    'list': (lambda logits: [logits, logits.sum()], lambda output: output[0]),
    'tuple': (lambda logits: (logits.detach(), logits), lambda output: output[1]),
    'dataclass': (Output, lambda output: output.logits),
    'squeezed': (lambda logits: logits.squeeze(), lambda output: output),
    'multiplied': (lambda logits: 1 * logits, lambda output: output),
}


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x: Tensor) -> Any:
        return OUTPUTS[self.kind][0](self.network(x))


@pytest.mark.parametrize('kind', OUTPUTS)
def test_any_output(kind: str) -> None:
    model = Wrapped(network(), kind)
    logits = OUTPUTS[kind][1]
    expected = nn.functional.cross_entropy(logits(model(batch(0))), TARGET) + gate_loss(model.network, batch(0))
    loss = DeepMoELoss(model, lambda output, y: nn.functional.cross_entropy(logits(output), y))
    torch.testing.assert_close(loss(model(batch(0)), TARGET), expected)


def test_two_passes_in_one_forward_give_their_mean() -> None:
    model = network()
    expected = (gate_loss(model, batch(0)) + gate_loss(model, batch(1))) / 2
    output = model(batch(0)) + model(batch(1))
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())
    torch.testing.assert_close(loss(output, TARGET), nn.functional.cross_entropy(output, TARGET) + expected)
    outputs = model(batch(0)), model(batch(1))
    torch.testing.assert_close(gating_terms(model)['loss_gate'], expected)
    del outputs


@pytest.mark.parametrize('compiled', [False, True])
def test_a_loss_takes_the_passes_that_led_to_it(compiled: bool) -> None:
    torch._dynamo.reset()
    model = network()
    called = torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model
    losses = [called(batch(seed)).sum() for seed in (0, 1, 2)]
    for seed in (1, 0, 2):
        terms = gating_terms(model, loss={'all': [losses[seed]]})
        torch.testing.assert_close(terms['loss_gate'], gate_loss(model, batch(seed)))
    with pytest.raises(ValueError, match='No training forward pass'):
        gating_terms(model, loss=losses[0])


def test_the_compiler_compiles_once_whether_or_not_terms_are_taken() -> None:
    torch._dynamo.reset()
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        counts.append(1)
        return graph.forward

    model = network()
    called = torch.compile(model, backend=backend, fullgraph=True)
    outputs = [called(batch(0)) for _ in range(7)]
    gating_terms(model)
    outputs += [called(batch(0)) for _ in range(3)]
    gating_terms(model, loss=outputs[-1])
    called(batch(1))
    assert len(counts) == 1


def pending(model: Any) -> int:
    gc.collect()
    return sum(ref() is not None for ref in model.passes._nodes)


def test_a_pass_whose_terms_nobody_takes_leaves_nothing() -> None:
    model = network()
    for seed in range(3):
        model(batch(seed))
        assert pending(model) == 0
    output = model(batch(0))
    assert pending(model) == 1
    output.sum().backward()
    assert not model.passes.take()
    recomputed = checkpoint(model, batch(0).requires_grad_(), use_reentrant=False)
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())(recomputed, TARGET)
    loss.backward()
    del output, recomputed, loss
    assert pending(model) == 0


def test_an_exception_between_forward_and_take_leaves_nothing() -> None:
    model = network()
    with pytest.raises(ZeroDivisionError):
        _ = model(batch(0)).sum() / (1 // 0)
    output = model(batch(1))
    torch.testing.assert_close(gating_terms(model)['loss_gate'], gate_loss(model, batch(1)))
    del output


def test_frozen_gating_reports_what_it_keeps_and_holds_little() -> None:
    model = network(gate_loss_weight=None, freeze_gating=True)
    for seed in range(20):
        model(batch(seed))
    assert len(model.passes.take()) == 8
    output = model(batch(0))
    assert gating_terms(model, loss=output.sum()).keys() == {
        'kept_experts',
        'dynamic_experts',
        'gate_entropy',
        'use_entropy',
    }


def test_nothing_in_eval_mode_and_without_gradients() -> None:
    model = network()
    with torch.no_grad():
        model(batch(0))
        assert gating_terms(model) == {}
    output = model.eval()(batch(0))
    assert output.requires_grad
    assert gating_terms(model, loss=output.sum()) == {}
    assert gating_terms(nn.Linear(2, 2)) == {}


def test_several_networks_add_up() -> None:
    models = nn.ModuleList([network(), network()])
    outputs = [model(batch(seed)) for seed, model in enumerate(models)]
    terms = gating_terms(models)
    expected = sum(gate_loss(model, batch(seed)) for seed, model in enumerate(models))
    torch.testing.assert_close(terms['loss_gate'], expected)
    assert terms['kept_experts'] <= 1
    del outputs


def test_a_second_loss_copies_and_pickles_work() -> None:
    """Cells run again, folds by deepcopy, and torch.save of a model whose terms are pending."""
    model = network()
    DeepMoELoss(model, nn.CrossEntropyLoss())
    output = model(batch(0))
    twin, stored = copy.deepcopy(model), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (twin, torch.load(stored, weights_only=False)):
        assert not other.passes.take()
        loss = DeepMoELoss(other, nn.CrossEntropyLoss())
        loss(other(batch(0)), TARGET).backward()
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())
    loss(output, TARGET).backward()
    torch.testing.assert_close(model.gating.gates.weight.grad, twin.gating.gates.weight.grad)
    assert not model._forward_hooks
