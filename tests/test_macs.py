"""MACs of every image, against sums done by hand."""

import pytest
import timm
import torch
from small_networks import SMALL, FixedGates, images, randomise, small
from torch import nn

from deepmoe_plugin import count_macs
from deepmoe_plugin.macs import GROUPS, MacsTable, module_costs
from deepmoe_plugin.stats import kept_experts

structures = pytest.mark.parametrize('structure', SMALL)


def close(model, counts):
    """Make the network keep the first `counts[l]` experts of layer l, whatever the image."""
    with torch.no_grad():
        model.gating.heads.weight.fill_(-1)
        start = 0
        for width, count in zip(model.gating.heads.widths, counts, strict=True):
            model.gating.heads.weight[start : start + count] = 1
            start += width


def test_dense_vgg_by_hand():
    model = timm.create_model('vgg16_cifar', layout=(8, 'M', 12, 'M'), num_classes=10)
    report = count_macs(model, images(2, 16))
    by_hand = [9 * 3 * 8 * 16 * 16, 9 * 8 * 12 * 8 * 8, 12 * 10]
    assert [column.tolist() for column in report.by_module.values()] == [[macs, macs] for macs in by_hand]
    assert report.total.tolist() == [sum(by_hand)] * 2
    assert report.dense_total == sum(by_hand)
    assert report.dense_by_group == dict(base=sum(by_hand[:2]), shortcut=0, head=120, embedding=0, gate_heads=0)


def test_gated_vgg_by_hand():
    model = timm.create_model(
        'narrow_deepmoe_vgg16_cifar',
        layout=(8, 'M', 12, 'M'),
        num_classes=10,
        embedding_channels=(4, 5),
        num_latent_experts=6,
    )
    close(model, (3, 5))
    report = count_macs(model, images(1, 16))
    # The second convolution shrinks on both sides; the classifier reads pooled features, counted dense.
    assert report.by_group['base'].tolist() == [9 * 3 * 3 * 16 * 16 + 9 * 3 * 5 * 8 * 8]
    assert report.by_group['head'].tolist() == [12 * 10]
    assert report.by_group['embedding'].tolist() == [9 * 3 * 4 * 8 * 8 + 9 * 4 * 5 * 4 * 4 + 5 * 6]
    assert report.by_group['gate_heads'].tolist() == [6 * (8 + 12)]


def test_gated_basic_block_by_hand():
    model = timm.create_model('narrow_deepmoe_resnet20_cifar', layers=(1, 1, 1), num_classes=10)
    close(model, (4, 8, 16))
    report = count_macs(model, images(1, 32))
    stem = 9 * 3 * 16 * 1024
    blocks = [9 * (16 * 4 + 4 * 16) * 1024, 9 * (16 * 8 + 8 * 32) * 256, 9 * (32 * 16 + 16 * 64) * 64]
    assert report.by_group['base'].tolist() == [stem + sum(blocks)]
    assert report.by_group['shortcut'].tolist() == [0]
    assert report.by_group['head'].tolist() == [640]


