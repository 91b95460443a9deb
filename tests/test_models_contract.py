"""Every registered model keeps timm's model contract."""

import math

import pytest
import timm
import torch
from registered_networks import (
    AFFORDABLE,
    ALL,
    gradients,
    meta_images,
    meta_model,
    missing_gradients,
    resnets,
    structures,
    with_blocks,
)
from small_networks import SMALL, FixedGates, images, randomise, small, widths
from timm.layers import BlurPool2d
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from deepmoe_plugin import gating_terms
from deepmoe_plugin.models.deepmoe_vgg import DeepMoEVGG

# timm's model contract, for every registered model


@pytest.mark.parametrize('name', ALL)
def test_contract_on_shapes(name):
    model = meta_model(name, num_classes=7, dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {'meta'}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    x = meta_images(model).double()
    features = model.forward_features(x)
    assert tuple(features.shape[2:]) == model.default_cfg['pool_size']
    assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, 7)
    model(x).sum().backward()
    assert not missing_gradients(model)
    taps = [(info['num_chs'], math.ceil(x.shape[-1] / info['reduction'])) for info in model.feature_info]
    output, intermediates = model.forward_intermediates(x)
    assert output.shape == features.shape
    assert [(tap.shape[1], tap.shape[2]) for tap in intermediates] == taps
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().weight.dtype == torch.float64


@pytest.mark.parametrize('name', ALL)
def test_default_cfg_names_what_exists(name):
    model = meta_model(name)
    cfg = model.default_cfg
    assert cfg['architecture'] == name
    assert model.num_classes == cfg['num_classes'] == model.get_classifier().out_features
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    first = [cfg['first_conv']] if isinstance(cfg['first_conv'], str) else cfg['first_conv']
    assert {model.get_submodule(conv).in_channels for conv in first} == {3}
    inputs = [key for key, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    assert sorted(first) == sorted(inputs)


@pytest.mark.parametrize('name', ALL)
def test_features_only_on_shapes(name):
    size = 64
    whole = meta_model(name, features_only=True)
    assert whole.feature_info.channels() == [info['num_chs'] for info in meta_model(name).feature_info]
    outputs = whole(torch.empty(2, 3, size, size, device='meta'))
    assert [out.shape[1] for out in outputs] == whole.feature_info.channels()
    assert [size // out.shape[2] for out in outputs] == whole.feature_info.reduction()
    pruned = meta_model(name, features_only=True, out_indices=(1,))
    (out,) = pruned(torch.empty(2, 3, size, size, device='meta'))
    assert out.shape == outputs[1].shape


@pytest.mark.parametrize('name', AFFORDABLE)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=7)
    x = images(size=32)
    output = model(x)
    assert output.shape == (2, 7)
    assert output.isfinite().all()
    nn.functional.cross_entropy(output, torch.tensor([1, 2])).backward()
    assert not missing_gradients(model)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('name', ['wide_deepmoe_resnet18', 'wide_deepmoe_resnet20_cifar', 'narrow_deepmoe_vgg16_cifar'])
def test_gates_start_at_exactly_one(name):
    model = timm.create_model(name).eval()
    for gate in model.gating(images(size=64)):
        torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=2e-7)


# timm's model contract, in depth on small networks


@structures
def test_intermediates_agree_with_features(structure):
    model = randomise(small(structure)).eval()
    x = images()
    output, taps = model.forward_intermediates(x)
    torch.testing.assert_close(output, model.forward_features(x), rtol=0, atol=0)
    last = len(taps) - 1
    for indices in ([0], [1], [last], [0, 2], list(range(last + 1)), 2):
        chosen = indices if isinstance(indices, list) else [last - 1, last]
        for stop_early in (False, True):
            some = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            torch.testing.assert_close(some, [taps[i] for i in chosen], rtol=0, atol=0)
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(x, output_fmt='NLC')


