"""The numbers and invariants of the networks of the paper, and what importing the package leaves alone."""

import re
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from registered_networks import ALL, CONVNEXTS, gradients, meta_model, structures
from small_networks import FixedGates, images, randomise, small, widths
from torch import nn

from deepmoe_plugin import count_macs
from deepmoe_plugin.activation import spread
from deepmoe_plugin.gating import GatingNetwork
from deepmoe_plugin.macs import MacsTable

# Names and numbers


def test_registered_names_are_those_of_the_design():
    families = ('deepmoe_resnet', 'deepmoe_vgg', 'deepmoe_convnext')
    assert sorted(name for family in families for name in timm.list_models(module=family)) == ALL


SHORTCUTS_TOO = ('base', 'shortcut', 'head')
SHORTCUTS_NOT = ('base', 'head')
HIGH = (*[1] * 12, 2503 / 512)
MIDDLE = (*[1] * 5, 2293 / 256, *[1] * 7)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'size', 'groups', 'params', 'gmacs'),
    [
        ('narrow_deepmoe_resnet50', {}, (224, 224), SHORTCUTS_TOO, '25.557', '4.089'),
        ('narrow_deepmoe_resnet50', {}, (224, 224), SHORTCUTS_NOT, '25.557', '3.7295'),
        ('wide_deepmoe_resnet50', {}, (224, 224), SHORTCUTS_TOO, '68.883', '11.398'),
        ('wide_deepmoe_resnet50b', {}, (224, 224), SHORTCUTS_TOO, '41.912', '6.761'),
        ('narrow_deepmoe_resnet101', {}, (224, 224), SHORTCUTS_TOO, '44.549', '7.801'),
        ('narrow_deepmoe_resnet18', {}, (224, 224), SHORTCUTS_TOO, '11.690', '1.814'),
        ('wide_deepmoe_resnet18', {}, (224, 224), SHORTCUTS_TOO, '22.679', '3.490'),
        ('narrow_deepmoe_resnet34', {}, (224, 224), SHORTCUTS_TOO, '21.798', '3.664'),
        ('wide_deepmoe_resnet34', {}, (224, 224), SHORTCUTS_TOO, '42.891', '7.190'),
        ('narrow_deepmoe_resnet56_cifar', {}, (32, 32), SHORTCUTS_TOO, '0.859', '0.1255'),
        ('resnet56_cifar', {}, (32, 32), SHORTCUTS_TOO, '0.859', '0.1255'),
        ('wide_deepmoe_resnet56_cifar', {}, (32, 32), SHORTCUTS_TOO, '1.709', '0.2505'),
        ('narrow_deepmoe_vgg16_cifar', {}, (32, 32), SHORTCUTS_TOO, '14.770', '0.3132'),
        ('vgg16_cifar', {}, (32, 32), SHORTCUTS_TOO, '14.770', '0.3132'),
        ('narrow_deepmoe_vgg16_cifar', dict(widen=HIGH), (32, 32), SHORTCUTS_TOO, '24.148', '0.3501'),
        ('narrow_deepmoe_vgg16_cifar', dict(widen=MIDDLE), (32, 32), SHORTCUTS_TOO, '24.161', '0.9140'),
        ('narrow_deepmoe_vgg16_cifar', dict(widen=1.28), (32, 32), SHORTCUTS_TOO, '24.16', '0.513'),
        ('narrow_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_TOO, '23.508', '797.35'),
        ('narrow_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_NOT, '23.508', '705.01'),
        ('drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_TOO, '23.508', '797.35'),
        ('wide_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_TOO, '66.834', '2260.9'),
        ('wide_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_NOT, '66.834', '2168.5'),
        ('narrow_deepmoe_convnext_tiny', {}, (224, 224), ('base',), '28.589', '4.455'),
        ('wide_deepmoe_convnext_tiny', {}, (224, 224), ('base',), '54.494', '8.617'),
        ('narrow_deepmoe_convnext_base', {}, (224, 224), ('base',), '88.591', '15.354'),
        ('narrow_deepmoe_convnextv2_tiny', {}, (224, 224), ('base',), '28.635', '4.455'),
    ],
)
def test_parameters_and_macs_are_those_of_the_design(name, kwargs, size, groups, params, gmacs):
    model = meta_model(name, **kwargs)
    own = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('gating.'))
    dense = count_macs(model, torch.empty(1, 3, *size, device='meta')).dense_by_group
    assert f'{own / 1e6:.{len(params.split(".")[1])}f}' == params
    assert f'{sum(dense[group] for group in groups) / 1e9:.{len(gmacs.split(".")[1])}f}' == gmacs


def test_half_the_experts_of_a_wide_network_cost_what_the_narrow_one_costs():
    table = MacsTable(meta_model('wide_deepmoe_resnet50'), (224, 224))
    half = torch.cat([torch.arange(width) < width // 2 for width in table.widths])[None]
    of_base = [cost.group in SHORTCUTS_TOO for cost in table.costs]
    narrow = MacsTable(meta_model('narrow_deepmoe_resnet50'), (224, 224)).dense(SHORTCUTS_TOO)
    assert table.by_module(half)[0, torch.tensor(of_base)].sum().item() == narrow


def test_embedding_costs_about_two_percent_of_the_base_network():
    dense = count_macs(meta_model('narrow_deepmoe_resnet50'), torch.empty(1, 3, 224, 224, device='meta')).dense_by_group
    assert 0.005 < dense['embedding'] / dense['base'] < 0.02


# Invariant 2: the dense twin

TWINS = [
    ('narrow_deepmoe_resnet18', 'resnet18', {}),
    ('narrow_deepmoe_resnet34', 'resnet34', {}),
    ('narrow_deepmoe_resnet50', 'resnet50', {}),
    ('narrow_deepmoe_resnet101', 'resnet101', {}),
    ('wide_deepmoe_resnet50', 'wide_resnet50_2', {}),
    ('wide_deepmoe_resnet101', 'wide_resnet101_2', {}),
    *((f'narrow_deepmoe_vgg{depth}_bn', f'vgg{depth}_bn', {}) for depth in (11, 13, 16, 19)),
    ('narrow_deepmoe_drn_a_50', 'resnet50', dict(output_stride=8)),
    *((f'{w}_deepmoe_resnet{d}_cifar', f'resnet{d}_cifar', {}) for w in ('narrow',) for d in (20, 32, 56, 110)),
    ('narrow_deepmoe_vgg16_cifar', 'vgg16_cifar', {}),
    ('narrow_deepmoe_drn_a_50', 'drn_a_50', {}),
    *((f'narrow_deepmoe_{name}', name, {}) for name in CONVNEXTS),
]


@pytest.mark.parametrize(('name', 'twin', 'kwargs'), TWINS)
def test_state_dict_keys_are_the_dense_twins_plus_gating(name, twin, kwargs):
    ours = meta_model(name).state_dict()
    theirs = meta_model(twin, **kwargs).state_dict()
    shapes = {key: value.shape for key, value in ours.items() if not key.startswith('gating.')}
    assert list(shapes.items()) == [(key, value.shape) for key, value in theirs.items()]
    assert len(shapes) < len(ours)


@pytest.mark.parametrize(
    ('name', 'twin', 'kwargs'),
    [
        ('narrow_deepmoe_resnet18', 'resnet18', {}),
        ('narrow_deepmoe_resnet50', 'resnet50', {}),
        ('wide_deepmoe_resnet50', 'wide_resnet50_2', {}),
        ('narrow_deepmoe_vgg11_bn', 'vgg11_bn', dict(mlp_ratio=1 / 64)),
        ('narrow_deepmoe_drn_a_50', 'resnet50', dict(output_stride=8)),
        ('narrow_deepmoe_resnet20_cifar', 'resnet20_cifar', {}),
        ('narrow_deepmoe_vgg16_cifar', 'vgg16_cifar', {}),
        ('narrow_deepmoe_convnext_atto', 'convnext_atto', {}),
        ('narrow_deepmoe_convnext_atto', 'convnext_atto', dict(conv_mlp=False)),
        ('narrow_deepmoe_convnextv2_atto', 'convnextv2_atto', {}),
        ('narrow_deepmoe_convnextv2_atto', 'convnextv2_atto', dict(conv_mlp=False)),
    ],
)
def test_output_is_the_dense_twins_with_its_weights(name, twin, kwargs):
    dense = randomise(timm.create_model(twin, num_classes=10, **kwargs)).eval()
    gated_kwargs = {key: value for key, value in kwargs.items() if key != 'output_stride'}
    model = timm.create_model(name, num_classes=10, **gated_kwargs).eval()
    model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(model(images()), dense(images()), rtol=1e-4, atol=1e-4)


@structures
def test_training_of_an_ungated_start_equals_the_dense_twins(structure):
    model = randomise(small(structure)).double()
    twin = small(structure, gated=False).double()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    with torch.no_grad():
        model.gating.gates.weight.fill_(1)
    x = images(dtype=torch.float64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    ours = gradients(model)
    torch.testing.assert_close({key: ours[key] for key in gradients(twin)}, gradients(twin))


# Invariant 3: an image's output does not depend on its batch


@structures
def test_outputs_do_not_depend_on_the_batch(structure):
    model = randomise(small(structure)).eval().double()
    x = images(5, dtype=torch.float64)
    together = model(x)
    for i in range(5):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x.flip(0)), together.flip(0), rtol=1e-9, atol=1e-9)


# Invariant 7: gates sit where the definition says, and nowhere else


@structures
def test_a_gate_multiplies_exactly_the_input_of_its_consumer(structure):
    model = randomise(small(structure)).eval().double()
    x = images(dtype=torch.float64)
    gates = [torch.rand(2, width, dtype=torch.float64) for width in widths(model)]
    for gate in gates:
        gate[:, ::3] = 0
    seen = {}
    for i, layer in enumerate(model.expert_layers):
        model.get_submodule(layer.norm or layer.conv).register_forward_hook(
            lambda _m, _a, out, key=('norm', i): seen.__setitem__(key, out.clone())
        )
        for key, name in (('reader', layer.late_norm or layer.consumer), ('consumer', layer.consumer)):
            if name:
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _m, args, key=(key, i): seen.__setitem__(key, args[0].clone())
                )
    model.gating = FixedGates(gates)
    model(x)
    for i, gate in enumerate(gates):
        layer = model.expert_layers[i]
        act = model.get_submodule(layer.act)
        expected = act.act(seen['norm', i]) * spread(gate, act.channels_last)
        if ('consumer', i) in seen:
            got = seen['reader', i]
            if got.shape != expected.shape:  # a pooling layer in between
                expected = nn.functional.adaptive_max_pool2d(expected, got.shape[2:])
            if layer.consumer != 'pre_logits.fc1':
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
            read = seen['consumer', i]
            assert not (read[..., ::3] if act.channels_last else read[:, ::3]).any()


@structures
def test_weights_of_closed_experts_do_not_matter(structure):
    model = randomise(small(structure)).eval().double()
    x = images(dtype=torch.float64)
    layers, closed = model.expert_layers, []
    gates = []
    for i, width in enumerate(widths(model)):
        gate = torch.ones(2, width, dtype=torch.float64)
        index = torch.arange(i % 3, width, 3)
        gate[:, index] = 0
        gates.append(gate)
        closed.append(index)
    model.gating = FixedGates(gates)
    expected = model(x)
    with torch.no_grad():
        for layer, index in zip(layers, closed, strict=True):
            model.get_submodule(layer.conv).weight[index] += 7
            if layer.norm:
                model.get_submodule(layer.norm).bias[index] += 7
            if layer.late_norm:
                model.get_submodule(layer.late_norm).weight[index] += 7
                model.get_submodule(layer.late_norm).bias[index] += 7
            if layer.consumer:
                model.get_submodule(layer.consumer).weight[:, index] += 7
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        for layer, index in zip(layers, closed, strict=True):  # and those of open experts do
            model.get_submodule(layer.conv).weight[index + 1 if index[-1] + 1 < len(gates[0]) else index[:-1] + 1] += 7
        assert not torch.allclose(model(x), expected)


@structures
def test_every_gate_reaches_the_output(structure):
    model = randomise(small(structure)).eval().double()
    gates = [torch.ones(2, width, dtype=torch.float64, requires_grad=True) for width in widths(model)]
    model.gating = FixedGates(gates)
    model(images(dtype=torch.float64, size=64)).square().sum().backward()
    for gate in gates:
        assert (gate.grad != 0).any(dim=0).float().mean() > 0.5


@structures
def test_all_experts_closed_still_gives_an_output(structure):
    model = randomise(small(structure)).eval()
    model.gating = FixedGates([torch.zeros(2, width) for width in widths(model)])
    output = model(images())
    assert output.isfinite().all()
    torch.testing.assert_close(output[0], model(images(seed=9))[0] if 'vgg' in structure else output[0])


@structures
def test_experts_are_all_and_only_the_inner_activations(structure):
    model = small(structure)
    gated = {layer.act for layer in model.expert_layers}
    if structure.startswith('vgg'):
        convs = [name for name, m in model.features.named_children() if isinstance(m, nn.Conv2d)]
        assert [layer.conv for layer in model.expert_layers] == [f'features.{name}' for name in convs]
        return
    if structure.startswith('convnext'):
        assert gated == {name.removesuffix('.act') for name, m in model.named_modules() if type(m).__name__ == 'GELU'}
        return
    pattern = {'basic': 'act1', 'cifar': 'act1', 'bottleneck_b': 'act2'}.get(structure, 'act[12]')
    activations = {name for name, m in model.named_modules() if isinstance(m, nn.ReLU) and name.startswith('layer')}
    activations = {name.removesuffix('.act') for name in activations}
    assert gated == {name for name in activations if re.fullmatch(rf'layer\d\.\d\.{pattern}', name)}


# Invariant 5: importing the plugin changes nothing else


def run_python(code):
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_import_changes_no_other_model():
    done = run_python("""
        import logging, warnings
        warnings.simplefilter('error', UserWarning)
        logging.basicConfig(level='WARNING')
        import timm, torch
        from timm.models import _registry
        names = set(timm.list_models())

        def state():
            torch.manual_seed(0)
            model = timm.create_model('resnet18').eval()
            x = torch.randn(1, 3, 64, 64)
            tables = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_load_state_dict_pre_hooks')
            hooks = [len(getattr(m, name)) for m in model.modules() for name in tables]
            model.train()
            model(x.repeat(2, 1, 1, 1)).sum().backward()
            grads = [p.grad.double().sum().item() for p in model.parameters()]
            return model.eval()(x), hooks, grads, dict(model.default_cfg), [type(m) for m in model.modules()]

        before = state()
        import deepmoe_plugin
        after = state()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        added = set(timm.list_models()) - names
        assert names <= set(timm.list_models())
        modules = {_registry._model_entrypoints[name].__module__.split('.')[0] for name in added}
        assert modules == {'deepmoe_plugin'}
    """)
    assert not done.stderr


def test_import_needs_no_segmentation_framework_and_is_quick():
    run_python("""
        import sys, time

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in ('mmengine', 'mmcv', 'mmseg', 'matplotlib', 'sklearn', 'pandas'):
                    assert False, f'{name} was imported'

        import timm, timm.task, safetensors
        sys.meta_path.insert(0, Blocker())
        before = set(sys.modules)
        start = time.process_time()
        import deepmoe_plugin
        assert time.process_time() - start < 1
        heavy = {name.split('.')[0] for name in set(sys.modules) - before}
        allowed = {'deepmoe_plugin', 'timm', 'torch', 'safetensors'}
        assert not {name for name in heavy if name not in allowed and name not in sys.stdlib_module_names}, heavy
    """)


def test_gating_network_is_traced_as_a_leaf():
    assert GatingNetwork in timm.models.get_notrace_modules()