def test_gated_bottleneck_by_hand():
    kwargs = dict(layers=(1, 1, 1, 1), widen=1, num_classes=10)
    model = timm.create_model('wide_deepmoe_resnet50', **kwargs)
    widths = model.gating.heads.widths
    close(model, [width // 4 for width in widths])
    by_module = count_macs(model, images(1, 64)).by_module
    assert by_module['layer1.0.conv1'].tolist() == [64 * 16 * 256]
    assert by_module['layer1.0.conv2'].tolist() == [9 * 16 * 16 * 256]
    assert by_module['layer1.0.conv3'].tolist() == [16 * 256 * 256]
    assert by_module['layer1.0.downsample.0'].tolist() == [64 * 256 * 256]
    only_3x3 = timm.create_model('wide_deepmoe_resnet50b', **kwargs)
    close(only_3x3, [width // 4 for width in only_3x3.gating.heads.widths])
    by_module = count_macs(only_3x3, images(1, 64)).by_module
    assert by_module['layer1.0.conv1'].tolist() == [64 * 64 * 256]
    assert by_module['layer1.0.conv2'].tolist() == [9 * 64 * 16 * 256]


@structures
def test_groups_and_modules_add_up(structure):
    model = randomise(small(structure))
    report = count_macs(model, images(3))
    assert tuple(report.by_group) == GROUPS
    assert torch.equal(torch.stack(list(report.by_module.values())).sum(0), report.total)
    assert (report.total <= report.dense_total).all()
    names = dict(model.named_modules())
    measured = {name for name, m in names.items() if isinstance(m, nn.Conv2d | nn.Linear)} | {'gating.heads'}
    assert report.by_module.keys() == measured


@structures
def test_images_of_a_batch_are_counted_one_by_one(structure):
    model = randomise(small(structure)).eval()
    x = images(5)
    together = count_macs(model, x)
    assert len(set(together.total.tolist())) > 1, 'the images should differ, or this shows nothing'
    alone = [count_macs(model, x[i : i + 1]) for i in range(5)]
    assert together.total.tolist() == [report.total.item() for report in alone]
    for name, column in together.by_module.items():
        assert column.tolist() == [report.by_module[name].item() for report in alone]


@structures
def test_all_experts_kept_cost_the_dense_network(structure):
    gated = count_macs(small(structure), images(1))
    dense = count_macs(small(structure, gated=False), images(1))
    for group in ('base', 'shortcut', 'head'):
        assert gated.by_group[group].tolist() == dense.by_group[group].tolist() == [gated.dense_by_group[group]]
    assert gated.total.tolist() == [gated.dense_total]


@structures
def test_counts_are_those_of_the_gates_that_the_network_uses(structure):
    model = randomise(small(structure)).eval()
    x = images(3)
    gates = model.gating(x)
    torch.testing.assert_close(kept_experts(model, x), torch.cat(gates, 1) > 0)
    report = count_macs(model, x)
    costs = {cost.name: cost.macs for cost in module_costs(model, (32, 32))}
    for i, layer in enumerate(model.expert_layers):
        reads = [j for j, other in enumerate(model.expert_layers) if other.consumer == layer.conv]
        inputs = (gates[reads[0]] > 0).double().mean(1) if reads else 1
        expected = costs[layer.conv] * (gates[i] > 0).double().mean(1) * inputs
        torch.testing.assert_close(report.by_module[layer.conv].double(), expected, rtol=0, atol=1)


def test_counting_changes_nothing():
    model = randomise(small('cifar', embed_loss_weight=1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    count_macs(model, images())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.gating.take_record() is None


def test_gates_follow_running_statistics_in_training_mode_too():
    model = randomise(small('cifar'))
    assert count_macs(model.train(), images()).total.tolist() == count_macs(model.eval(), images()).total.tolist()


@pytest.mark.parametrize('structure', ['cifar', 'vgg'])
def test_a_wrapper_changes_no_count(structure):
    model = randomise(small(structure))
    plain = count_macs(model, images())
    wrapped = count_macs(nn.Sequential(model), images())
    assert wrapped.dense_by_group == plain.dense_by_group
    assert {name: macs.tolist() for name, macs in wrapped.by_group.items()} == {
        name: macs.tolist() for name, macs in plain.by_group.items()
    }


def test_features_only_network():
    model = small('cifar', features_only=True, out_indices=(1, 2))
    report = count_macs(model, images(1))
    assert report.by_group['head'].tolist() == [0]
    assert report.by_group['base'].tolist() == [report.dense_by_group['base']]
    stem_only = count_macs(small('cifar', features_only=True, out_indices=(0,)), images(2))
    assert stem_only.total.tolist() == [9 * 3 * 16 * 1024] * 2


@structures
def test_shares_of_the_experts_add_up(structure):
    table = MacsTable(small(structure), (32, 32))
    shares = table.expert_costs()
    assert len(shares) == sum(table.widths)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    assert (shares > 0).all()


@structures
def test_fraction_spent(structure):
    table = MacsTable(small(structure), (32, 32))
    everything = torch.ones(2, sum(table.widths), dtype=torch.bool)
    torch.testing.assert_close(table.spent(everything), torch.ones(2, dtype=torch.float64))
    assert (table.spent(~everything) < 1).all()


def test_several_networks_are_refused():
    pair = nn.ModuleList([small('cifar'), small('cifar')])
    with pytest.raises(ValueError, match='at most one DeepMoE network'):
        count_macs(pair, images())


def test_stub_gates_are_no_gating_network():
    model = small('cifar')
    model.gating = FixedGates([])
    with pytest.raises(AttributeError):
        count_macs(model, images())
