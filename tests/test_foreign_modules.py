"""What users put on inner modules is executed as it is, or refused by name: by sparse execution, pruning, counting."""

import types

import pytest
import torch
import torch.nn.utils.prune
from small_networks import images, randomise, small
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import deepmoe_plugin
from deepmoe_plugin.models.deepmoe_resnet import WideResNet


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5)


class Adapter(nn.Module):
    """As LoRA has it: the layer itself, and a product of two thin ones beside it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def replaced(kind: type[nn.Conv2d]):
    """Put a convolution of another kind in the place of one, with its weights."""

    def change(model: nn.Module, name: str) -> None:
        conv = model.get_submodule(name)
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        other = kind(*sizes, bias=conv.bias is not None)
        other.load_state_dict(conv.state_dict(), strict=False)
        model.set_submodule(name, other)

    return change


def on(change):
    """A change made to the module itself."""
    return lambda model, name: change(model.get_submodule(name))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


def pre_hooked(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: 2 * args[0])


def patched(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, *args: 2 * type(self).forward(self, *args), module)


CONV_CHANGES = {
    'StdConv2d': replaced(StdConv2d),
    'ScaledStdConv2d': replaced(ScaledStdConv2d),
    'subclass': replaced(Doubled),
    'adapter': lambda model, name: model.set_submodule(name, Adapter(model.get_submodule(name))),
    'weight_norm': on(lambda conv: nn.init.ones_(parametrizations.weight_norm(conv).parametrizations.weight.original0)),
    'spectral_norm': on(parametrizations.spectral_norm),
    'old_spectral_norm': on(nn.utils.spectral_norm),
    'pruning_mask': on(lambda conv: nn.utils.prune.random_unstructured(conv, 'weight', 0.5)),
    'hook': on(hooked),
    'pre_hook': on(pre_hooked),
    'patched': on(patched),
}  # fmt: skip
CONVS = {
    'basic': ['conv1', 'layer2.0.conv1', 'layer2.0.conv2', 'layer2.0.downsample.0'],
    'bottleneck_b': ['layer1.0.conv1', 'layer1.0.conv2', 'layer1.0.conv3'],
    'vgg': ['features.0', 'features.4', 'pre_logits.fc1', 'pre_logits.fc2'],
}


def outcome(model: nn.Module, name: str) -> str:
    """'refused' with a sentence that names the module, or 'exact': what both may be, and nothing else."""
    model.eval()
    try:
        sparse = deepmoe_plugin.sparsify(model, cache_mb=0)
    except ValueError as error:
        return 'refused' if name in str(error) else str(error)
    with torch.no_grad():
        expected = model(images(3))
        # To rounding, which is relative to the largest output.
        atol = 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(sparse(images(3)), expected, rtol=1e-4, atol=atol)
    return 'exact'


@pytest.mark.parametrize('change', CONV_CHANGES.values(), ids=CONV_CHANGES)
@pytest.mark.parametrize(('structure', 'name'), [(s, name) for s, names in CONVS.items() for name in names])
def test_convolutions_that_are_more_than_they_seem(structure, name, change):
    model = randomise(small(structure))
    expected = model.eval()(images(3))
    change(model, name)
    assert not torch.allclose(model.eval()(images(3)), expected, rtol=1e-3)  # it matters
    is_dense = name == 'conv1' or 'downsample' in name or 'pre_logits' in name
    assert outcome(model, name) == ('exact' if is_dense else 'refused')


@pytest.mark.parametrize('change', [hooked, pre_hooked, patched])
@pytest.mark.parametrize(
    ('structure', 'name', 'result'),
    [
        ('basic', 'bn1', 'exact'),
        ('basic', 'layer1', 'exact'),
        ('basic', 'layer1.0', 'refused'),
        ('basic', 'layer1.0.bn1', 'refused'),
        ('basic', 'layer1.0.act1', 'refused'),
        ('basic', 'layer1.0.act1.act', 'refused'),
        ('basic', 'layer1.0.act2', 'exact'),
        ('basic', 'layer2.0.downsample', 'exact'),
        ('basic', 'fc', 'exact'),
        ('basic', 'global_pool', 'exact'),
        ('basic', 'gating.embedding', 'exact'),
        ('basic', '', 'exact'),
        ('vgg', 'features', 'refused'),
        ('vgg', 'features.3', 'refused'),
        ('vgg', 'head.fc', 'exact'),
        ('vgg', '', 'exact'),
    ],
)
def test_hooks_on_other_modules(structure, name, result, change):
    if change is pre_hooked and name == 'layer1':
        pytest.skip('a stage takes the gates as well, which a hook passes on only if it knows of them')
    model = randomise(small(structure))
    module = model.get_submodule(name)
    if change is hooked and name == 'global_pool':
        module.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        change(module)
    if change is pre_hooked and name in ('layer1.0', 'layer1.0.act1', 'features'):
        with pytest.raises(ValueError, match=name):
            deepmoe_plugin.sparsify(model)
        return
    assert outcome(model, name) == result


@pytest.mark.parametrize(
    ('structure', 'name', 'module', 'result'),
    [
        ('basic', 'bn1', lambda m: DoubledNorm(64), 'exact'),
        ('basic', 'layer1.0.bn1', lambda m: DoubledNorm(m.num_features), 'refused'),
        ('basic', 'layer1.0.bn1', lambda m: nn.SyncBatchNorm(m.num_features), 'exact'),
        ('basic', 'layer2.0.downsample.1', lambda m: DoubledNorm(m.num_features), 'exact'),
        ('basic', 'act1', lambda m: Shifted(), 'exact'),
        ('basic', 'layer1.0.act1.act', lambda m: Shifted(), 'exact'),
        ('basic', 'layer1.0.act1.act', lambda m: nn.PReLU(), 'exact'),
        ('basic', 'layer1.0.act1.act', lambda m: nn.PReLU(16), 'refused'),
        ('basic', 'layer1.0.act1.act', lambda m: nn.Softmax2d(), 'refused'),
        ('basic', 'layer1.0.act2', lambda m: Shifted(), 'exact'),
        ('basic', 'layer1.0.act2', lambda m: nn.Softmax2d(), 'exact'),
        ('basic', 'layer1.0.drop_block', lambda m: nn.Dropout2d(), 'exact'),
        ('basic', 'layer1.0.drop_block', lambda m: nn.Hardtanh(), 'refused'),
        ('basic', 'layer1.0.drop_path', lambda m: nn.Hardtanh(), 'refused'),
        ('basic', 'layer1.0.se', lambda m: nn.Hardtanh(), 'exact'),
        ('basic', 'layer2.0.aa', lambda m: nn.AvgPool2d(1), 'exact'),
        ('basic', 'layer2.0.aa', lambda m: nn.Softmax2d(), 'refused'),
        ('basic', 'layer2.0.downsample', lambda m: nn.Sequential(m, nn.Hardtanh()), 'exact'),
        ('vgg', 'features.3', lambda m: nn.Sequential(m, nn.Conv2d(8, 8, 1)), 'refused'),
        ('vgg', 'features.3', lambda m: nn.AvgPool2d(2), 'exact'),
    ],
)
def test_other_modules_in_their_place(structure, name, module, result):
    model = randomise(small(structure))
    block, child = name.rsplit('.', 1) if '.' in name else ('', name)
    block = model.get_submodule(block)
    setattr(block, child, module(getattr(block, child)))
    assert outcome(model, name) == result


@pytest.mark.parametrize('conv_layer', [StdConv2d, ScaledStdConv2d])
def test_whole_networks_of_other_convolutions(conv_layer):
    assert outcome(randomise(small('vgg', conv_layer=conv_layer)), 'features.0') == 'refused'


def test_hook_put_on_later_is_noticed():
    model = randomise(small('basic')).eval()
    sparse = deepmoe_plugin.sparsify(model)
    sparse(images())
    handle = model.layer1[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=r'layer1\.0'):
        sparse(images())
    handle.remove()
    torch.testing.assert_close(sparse(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_forward_wrapped_from_outside_is_refused():
    model = small('basic')
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match='before it is wrapped'):
        deepmoe_plugin.sparsify(model)


@pytest.mark.parametrize('change', ['adapter', 'StdConv2d', 'hook'])
def test_widening_other_convolutions_is_refused(change):
    model = small('basic', gated=False)
    CONV_CHANGES[change](model, 'layer1.0.conv1')
    assert isinstance(model, WideResNet)
    with pytest.raises(ValueError, match='plain'):
        deepmoe_plugin.experts.widen_experts(model, model.expert_layers, 2)


def test_counting_an_adapter_is_refused_by_name():
    model = small('basic')
    CONV_CHANGES['adapter'](model, 'layer1.0.conv2')
    with pytest.raises(ValueError, match=r'layer1\.0\.conv2 .* is of type Adapter'):
        deepmoe_plugin.count_macs(model, images())


@pytest.mark.parametrize('change', ['StdConv2d', 'weight_norm', 'old_spectral_norm', 'pruning_mask', 'hook'])
def test_counting_other_convolutions_counts_their_macs(change):
    model = small('basic')
    expected = deepmoe_plugin.count_macs(model, images())
    CONV_CHANGES[change](model, 'layer1.0.conv1')
    report = deepmoe_plugin.count_macs(model, images())
    assert torch.equal(report.total, expected.total)


def test_statistics_need_the_gates_only():
    model = small('basic')
    CONV_CHANGES['adapter'](model, 'layer1.0.conv1')
    assert deepmoe_plugin.gate_statistics(model, images()).kept_experts == 1
