"""MACs of every image, against sums done by hand."""

import copy
import math
import time

import pytest
import timm
import torch
from small_networks import SMALL, FixedGates, images, randomise, small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepmoe_plugin import count_macs, sparsify
from deepmoe_plugin.macs import GROUPS, MacsTable, macs_table, module_costs
from deepmoe_plugin.stats import kept_experts

structures = pytest.mark.parametrize('structure', SMALL)
dense_networks = pytest.mark.parametrize(
    ('name', 'kwargs', 'size'),
    [
        ('resnet18', {}, 64),
        ('resnet20_cifar', dict(widen=2), 32),
        ('drn_a_50', dict(layers=(1, 1, 1, 1)), 64),
        ('wide_deepmoe_resnet50b', dict(layers=(1, 1, 1, 1), gated=False), 64),
        ('vgg16_cifar', {}, 32),
        ('convnext_atto', {}, 64),
    ],
)


def close(model, counts):
    """Make the network keep the first `counts[l]` experts of layer l, whatever the image; whole groups of them."""
    gates = model.gating.gates
    with torch.no_grad():
        gates.weight.fill_(-1)
        start = 0
        for width, count in zip(gates.widths, counts, strict=True):
            gates.weight[start : start + math.ceil(count / gates.experts_per_gate)] = 1
            start += width // gates.experts_per_gate


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
    widths = model.gating.gates.widths
    close(model, [width // 4 for width in widths])
    by_module = count_macs(model, images(1, 64)).by_module
    assert by_module['layer1.0.conv1'].tolist() == [64 * 16 * 256]
    assert by_module['layer1.0.conv2'].tolist() == [9 * 16 * 16 * 256]
    assert by_module['layer1.0.conv3'].tolist() == [16 * 256 * 256]
    assert by_module['layer1.0.downsample.0'].tolist() == [64 * 256 * 256]
    only_3x3 = timm.create_model('wide_deepmoe_resnet50b', **kwargs)
    close(only_3x3, [width // 4 for width in only_3x3.gating.gates.widths])
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
    measured = {name for name, m in names.items() if isinstance(m, nn.Conv2d | nn.Linear)} | {'gating.gates'}
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


def test_convnext_tiny_by_hand():
    blocks = [(3, 56, 96), (3, 28, 192), (9, 14, 384), (3, 7, 768)]  # number, side of the map, channels
    hidden = sum(number * side**2 * 2 * 4 * channels**2 for number, side, channels in blocks)
    depthwise = sum(number * side**2 * 49 * channels for number, side, channels in blocks)
    stem = 56**2 * 96 * 4 * 4 * 3
    downsampling = sum(side**2 * channels * (channels // 2) * 2 * 2 for _, side, channels in blocks[1:])
    model = timm.create_model('narrow_deepmoe_convnext_tiny', device='meta')
    table = MacsTable(model, (224, 224))
    assert table.dense(('base',)) == hidden + depthwise + stem + downsampling == 4_454_763_264
    assert hidden == 4_161_798_144  # 93 %
    kept = torch.cat([torch.arange(width) < width // 4 for width in table.widths])[None]
    report = table.report(kept)
    assert report.by_group['base'].item() == hidden // 4 + depthwise + stem + downsampling
    assert report.by_group['shortcut'].item() == 0


def test_counting_changes_nothing():
    model = randomise(small('cifar', embed_loss_weight=1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    count_macs(model, images())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.passes.take()


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


# Against other ways to count


def executed_macs(model, x):
    """MACs of the convolutions and matrix products that PyTorch really runs."""

    def in_place_product(total, a, b, **_):  # PyTorch itself only knows the one that makes a new tensor
        return 2 * a[0] * a[1] * b[1]

    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter,
        torch.no_grad(),
    ):
        model(x)
    return counter.get_total_flops() / 2


@dense_networks
def test_dense_networks_against_pytorch(name, kwargs, size):
    model = timm.create_model(name, **kwargs).eval()
    x = images(1, size)
    assert count_macs(model, x).total.item() == executed_macs(model, x)


@dense_networks
@pytest.mark.filterwarnings('ignore')
def test_dense_networks_against_fvcore(name, kwargs, size):
    fvcore = pytest.importorskip('fvcore.nn')
    model = timm.create_model(name, **kwargs).eval()
    x = images(1, size)
    counted = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
    assert count_macs(model, x).total.item() == counted['conv'] + counted['linear']


def without_head_conv(report):
    """The head's first convolution of a VGG runs as sums of weight rows, which no counter of products sees."""
    return report.total - report.by_module.get('pre_logits.fc1', torch.zeros(()))


@structures
@pytest.mark.parametrize('case', ['random', 'all kept', 'one kept'])
def test_counts_are_those_of_sparse_execution(structure, case):
    model = randomise(small(structure)).double().eval()
    if case != 'random':
        close(model, [width if case == 'all kept' else 1 for width in model.gating.gates.widths])
    x = images(1, dtype=torch.float64)
    sparse = sparsify(model, cache_mb=0)
    for segment in sparse.executor.by_torch().segments():
        segment.steps = [1] * len(segment.steps)  # by default it computes a few experts more, for repeated shapes
        segment.limits = [1] * len(segment.limits)
    counted = without_head_conv(count_macs(model, x)).item()
    assert executed_macs(sparse, x) == counted
    # As it comes, sparse execution runs at least what the gates keep and at most the dense network.
    most = count_macs(model, x).dense_total
    assert counted <= executed_macs(sparsify(model, cache_mb=0), x) <= most


class Segmentor(nn.Module):
    """What the counter knows of a segmentor: a backbone, what follows it, and a call with images alone."""

    def __init__(self, backbone, channels):
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.ConvTranspose2d(6, 5, 2, stride=2))
        self.auxiliary_head = nn.Conv2d(channels, 5, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.decode_head(self.backbone(inputs)[-1])


@pytest.mark.parametrize('gated', [True, False])
def test_segmentor(gated):
    backbone = randomise(small('basic', features_only=True, gated=gated)).eval()
    model = Segmentor(backbone, 512)
    x = images(3, 64)
    own, report = count_macs(backbone, x), count_macs(model, x)
    assert report.by_group['head'].tolist() == [9 * 512 * 6 * 2 * 2 + 6 * 5 * 2 * 2 * 4 * 1] * 3
    for group in ('base', 'shortcut', 'embedding', 'gate_heads'):
        assert report.by_group[group].tolist() == own.by_group[group].tolist()
    assert {f'backbone.{name}' for name in own.by_module} < report.by_module.keys()
    assert not any('auxiliary' in name for name in report.by_module)


def test_every_call_of_a_module_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3, 7)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x)).flatten(2).mT)

    report = count_macs(Twice(), images(2, 8))
    assert report.by_module['conv'].tolist() == [2 * 9 * 3 * 3 * 64] * 2
    assert report.by_module['fc'].tolist() == [64 * 3 * 7] * 2
    assert report.total.tolist() == [report.dense_total] * 2


def test_count_without_shortcuts():
    model = randomise(small('basic'))
    report = count_macs(model, images(3))
    assert (report.by_group['shortcut'] > 0).all()
    assert torch.equal(report.without_shortcuts + report.by_group['shortcut'], report.total)


def test_only_shortcuts_count_as_shortcuts():
    report = count_macs(timm.create_model('convnext_atto'), images(1, 64))
    assert any('.downsample.' in name for name in report.by_module)
    assert report.by_group['shortcut'].tolist() == [0]


@structures
def test_counting_runs_no_layer_of_the_base_network_again(structure, monkeypatch):
    """Counting costs less than a forward pass: the second count of a size runs the gating network and nothing else."""
    model = randomise(small(structure)).eval()
    x = images(2)
    first = count_macs(model, x)
    calls = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    second = count_macs(model, x)
    assert calls
    assert all(name.startswith('gating.') for name in calls)
    assert second.total.tolist() == first.total.tolist()


def test_counting_a_large_network_takes_less_time_than_a_forward_pass():
    model = timm.create_model('wide_deepmoe_resnet50').eval()
    x = images(1, 224)
    counts, passes = [], []
    with torch.no_grad():
        for _ in range(3):
            for run, seconds in ((lambda: count_macs(model, x), counts), (lambda: model(x), passes)):
                start = time.process_time()
                run()
                seconds.append(time.process_time() - start)
    assert counts[0] < min(passes)  # the first one runs the network on the meta device as well
    assert min(counts) < 0.2 * min(passes)


def test_table_follows_changes_of_the_model_and_of_the_image_size():
    model = small('cifar')
    table = macs_table(model, (32, 32))
    assert macs_table(model, (32, 32)) is table
    assert macs_table(model, (40, 32)).dense() > table.dense()
    assert macs_table(model, (32, 32)).dense() == table.dense()
    twin = copy.deepcopy(model)
    twin.reset_classifier(20)
    assert macs_table(twin, (32, 32)).dense() == table.dense() + 10 * 64
    model.reset_classifier(20)
    assert macs_table(model, (32, 32)).dense() == table.dense() + 10 * 64


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(ValueError, match='Linear has no convolution'):
        count_macs(nn.Linear(3, 4), images())


def test_several_networks_are_refused():
    pair = nn.ModuleList([small('cifar'), small('cifar')])
    with pytest.raises(ValueError, match='at most one DeepMoE network'):
        count_macs(pair, images())


def test_stub_gates_are_no_gating_network():
    model = small('cifar')
    model.gating = FixedGates([])
    with pytest.raises(AttributeError):
        count_macs(model, images())
