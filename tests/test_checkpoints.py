"""Checkpoints: stock weights of the dense twin, stage 1 to stage 2 and back, other classes and channels."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_networks import images, randomise, small
from timm.models import load_checkpoint, save_for_hf

STRUCTURES = ['basic', 'bottleneck_a', 'cifar', 'vgg', 'vgg_cifar', 'convnext', 'convnextv2', 'grouped']
structures = pytest.mark.parametrize('structure', STRUCTURES)
formats = pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])


def save(state_dict, file):
    if file.suffix == '.safetensors':
        save_file({key: value.contiguous() for key, value in state_dict.items()}, file)
    else:
        torch.save(state_dict, file)
    return file


def pretrained(structure, file, classes=10, **kwargs):
    """Create a network from the file of a checkpoint with `classes` classes."""
    overlay = dict(file=str(file), num_classes=classes)
    return small(structure, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def base_of(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith('gating.')}


@structures
@formats
def test_dense_twin_starts_a_network_with_its_output(structure, suffix, tmp_path):
    twin = randomise(small(structure, gated=False)).eval()
    model = pretrained(structure, save(twin.state_dict(), tmp_path / f'twin{suffix}')).eval()
    torch.testing.assert_close(base_of(model), twin.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-4)


@formats
@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'convnextv2_atto'])
def test_stock_timm_weights(name, suffix, tmp_path):
    twin = randomise(timm.create_model(name)).eval()
    file = save(twin.state_dict(), tmp_path / f'{name}{suffix}')
    model = timm.create_model(f'narrow_deepmoe_{name}', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    torch.testing.assert_close(model.eval()(images()), twin(images()), rtol=1e-4, atol=1e-4)


@structures
def test_gray_images_and_other_classes(structure, tmp_path):
    twin = randomise(small(structure, gated=False))
    model = pretrained(structure, save(twin.state_dict(), tmp_path / 'twin.pth'), in_chans=1, num_classes=4)
    first = f'{model.default_cfg["first_conv"][0]}.weight'
    torch.testing.assert_close(model.state_dict()[first], twin.state_dict()[first].sum(1, keepdim=True))
    classifier = model.default_cfg['classifier']
    same = {key for key in base_of(model) if key != first and not key.startswith(classifier)}
    torch.testing.assert_close(
        {key: model.state_dict()[key] for key in same}, {key: twin.state_dict()[key] for key in same}, rtol=0, atol=0
    )
    assert model(images(channels=1)).shape == (2, 4)


def test_gray_images_adapt_the_embedding_of_a_gated_checkpoint_too(tmp_path):
    stage1 = randomise(small('cifar'))
    model = pretrained('cifar', save(stage1.state_dict(), tmp_path / 'stage1.pth'), in_chans=1)
    key = 'gating.embedding.layers.0.conv.weight'
    torch.testing.assert_close(model.state_dict()[key], stage1.state_dict()[key].sum(1, keepdim=True))


def test_class_count_minus_one_leaves_the_classifier_out_as_timms_train_script_does(tmp_path):
    twin = randomise(small('cifar', gated=False))
    model = pretrained('cifar', save(twin.state_dict(), tmp_path / 'twin.pth'), classes=-1)
    assert not torch.equal(model.fc.weight, twin.fc.weight)
    torch.testing.assert_close(model.layer1[0].conv1.weight, twin.layer1[0].conv1.weight, rtol=0, atol=0)


@pytest.mark.parametrize('wrapping', ['plain', 'state_dict', 'module.', 'ema', 'legacy'])
def test_checkpoints_of_training_scripts(wrapping, tmp_path):
    import argparse

    twin = randomise(small('cifar'))
    weights = twin.state_dict()
    checkpoint = {
        'plain': weights,
        'state_dict': dict(state_dict=weights, epoch=3, args=argparse.Namespace(lr=0.1)),
        'module.': {f'module.{key}': value for key, value in weights.items()},
        'ema': dict(state_dict=small('cifar').state_dict(), state_dict_ema=weights),
        'legacy': weights,
    }[wrapping]
    file = tmp_path / 'checkpoint.pth.tar'
    torch.save(checkpoint, file, _use_new_zipfile_serialization=wrapping != 'legacy')
    model = pretrained('cifar', file)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


@structures
@formats
def test_checkpoint_path(structure, suffix, tmp_path):
    twin = randomise(small(structure, gated=False)).eval()
    file = save(twin.state_dict(), tmp_path / f'twin{suffix}')
    model = small(structure, checkpoint_path=str(file)).eval()
    torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-4)
    load_checkpoint(model, str(save(randomise(model, seed=5).state_dict(), tmp_path / f'own{suffix}')))


def gates(model):
    return torch.cat(model.eval().gating(images()), 1)


@structures
@pytest.mark.parametrize('how', ['pretrained', 'checkpoint_path', 'load_state_dict'])
def test_stage_one_continues_in_stage_two_and_back(structure, how, tmp_path):
    stage1 = randomise(small(structure, embed_loss_weight=1, target_kept=0.5))
    stage1.gating.budget.step_count += 3
    stage1.gating.gates.threshold.fill_(0.2)
    file = save(stage1.state_dict(), tmp_path / 'stage1.pth')

    def load(file, **kwargs):
        if how == 'pretrained':
            return pretrained(structure, file, **kwargs)
        if how == 'checkpoint_path':
            return small(structure, checkpoint_path=str(file), **kwargs)
        model = small(structure, **kwargs)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model

    stage2 = load(file, freeze_gating=True)
    torch.testing.assert_close(base_of(stage2), base_of(stage1), rtol=0, atol=0)
    torch.testing.assert_close(gates(stage2), gates(stage1), rtol=0, atol=0)
    torch.testing.assert_close(stage2.eval()(images()), stage1.eval()(images()), rtol=0, atol=0)
    assert not any(key.startswith(('gating.class_scores', 'gating.budget')) for key in stage2.state_dict())
    back = load(save(stage2.state_dict(), tmp_path / 'stage2.pth'), embed_loss_weight=1, target_kept=0.5)
    torch.testing.assert_close(gates(back), gates(stage1), rtol=0, atol=0)
    assert back.gating.class_scores.weight.isfinite().all()
    assert back.gating.budget.step_count == 0
    again = load(file, embed_loss_weight=1, target_kept=0.5)
    torch.testing.assert_close(again.state_dict(), stage1.state_dict(), rtol=0, atol=0)


def test_loading_a_dense_checkpoint_keeps_the_gates():
    model = randomise(small('cifar'))
    before = gates(model)
    model.load_state_dict(small('cifar', gated=False).state_dict())
    torch.testing.assert_close(gates(model), before, rtol=0, atol=0)


def test_loading_leaves_the_given_state_dict_alone():
    stage1 = small('cifar', embed_loss_weight=1).state_dict()
    keys = list(stage1)
    small('cifar').load_state_dict(stage1)
    assert list(stage1) == keys


def test_checkpoint_of_a_network_inside_another_module():
    outer = torch.nn.Sequential(randomise(small('cifar', embed_loss_weight=1)))
    twin = torch.nn.Sequential(small('cifar'))
    twin.load_state_dict(outer.state_dict())
    torch.testing.assert_close(gates(twin[0]), gates(outer[0]), rtol=0, atol=0)
    dense = torch.nn.Sequential(randomise(small('cifar', gated=False), seed=3))
    twin.load_state_dict(dense.state_dict())
    torch.testing.assert_close(base_of(twin[0]), dict(dense[0].state_dict()), rtol=0, atol=0)


@structures
@pytest.mark.parametrize('gated', [True, False])
def test_features_only(structure, gated, tmp_path):
    model = randomise(small(structure, gated=gated)).eval()
    features = pretrained(
        structure, save(model.state_dict(), tmp_path / 'model.pth'), features_only=True, out_indices=(0, 1)
    )
    if gated:
        expected = model.forward_intermediates(images(), [0, 1], intermediates_only=True)
        torch.testing.assert_close(features.eval()(images()), expected, rtol=0, atol=0)
    loaded = {key.removeprefix('model.') for key in features.state_dict()}
    assert loaded - {'gating.gates.weight'} <= {*model.state_dict(), *(k for k in loaded if k.startswith('gating.'))}


def test_checkpoint_of_pruned_features_loads_again(tmp_path):
    pruned = randomise(small('cifar', features_only=True, out_indices=(0, 1)))
    twin = small('cifar', features_only=True, out_indices=(0, 1))
    twin.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(twin.eval()(images()), pruned.eval()(images()), rtol=0, atol=0)


@pytest.mark.parametrize('safe', [True, False])
def test_folder_saved_by_timm(safe, tmp_path):
    model = randomise(small('bottleneck_a', num_classes=7)).eval()
    save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=safe)
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize('structure', ['cifar', 'vgg'])
def test_checkpoints_of_earlier_versions_load(structure, tmp_path):
    """The gate heads were called `heads`, the embedding classifier `classifier`."""
    model = randomise(small(structure, embed_loss_weight=1))
    renamed = {'gating.gates.': 'gating.heads.', 'gating.class_scores.': 'gating.classifier.'}
    old = {}
    for key, value in model.state_dict().items():
        start = next((start for start in renamed if key.startswith(start)), '')
        old[renamed.get(start, '') + key.removeprefix(start)] = value
    assert 'gating.heads.weight' in old
    assert 'gating.classifier.bias' in old
    torch.save(old, tmp_path / 'old.pth')
    by_timm = small(
        structure,
        embed_loss_weight=1,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'old.pth'), num_classes=10),
    )
    wrapped = torch.nn.ModuleDict(dict(backbone=small(structure, embed_loss_weight=1)))
    wrapped.load_state_dict({f'backbone.{key}': value for key, value in old.items()})
    for loaded in (by_timm, wrapped['backbone']):
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
