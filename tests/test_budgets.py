"""Another budget for a trained network, by its threshold alone."""

import pytest
import torch
from small_networks import images, randomise, small

import deepmoe_plugin
from deepmoe_plugin import count_macs, gate_statistics, set_budget, sparsify


@pytest.mark.parametrize('structure', ['cifar', 'bottleneck_a', 'vgg_cifar'])
def test_images_spend_the_budget_and_gates_that_stay_keep_their_value(structure):
    model = randomise(small(structure)).eval()
    batch = images(16)
    before = torch.cat(model.gating(batch), 1)
    everything = model.spent(before > 0).mean().item()
    floor = model.spent(torch.zeros_like(before, dtype=torch.bool)).mean().item()
    goal = (everything + floor) / 2
    assert set_budget(model, batch, macs=goal) == pytest.approx(goal, abs=0.05)
    after = torch.cat(model.gating(batch), 1)
    assert ((after == before) | (after == 0)).all()
    report = count_macs(model, batch)
    gating = report.by_group['embedding'] + report.by_group['gate_heads']
    dense = sum(macs for group, macs in report.dense_by_group.items() if group not in ('embedding', 'gate_heads'))
    assert ((report.total - gating) / dense).mean().item() == pytest.approx(goal, abs=0.06)


def test_budgets_follow_one_another_and_a_checkpoint_keeps_them():
    model = randomise(small('cifar')).eval()
    loader = [(images(8, seed=i), None) for i in range(3)]
    kept = []
    for budget in (0.4, 0.2, 0.4):
        set_budget(model, loader, kept=budget)
        kept.append(gate_statistics(model, loader).kept_experts)
    assert kept == pytest.approx([0.4, 0.2, 0.4], abs=0.02)
    assert kept[0] == kept[2]
    twin = small('cifar').eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images(8)), model(images(8)))


def test_sparse_execution_follows_the_budget():
    model = randomise(small('cifar')).eval()
    fast = sparsify(model)
    fast(images(4))
    set_budget(model, images(16), kept=0.2)
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-4)


def test_a_budget_with_room_for_all_gates_opens_them_as_the_paper_has_them():
    model = randomise(small('cifar')).eval()
    before = model(images(4))
    set_budget(model, images(16), kept=0.1)
    assert not torch.equal(model(images(4)), before)
    set_budget(model, images(16), kept=1.0)
    assert torch.equal(model(images(4)), before)


@pytest.mark.parametrize(
    ('budget', 'words'),
    [
        (dict(), 'macs=0.4 or kept=0.5'),
        (dict(macs=0.5, kept=0.5), 'macs=0.4 or kept=0.5'),
        (dict(macs=1.5), 'macs must be a fraction'),
        (dict(kept=0), 'kept must be a fraction'),
        (dict(macs='half'), 'macs must be a number'),
        (dict(macs=0.01), 'cannot be reached'),
    ],
)
def test_refused_budgets(budget, words):
    with pytest.raises(ValueError, match=words):
        set_budget(small('cifar'), images(4), **budget)


def test_images_are_needed():
    with pytest.raises(ValueError, match='images is empty'):
        set_budget(small('cifar'), [], kept=0.5)
    with pytest.raises(ValueError, match='DeepMoE network'):
        deepmoe_plugin.set_budget(torch.nn.Linear(2, 2), images(4), kept=0.5)