@structures
@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (2,), (-1,)])
@pytest.mark.parametrize('embed_loss_weight', [0, 1])
def test_pruned_features(structure, out_indices, embed_loss_weight):
    x = images(dtype=torch.float64)
    whole = randomise(small(structure)).double().eval()
    taps = whole.forward_intermediates(x, intermediates_only=True)
    pruned = small(structure, features_only=True, out_indices=out_indices, embed_loss_weight=embed_loss_weight).double()
    weights = whole.state_dict()
    weights['gating.gates.weight'] = weights['gating.gates.weight'][: len(pruned.model.gating.gates.weight)]
    own = pruned.model.state_dict()
    pruned.model.load_state_dict({key: weights.get(key, own[key]) for key in own})
    torch.testing.assert_close(pruned.eval()(x), [taps[i] for i in out_indices])
    outputs = pruned.train()(x)
    terms = gating_terms(pruned, torch.tensor([1, 2]), nn.CrossEntropyLoss())
    assert ('loss_embed' in terms) == bool(embed_loss_weight and pruned.model.expert_layers)
    sum([*(out.sum() for out in outputs), *terms.values()]).backward()
    assert not missing_gradients(pruned)
    assert len(pruned.model.expert_layers) == len(pruned.model.gating.gates.widths)


@structures
def test_pruning_keeps_head_and_gates_when_asked(structure):
    model = randomise(small(structure, embed_loss_weight=1)).eval()
    expected = model(images())
    model.prune_intermediate_layers([len(model.feature_info) - 1], prune_head=False)
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)
    assert model.gating.class_scores is not None


@structures
def test_head_without_classifier_or_pooling(structure):
    x = images()
    model = randomise(small(structure)).eval()
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pre_logits, rtol=0, atol=0)
    assert small(structure, num_classes=0)(x).shape == pre_logits.shape
    unpooled = small(structure, num_classes=0, global_pool='')
    assert unpooled(x).ndim == 4
    model.reset_classifier(0, '')
    assert model(x).ndim == 4


@structures
def test_reset_classifier_resets_the_embedding_classifier_too(structure):
    model = small(structure, embed_loss_weight=1)
    assert model.gating.class_scores.out_features == 10
    model.reset_classifier(4)
    assert model.gating.class_scores.out_features == model.get_classifier().out_features == 4
    model.reset_classifier(0)
    assert model.gating.class_scores is None
    plain = small(structure)
    plain.reset_classifier(4)
    assert plain.gating.class_scores is None


@structures
def test_reset_classifier_of_a_frozen_network_leaves_its_gating_frozen(structure):
    model = small(structure, freeze_gating=True)
    model.reset_classifier(4)
    assert not any(parameter.requires_grad for parameter in model.gating.parameters())


@structures
def test_gray_images(structure):
    model = small(structure, in_chans=1)
    assert model(images(channels=1)).shape == (2, 10)
    with pytest.raises(ValueError, match='in_chans'):
        model(images())


@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a', 'bottleneck_b', 'convnext'])
@pytest.mark.parametrize('stride', [8, 16, 32])
def test_output_stride(structure, stride):
    model = randomise(small(structure, output_stride=stride)).eval()
    x = images(size=64)
    assert model.forward_features(x).shape[2:] == (64 // stride, 64 // stride)
    assert model.feature_info[-1]['reduction'] == stride
    twin = randomise(small(structure, output_stride=stride, gated=False)).eval()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    model.gating = FixedGates([torch.ones(2, width) for width in widths(model)])
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)


