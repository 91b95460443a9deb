"""J = L_b + lambda L_g + mu L_e: each term against its closed form, and the loop of a direct user."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import images, randomise, small
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from deepmoe_plugin import DeepMoELoss
from deepmoe_plugin.macs import MacsTable

CLASSES = torch.tensor([1, 2])


def gates_of(model, x):
    """Gates as the training pass computes them, from a copy so that the norm statistics stay."""
    twin = copy.deepcopy(model)
    return torch.cat(twin.gating(x), dim=1)


def run(model, target=CLASSES, criterion=None, x=None):
    """One pass of the loss; returns J, L_b and the terms."""
    criterion = criterion or nn.CrossEntropyLoss()
    loss = DeepMoELoss(model, criterion)
    output = model(images() if x is None else x)
    return loss(output, target), criterion(output, target), loss.terms


@pytest.mark.parametrize('structure', ['bottleneck_a', 'vgg_cifar'])
@pytest.mark.parametrize('gate_norm', ['mean', 'sum', 'macs'])
def test_gate_loss_is_its_closed_form(structure, gate_norm):
    model = randomise(small(structure, gate_norm=gate_norm, gate_loss_weight=0.3))
    gates = gates_of(model, images())
    assert (gates == 0).any()
    if gate_norm == 'mean':
        expected = gates.sum() / gates.numel()
    elif gate_norm == 'sum':
        expected = sum(gate.abs().sum() for gate in gates) / len(gates)
    else:
        expected = (gates * expert_costs(model)).sum(1).mean()
    total, base, terms = run(model)
    torch.testing.assert_close(terms['loss_gate'], 0.3 * expected)
    torch.testing.assert_close(total, base + 0.3 * expected)
    torch.testing.assert_close(terms['kept_experts'], (gates > 0).float().mean())
    assert not any(term.requires_grad for term in terms.values())


def expert_costs(model):
    """Weight of each expert by hand: MACs of its row in its convolution and of its column in the consumer."""
    shares = []
    costs = {cost.name: cost.macs for cost in MacsTable(model, model.default_cfg['input_size'][1:]).costs}
    for layer, width in zip(model.expert_layers, model.gating.gates.widths, strict=True):
        macs = costs[layer.conv] + (costs[layer.consumer] if layer.consumer else 0)
        shares.append(torch.full((width,), macs / width))
    return torch.cat(shares) / torch.cat(shares).sum()


def test_every_norm_is_one_at_the_start_except_the_sum():
    for gate_norm, expected in (('mean', 1), ('macs', 1), ('sum', 32 * 4)):
        model = small('cifar', gate_norm=gate_norm)
        experts = sum(model.gating.gates.widths)
        terms = run(model)[2]
        torch.testing.assert_close(terms['loss_gate'], torch.tensor(float(expected if expected == 1 else experts)))


def tiny(**kwargs):
    """A network that trains at milliseconds a step."""
    return small('vgg_cifar', layout=(8, 'M', 12, 'M'), num_latent_experts=4, embedding_channels=(4, 8), **kwargs)


def train_gates(model, steps):
    """Train the gating network, return the fraction of experts kept at each step."""
    optimizer = torch.optim.SGD(model.gating.parameters(), lr=4)
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())
    kept = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(model(images(4, 16, seed=step % 8)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        kept.append(loss.terms['kept_experts'].item())
    return kept


def test_gate_loss_closes_gates():
    kept = train_gates(tiny(gate_loss_weight=5), 60)
    assert kept[0] == 1
    assert kept[-1] < 0.5


def run_again(model):
    result = run(model)
    model._forward_hooks.clear()
    return result


def test_weight_zero_leaves_the_base_loss():
    total, base, terms = run(small('cifar', gate_loss_weight=0))
    torch.testing.assert_close(terms['gate_entropy'], torch.tensor(6.0))  # of 64 equal weights
    torch.testing.assert_close(terms['use_entropy'], torch.tensor(6.0))
    assert 'loss_gate' not in terms
    assert 'loss_embed' not in terms
    torch.testing.assert_close(total, base, rtol=0, atol=0)


def embedding_logits(model, x):
    model = copy.deepcopy(model)
    output = model(x)
    return model.passes.take(output)[0].embed_logits


@pytest.mark.parametrize(
    ('criterion', 'target'),
    [
        (nn.CrossEntropyLoss(), CLASSES),
        (LabelSmoothingCrossEntropy(0.1), CLASSES),
        (SoftTargetCrossEntropy(), torch.rand(2, 10).softmax(1)),
        (BinaryCrossEntropy(smoothing=0.1), CLASSES),
        (nn.BCEWithLogitsLoss(), (torch.rand(2, 10) > 0.5).float()),
    ],
    ids=['hard', 'smoothed', 'soft', 'binary', 'multi-label'],
)
def test_embedding_loss_is_the_criterion_on_the_embeddings_classifier(criterion, target):
    model = randomise(small('cifar', embed_loss_weight=0.7, gate_loss_weight=0))
    expected = 0.7 * criterion(embedding_logits(model, images()), target)
    total, base, terms = run(model, target, criterion)
    torch.testing.assert_close(terms['loss_embed'], expected.detach())
    torch.testing.assert_close(total, base + expected)
    total.backward()
    assert model.gating.class_scores.weight.grad.abs().sum() > 0


def test_no_embedding_loss_creates_no_parameter():
    with_loss = {name for name, _ in small('cifar', embed_loss_weight=1).named_parameters()}
    without = {name for name, _ in small('cifar').named_parameters()}
    assert with_loss - without == {'gating.class_scores.weight', 'gating.class_scores.bias'}


def test_plain_cross_entropy_leaves_no_parameter_without_gradient():
    model = small('cifar')
    nn.functional.cross_entropy(model(images()), CLASSES).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_both_weights_are_zero_when_frozen():
    model = randomise(small('cifar', freeze_gating=True))
    total, base, terms = run(model)
    torch.testing.assert_close(total, base, rtol=0, atol=0)
    assert not any('loss' in name for name in terms)


# A hand-written loop


def test_gradient_of_the_whole_objective():
    model = randomise(small('cifar', embed_loss_weight=1, gate_loss_weight=0.5)).double()
    x = images(dtype=torch.float64)
    twin = copy.deepcopy(model)
    output = twin(x)
    (record,) = twin.passes.take()
    objective = F.cross_entropy(output, CLASSES) + 0.5 * record.preact.relu().mean()
    (objective + F.cross_entropy(record.embed_logits, CLASSES)).backward()
    run(model, x=x)[0].backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_two_forward_passes_before_one_backward_pass():
    model = randomise(small('cifar', embed_loss_weight=1)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0
    batches = [images(seed=seed, dtype=torch.float64) for seed in (0, 1)]
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())
    outputs = [model(x) for x in batches]
    sum(loss(output, CLASSES) for output in outputs).backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for x in batches:
        loss(model(x), CLASSES).backward()
    torch.testing.assert_close(together, [parameter.grad for parameter in model.parameters()])


def test_evaluation_returns_the_plain_criterion():
    model = randomise(small('cifar', embed_loss_weight=1)).eval()
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())
    output = model(images())
    torch.testing.assert_close(loss(output, CLASSES), F.cross_entropy(output, CLASSES), rtol=0, atol=0)


def test_loss_does_not_own_the_network():
    model = small('cifar')
    loss = DeepMoELoss(model, nn.CrossEntropyLoss())
    assert not list(loss.parameters())
    assert model.state_dict().keys() == small('cifar').state_dict().keys()


# The budget


@pytest.mark.parametrize('target', [dict(target_kept=0.5), dict(target_macs=0.6)])
def test_with_a_target_the_threshold_closes_gates_and_nothing_is_added_to_the_loss(target):
    model = randomise(small('cifar', target_steps=1, **target)).train()
    for _ in range(60):
        terms = run_again(model)[2]
    assert 'loss_gate' not in terms
    assert 0 < terms['kept_experts'] < 0.7
    assert 0 < terms['dynamic_experts'] <= 1
    spent = model._macs().spent(torch.cat(model.gating(images()), 1) > 0).mean()
    assert (terms['kept_experts'] if 'target_kept' in target else spent).item() == pytest.approx(
        next(iter(target.values())), abs=0.05
    )


def test_norm_still_presses_on_the_gates_where_its_weight_is_given_with_a_target():
    terms = run_again(small('cifar', target_kept=0.5, gate_loss_weight=0.1))[2]
    assert terms['loss_gate'].item() == pytest.approx(0.1, rel=1e-4)


def test_training_with_a_target_reaches_it():
    torch.manual_seed(0)
    kept = train_gates(tiny(target_kept=0.4, target_steps=200), 400)
    assert kept[0] == 1
    assert abs(sum(kept[-100:]) / 100 - 0.4) < 0.1
