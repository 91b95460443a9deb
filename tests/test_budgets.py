"""Another budget for a trained network, by its threshold alone."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import images, randomise, small
from torch import nn

import deepmoe_plugin
from deepmoe_plugin import count_macs, gate_statistics, recalibrate_norms, set_budget, sparsify


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


@pytest.mark.parametrize('unit', ['macs', 'kept'])
def test_the_curve_gives_budgets_without_images(unit, tmp_path):
    model = randomise(small('cifar')).eval()
    batch = images(32)
    set_budget(model, batch, kept=0.3)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    twin = small('cifar').eval()
    twin.load_state_dict(torch.load(tmp_path / 'model.pth', weights_only=True))
    stats = gate_statistics(twin, batch)
    assert stats.kept_experts == pytest.approx(0.3, abs=0.01)
    most = twin.spent(torch.cat(model.gating(batch), 1) >= 0).mean().item()
    for share in (0.25, 0.4):
        goal = share * most
        assert set_budget(twin, **{unit: goal}) == pytest.approx(goal)
        kept = gate_statistics(twin, batch).kept
        spent = twin.spent(kept).mean() if unit == 'macs' else kept.double().mean()
        assert spent.item() == pytest.approx(goal, abs=0.01)
        by_images = copy.deepcopy(twin)
        set_budget(by_images, batch, **{unit: goal})
        assert twin.gating.gates.threshold.item() == pytest.approx(by_images.gating.gates.threshold.item(), abs=0.05)


def test_a_budget_above_the_curve_opens_all_gates():
    model = randomise(small('cifar')).eval()
    before = model(images(4))
    everything = gate_statistics(model, images(16)).kept_experts
    set_budget(model, images(16), kept=0.1)
    assert set_budget(model, kept=1.0) == pytest.approx(everything, abs=1e-6)
    torch.testing.assert_close(model(images(4)), before, rtol=0, atol=0)


def test_sparse_networks_of_one_checkpoint():
    model = randomise(small('cifar')).eval()
    set_budget(model, images(16), macs=0.4)
    for macs in (0.3, 0.25):
        fast = sparsify(model, macs=macs)
        kept = gate_statistics(model, images(16)).kept
        assert model.spent(kept).mean().item() == pytest.approx(macs, abs=0.02)
        torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-4)


def test_without_a_curve_images_are_asked_for():
    model = randomise(small('cifar'))
    with pytest.raises(ValueError, match=r'no budget curve: give images once.*macs=0\.4'):
        set_budget(model, macs=0.4)
    with pytest.raises(ValueError, match='no budget curve'):
        sparsify(model.eval(), macs=0.4)


def test_training_the_gates_forgets_the_curve_and_frozen_gates_keep_it():
    model = randomise(small('cifar', target_kept=0.5)).train()
    set_budget(model, images(16), kept=0.5)
    deepmoe_plugin.freeze_gating(model)
    deepmoe_plugin.gating_terms(model, loss=model(images(2)).sum())
    assert set_budget(model, kept=0.4) == pytest.approx(0.4)
    deepmoe_plugin.unfreeze_gating(model)
    deepmoe_plugin.gating_terms(model, loss=model(images(2)).sum())
    with pytest.raises(ValueError, match='no budget curve'):
        set_budget(model, kept=0.4)


def test_checkpoints_of_earlier_versions_have_no_curve():
    state = randomise(small('cifar')).state_dict()
    del state['gating.curve.points']
    model = small('cifar')
    model.load_state_dict(state)
    with pytest.raises(ValueError, match='no budget curve'):
        set_budget(model, kept=0.4)


def steps_of(model, count, seed=0):
    """Fraction of experts that each training step keeps."""
    kept = []
    for step in range(count):
        loss = model.train()(images(8, seed=seed + step)).sum()
        kept.append(deepmoe_plugin.gating_terms(model, loss=loss)['kept_experts'].item())
    return kept


def test_a_range_of_targets_draws_one_for_each_step():
    torch.manual_seed(0)
    model = randomise(small('cifar', target_kept=(0.2, 0.4), target_steps=1))
    kept = steps_of(model, 24)[2:]
    assert min(kept) == pytest.approx(0.2, abs=0.08)  # each threshold was found on the images of the step before
    assert max(kept) == pytest.approx(0.4, abs=0.08)
    assert sum(0.25 < share < 0.35 for share in kept) > 6
    # Evaluation spends the smallest, whatever the last step has drawn.
    batch = torch.cat([images(8, seed=step) for step in range(8)])
    norms = model.gating.embedding
    by_statistics_of_batch = model.gating.gates(norms.train()(batch)) > model.gating.gates.threshold
    assert by_statistics_of_batch.double().mean().item() == pytest.approx(0.2, abs=0.08)
    model.eval()
    assert torch.equal(
        torch.cat(model.gating(batch), 1) > 0, model.gating.gates(norms.eval()(batch)) > model.gating.threshold
    )
    assert model.gating.threshold is model.gating.gates.threshold


def test_a_resumed_training_draws_what_it_would_have_drawn():
    def fresh():
        torch.manual_seed(0)
        return randomise(small('cifar', target_kept=(0.2, 0.4), target_steps=1))

    whole = steps_of(fresh(), 6)
    first = fresh()
    steps_of(first, 3)
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert steps_of(second, 3, seed=3) == whole[3:]


@pytest.mark.parametrize('target', [(0.5, 0.4), (0.2, 0.3, 0.4), (0.4,), [0.5, 1.5]])
def test_refused_ranges(target):
    with pytest.raises(ValueError, match='target_macs must'):
        small('cifar', target_macs=target)


def norms_of(module):
    return {name: norm for name, norm in module.named_modules() if isinstance(norm, nn.BatchNorm2d)}


@pytest.mark.parametrize('as_loader', [False, True])
@pytest.mark.parametrize('structure', ['cifar', 'bottleneck_a', 'vgg_cifar'])
def test_norms_are_measured_with_the_experts_of_the_new_budget(structure, as_loader):
    model = randomise(small(structure)).eval()
    batch = images(64)
    set_budget(model, batch, kept=0.4)
    recalibrate_norms(model, [(batch, None), (batch, None)] if as_loader else batch)
    seen = {}
    for name, norm in norms_of(model).items():
        norm.register_forward_pre_hook(lambda _norm, args, name=name: seen.__setitem__(name, args[0]))
    model(batch)
    for name, norm in norms_of(model).items():
        if name.startswith('gating.'):
            continue
        off = (seen[name].mean((0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt()
        ratio = seen[name].var((0, 2, 3)) / norm.running_var
        assert off.abs().max() < 0.1, name  # the variance is unbiased only in running statistics
        assert (ratio[norm.running_var > 1e-8] - 1).abs().max() < 0.1, name


def test_measuring_norms_leaves_everything_else_as_it_was():
    network = randomise(small('cifar')).train()
    network.layer1.eval()
    model = nn.ModuleDict({'network': network, 'auxiliary': nn.BatchNorm2d(4)})
    model.forward = network.forward
    model['auxiliary'].running_mean.fill_(3)
    before, training = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match='images is empty'):
        recalibrate_norms(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    recalibrate_norms(model, images(16))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    base = [name for name in norms_of(network) if not name.startswith('gating.')]
    assert changed == {f'network.{name}.{kind}' for name in base for kind in ('running_mean', 'running_var')} | {
        f'network.{name}.num_batches_tracked' for name in base
    }
    assert [module.training for module in model.modules()] == training
    assert {norm.momentum for norm in norms_of(model).values()} == {0.1}


BUDGETS = (0.2, 0.35, 0.5)


def norm_statistics(model):
    norms = (norm for name, norm in norms_of(model).items() if not name.startswith('gating.'))
    return torch.cat([torch.cat([norm.running_mean, norm.running_var]) for norm in norms])


def test_checkpoint_with_the_norms_of_several_budgets(tmp_path):
    """`set_budget` finds those of a budget that was measured, and interpolates between two."""
    model = randomise(small('cifar')).eval()
    batch = images(32)
    low, middle, high = BUDGETS
    set_budget(model, batch, macs=middle)
    set_budget(model, macs=low)
    threshold = model.gating.gates.threshold.clone()
    single = {}
    for budget in (low, high):
        twin = copy.deepcopy(model)
        set_budget(twin, macs=budget)
        recalibrate_norms(twin, batch)
        single[budget] = norm_statistics(twin)
    recalibrate_norms(model, batch, macs=(high, low))
    assert torch.equal(model.gating.gates.threshold, threshold)
    assert torch.equal(norm_statistics(model), single[low])
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    loaded = small('cifar').eval()
    loaded.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    for budget in (high, low):
        assert not torch.equal(norm_statistics(loaded), single[budget])
        set_budget(loaded, macs=budget)
        torch.testing.assert_close(norm_statistics(loaded), single[budget])
    set_budget(loaded, batch, macs=middle)
    between = norm_statistics(loaded)
    assert (between >= torch.minimum(single[low], single[high]) - 1e-6).all()
    assert (between <= torch.maximum(single[low], single[high]) + 1e-6).all()
    assert not torch.equal(between, single[low])


def one_step(model):
    model.train()(images(4))


def one_budget(model):
    recalibrate_norms(model, images(4))


@pytest.mark.parametrize('outdate', [one_step, one_budget])
def test_norms_of_several_budgets_count_until_they_are_measured_anew(outdate):
    model = randomise(small('cifar')).eval()
    set_budget(model, images(16), macs=0.4)
    recalibrate_norms(model, images(32), macs=BUDGETS)
    outdate(model)
    before = norm_statistics(model)
    set_budget(model, macs=BUDGETS[0])
    assert torch.equal(norm_statistics(model), before)


def test_other_experts_make_a_network_forget_its_budgets():
    model = randomise(small('cifar')).eval()
    set_budget(model, images(16), kept=0.5)
    recalibrate_norms(model, images(8), macs=BUDGETS)
    smaller = deepmoe_plugin.prune(model, [images(16)])
    assert smaller.gating.norm_curve.thresholds is None
    with pytest.raises(ValueError, match='no budget curve'):
        set_budget(smaller, macs=0.5)


@pytest.mark.parametrize(
    ('loader', 'budgets', 'message'), [([], BUDGETS, 'images is empty'), ([None], (0.5, 2), 'macs must be a fraction')]
)
def test_what_cannot_be_measured_changes_nothing(loader, budgets, message):
    model = randomise(small('cifar')).eval()
    set_budget(model, images(16), kept=0.5)
    recalibrate_norms(model, images(8), macs=BUDGETS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        recalibrate_norms(model, loader, macs=budgets)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_network_without_batch_norms_takes_budgets_alike():
    model = randomise(small('convnext')).eval()
    set_budget(model, images(16), kept=0.5)
    recalibrate_norms(model, images(8), macs=(0.8, 0.9))
    assert set_budget(model, macs=0.85) <= 0.85