@structures
def test_dropout_before_the_classifier(structure):
    model = small(structure, drop_rate=0.5)
    frozen_statistics = [m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert frozen_statistics
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    torch.testing.assert_close(model(images()), model(images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('structure', 'kind'),
    [
        *(
            (structure, kind)
            for structure in ('basic', 'bottleneck_a')
            for kind in ('drop_path_rate', 'drop_block_rate')
        ),
        *((structure, 'drop_path_rate') for structure in ('convnext', 'convnext_conv', 'convnextv2')),
    ],
)
def test_stochastic_depth_and_drop_block(structure, kind):
    rate = {'drop_path_rate': 0.6, 'drop_block_rate': 0.3}[kind]
    model = randomise(small(structure, **{kind: rate}))
    x = images(size=64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    outputs = [model(x) for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    sum(output.sum() for output in outputs).backward()
    assert not missing_gradients(model)
    plain = randomise(small(structure)).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=0, atol=0)


@structures
def test_layer_wise_learning_rate_decay(structure):
    model = small(structure, embed_loss_weight=1)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale = {names[p]: group['lr_scale'] for group in groups for p in group['params']}
    decay = {names[p]: group['weight_decay'] for group in groups for p in group['params']}
    assert scale.keys() == set(names.values())
    # New, randomly initialised parameters learn at the full rate; the stem at the lowest.
    assert {scale[name] for name in scale if name.startswith('gating.')} == {1.0}
    first = f'{model.default_cfg["first_conv"][0]}.weight'
    assert scale[first] == min(scale.values()) < 1
    assert decay['gating.gates.weight'] == 0
    assert decay[first] == decay['gating.embedding.layers.0.conv.weight'] == 0.05


@structures
def test_timm_optimizers_leave_the_gate_heads_undecayed(structure):
    model = small(structure)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    assert id(model.gating.gates.weight) not in decayed
    assert id(model.get_classifier().weight) in decayed


@with_blocks
def test_gradient_checkpointing_changes_nothing_but_memory(structure):
    calls = []
    # With a block or two in each stage, the parts without checkpoints are most of a small ConvNeXt.
    model = randomise(small(structure, **(dict(depths=(3, 3, 3, 3)) if structure.startswith('convnext') else {})))
    model.gating.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x = images(size=64)
    expected = model(x)
    expected.square().sum().backward()
    plain = gradients(model)
    stored = sum(saved_bytes(model, x).values())
    model.zero_grad()
    calls.clear()
    model.set_grad_checkpointing()
    output = model(x)
    output.square().sum().backward()
    assert len(calls) == 1, 'the gates must not be computed again in the backward pass'
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model), plain)
    assert sum(saved_bytes(model, x).values()) < 0.8 * stored
    torch.testing.assert_close(model.eval().forward_intermediates(x)[0], model.forward_features(x), rtol=0, atol=0)
    model.set_grad_checkpointing(False)
    assert not any(getattr(module, 'grad_checkpointing', False) for module in model.modules())


def saved_bytes(model, x):
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return saved


@pytest.mark.parametrize('structure', ['vgg', 'vgg_cifar'])
def test_vgg_has_no_gradient_checkpointing_as_in_timm(structure):
    model = small(structure)
    model.set_grad_checkpointing(False)
    with pytest.raises(AssertionError, match='checkpointing not supported'):
        model.set_grad_checkpointing()


@structures
@pytest.mark.parametrize('act', [nn.SiLU, nn.LeakyReLU, nn.GELU], ids=lambda act: act.__name__)
def test_other_activations(structure, act):
    if act is nn.GELU:
        act = inplace_ignored(nn.GELU)
    model = randomise(small(structure, act_layer=act)).eval().double()
    twin = randomise(small(structure, act_layer=act, gated=False)).eval().double()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    model.gating = FixedGates([torch.ones(2, width) for width in widths(model)])
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(twin))


def inplace_ignored(act):
    return lambda inplace=False: act()


@resnets
@pytest.mark.parametrize('widen', [1, 0.5])
def test_group_norm(structure, widen):
    norm = lambda channels, **kwargs: nn.GroupNorm(4, channels, **kwargs)  # noqa: E731
    model = small(structure, norm_layer=norm, widen=widen)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model(images()).sum().backward()
    assert not missing_gradients(model)


@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a', 'cifar'])
@pytest.mark.parametrize('aa_layer', [nn.AvgPool2d, BlurPool2d])
@pytest.mark.parametrize('widen', [1, 0.5, 2])
def test_anti_aliasing(structure, aa_layer, widen):
    model = small(structure, aa_layer=aa_layer, widen=widen)
    model(images(size=64)).sum().backward()
    assert not missing_gradients(model)


def test_anti_aliasing_of_an_unwidened_network_is_timms():
    model = timm.create_model('narrow_deepmoe_resnet18', aa_layer=BlurPool2d, num_classes=10).eval()
    twin = timm.create_model('resnet18', aa_layer=BlurPool2d, num_classes=10).eval()
    model.load_state_dict(twin.state_dict())
    torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('structure', ['vgg', 'vgg_cifar'])
@pytest.mark.parametrize('act', [nn.ReLU, nn.SiLU])
def test_vgg_without_norm(structure, act):
    # timm's factory drops arguments that are None, so this network is built by hand.
    kwargs = dict(SMALL[structure][1], small_images=structure == 'vgg_cifar', widen=2, num_classes=10)
    model = DeepMoEVGG(norm_layer=None, act_layer=act, **kwargs)
    assert [layer.norm for layer in model.expert_layers] == [''] * len(model.expert_layers)
    assert all(isinstance(model.get_submodule(layer.act).act, act) for layer in model.expert_layers)
    model(images()).sum().backward()
    assert not missing_gradients(model)
