"""deepmoe flops: the table, the paper's claims that follow from it, configs of both frameworks, and images."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from image_folders import save_images
from PIL import Image
from small_networks import randomise
from torch import Tensor

from deepmoe_plugin import count_macs, gate_statistics
from deepmoe_plugin.cli import flops

SMALL = ['wide_deepmoe_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', 'num_classes=4']


def table(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table as row name to column name to cell."""
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


@pytest.fixture(scope='module')
def paper() -> dict[str, flops.Cost]:
    return {cost.name: cost for cost in flops.paper_costs((0.5,))}


@pytest.mark.parametrize(
    ('name', 'params', 'gmacs', 'without_shortcuts'),
    [
        ('ResNet-18', 11.690, 1.814, None),
        ('wide-DeepMoE-18', 22.679, 3.490, None),
        ('ResNet-34', 21.798, 3.664, None),
        ('wide-DeepMoE-34', 42.891, 7.190, None),
        ('ResNet-50', 25.557, 4.089, 3.7295),
        ('wide-DeepMoE-50 (A)', 68.883, 11.398, None),
        ('wide-DeepMoE-50 (B)', 41.912, 6.761, None),
        ('ResNet-101', 44.549, 7.801, None),
        ('ResNet-56, CIFAR-100', 0.859, 0.1255, None),
        ('wide-DeepMoE-56, CIFAR-100', 1.709, 0.2505, None),
        ('VGG-16, CIFAR-100', 14.770, 0.3132, None),
        ('W1-High', 24.148, 0.3501, None),
        ('W1-Mid', 24.161, 0.9140, None),
        ('W4-Low', 24.18, 3.35, None),
        ('W13-All', 24.18, 0.513, None),
        ('DRN-A-50, backbone', 23.508, 797.35, 705.01),
        ('wide-DRN-A-50 (A), backbone', 66.834, 2260.9, 2168.5),
    ],
)
def test_networks_of_the_paper(paper, name, params, gmacs, without_shortcuts):
    def digits(value: float) -> float:
        return 0.5 * 10 ** -len(str(value).partition('.')[2])

    cost = paper[name]
    assert cost.params / 1e6 == pytest.approx(params, abs=digits(params))
    assert cost.dense / 1e9 == pytest.approx(gmacs, abs=digits(gmacs))
    if without_shortcuts is not None:
        assert cost.without_shortcuts / 1e9 == pytest.approx(without_shortcuts, abs=digits(without_shortcuts))


def test_wide_b_has_six_percent_fewer_parameters_than_resnet_101(paper):
    assert paper['wide-DeepMoE-50 (B)'].params / paper['ResNet-101'].params == pytest.approx(0.94, abs=0.005)


@pytest.mark.parametrize(
    ('wide', 'base'),
    [
        ('wide-DeepMoE-18', 'ResNet-18'),
        ('wide-DeepMoE-34', 'ResNet-34'),
        ('wide-DeepMoE-50 (A)', 'ResNet-50'),
        ('wide-DeepMoE-50 (B)', 'ResNet-50'),
        ('wide-DeepMoE-56, CIFAR-100', 'ResNet-56, CIFAR-100'),
        ('wide-DeepMoE-110, CIFAR-100', 'ResNet-110, CIFAR-100'),
        ('wide-DRN-A-50 (A), backbone', 'DRN-A-50, backbone'),
    ],
)
def test_half_of_the_experts_cost_the_unwidened_network(paper, wide, base):
    assert paper[wide].kept[0.5] == paper[base].dense
    assert paper[wide].gating < 0.04 * paper[base].dense


def test_what_the_paper_saves(paper):
    """Table 3: 1.6 GMACs are 56.8 % less than ResNet-50's without shortcuts, and not with them."""
    assert 1 - 1.6 / (paper['ResNet-50'].without_shortcuts / 1e9) == pytest.approx(0.568, abs=0.005)
    assert 1 - 1.6 / (paper['ResNet-50'].dense / 1e9) > 0.6


def test_wider_does_not_cost_the_same_everywhere(paper):
    """Table 4 compares networks of the same size, whose MACs differ tenfold."""
    networks = [paper[name] for name in ('W1-High', 'W1-Mid', 'W4-Low', 'W13-All')]
    assert max(n.params for n in networks) / min(n.params for n in networks) < 1.002
    assert [n.name for n in sorted(networks, key=lambda n: n.dense)] == ['W1-High', 'W13-All', 'W1-Mid', 'W4-Low']


def test_page_of_results_is_what_the_tool_prints(paper, request, capsys):
    page = (request.config.rootpath / 'docs/results/flops.md').read_text()
    of_paper, registered = map(table, page.split('# Costs of the registered networks'))
    assert of_paper == table(flops.format_costs(flops.paper_costs((0.25, 0.5)), (0.25, 0.5)))
    assert set(registered) == set(timm.list_models('wide_deepmoe_*'))
    flops.main(list(registered))
    assert registered == table(capsys.readouterr().out)


def test_table_of_given_networks(capsys, tmp_path):
    rows = flops.main([*SMALL[:1], 'resnet20_cifar', '--kept', '0.5', '1', '--json', str(tmp_path / 'a/b.json')])
    shown = table(capsys.readouterr().out)
    assert list(shown) == ['wide_deepmoe_resnet20_cifar', 'resnet20_cifar']
    wide, dense = shown.values()
    assert wide['50 % kept'] == dense['GMACs'] == '0.04056'
    assert wide['100 % kept'] == wide['GMACs']
    assert (dense['50 % kept'], dense['gating GMACs'], dense['gating params (M)']) == ('', '', '')
    saved = json.loads((tmp_path / 'a/b.json').read_text())
    assert [row['dense'] for row in saved] == [row['dense'] for row in rows]


def test_size_of_the_images(capsys):
    flops.main([*SMALL, '--shape', '64', '32'])
    larger = table(capsys.readouterr().out)['wide_deepmoe_resnet20_cifar']
    flops.main(SMALL)
    usual = table(capsys.readouterr().out)['wide_deepmoe_resnet20_cifar']
    assert (larger['input'], usual['input']) == ('64x32', '32x32')
    assert float(larger['GMACs']) == pytest.approx(2 * float(usual['GMACs']), rel=0.001)


def test_timm_config(capsys):
    flops.main(['table4_w1_high', '--kept', '1'])
    assert table(capsys.readouterr().out)['narrow_deepmoe_vgg16_cifar']['params (M)'] == '24.148'


SEGMENTOR = """
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor'),
    pretrained='torchvision://resnet18',
    backbone=dict(type='TIMMBackbone', model_name='wide_deepmoe_resnet18', pretrained=False,
                  layers=(1, 1, 1, 1), widen=0.25),
    decode_head=dict(type='FCNHead', in_channels=512, in_index=4, channels=16, num_convs=1, num_classes=5,
                     concat_input=False, norm_cfg=dict(type='SyncBN')),
    auxiliary_head=dict(type='FCNHead', in_channels=256, in_index=3, channels=16, num_classes=5),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""


def test_mmseg_config(tmp_path, capsys):
    pytest.importorskip('mmseg')
    config = tmp_path / 'tiny.py'
    config.write_text(SEGMENTOR)
    (row,) = flops.main([str(config), '--shape', '128', '64', '--kept', '0.5'])
    backbone = timm.create_model('wide_deepmoe_resnet18', layers=(1, 1, 1, 1), widen=0.25, features_only=True)
    own = flops.cost_of(backbone, '', (128, 64), (0.5,))
    assert row['head'] == 9 * 512 * 16 * 4 * 2 + 16 * 5 * 4 * 2
    assert (row['dense'] - row['head'], row['gating']) == (own.dense, own.gating)
    assert row['kept'][0.5] - row['head'] == own.kept[0.5] < own.dense
    assert table(capsys.readouterr().out)['tiny']['input'] == '128x64'


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    save_images(tmp_path, (rng.integers(0, 255, (32, 32, 3)) for _ in range(10)))
    return tmp_path


def test_measured_on_images(folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = randomise(timm.create_model(SMALL[0], layers=(1, 1, 1), num_classes=4)).eval()
    checkpoint = tmp_path / 'model.pth'
    torch.save(model.state_dict(), checkpoint)
    loading = ['--batch-size', '4', '--workers', '0']
    (row,) = flops.main([*SMALL, '--checkpoint', str(checkpoint), '--images', str(folder), *loading])
    cfg = model.pretrained_cfg
    pixels = [np.asarray(Image.open(folder / f'{i}.png'), dtype=np.float32) / 255 for i in range(10)]
    x = Tensor((np.stack(pixels) - np.array(cfg['mean'])) / np.array(cfg['std'])).permute(0, 3, 1, 2)
    macs, kept = count_macs(model, x).total.double() / 1e9, gate_statistics(model, x).by_image()
    measured = row['measured']
    assert measured['images'] == 10
    for name, expected in (('gmacs', macs), ('kept_experts', kept)):
        assert expected.std() > 0
        assert measured[name]['mean'] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert measured[name]['std'] == pytest.approx(expected.std(correction=0).item(), rel=1e-3)
        assert (measured[name]['min'], measured[name]['max']) == pytest.approx(
            (expected.min().item(), expected.max().item())
        )
    assert re.search(r'10 images .*\n +GMACs per image.*± ', capsys.readouterr().out)


SIZES = ((64, 64), (65, 97), (64, 64), (33, 64))


@pytest.fixture
def scenes(tmp_path):
    """Writes a config, images as it finds them and a checkpoint as of mmengine; returns what the hook logs of them."""
    pytest.importorskip('mmseg')
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner
    from small_segmentors import make_runner, segmentor, segmentor_config

    rng = np.random.default_rng(0)
    pictures = (rng.integers(0, 60 + 60 * i, (*size, 3)) for i, size in enumerate(SIZES))
    save_images(tmp_path / 'data/img/test', pictures)
    pipeline = [dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs')]
    data = dict(type='BaseSegDataset', data_root=str(tmp_path / 'data'), img_suffix='.png', pipeline=pipeline)
    data['data_prefix'] = dict(img_path='img/test', seg_map_path='nowhere')
    loader = dict(num_workers=1, persistent_workers=True, sampler=dict(type='DefaultSampler', shuffle=False))

    def write(**model):
        config = tmp_path / 'tiny.py'
        config.write_text(
            "custom_imports = dict(imports=['deepmoe_plugin.mmseg'])\n"
            f'model = {segmentor_config(**model).to_dict()}\n'
            f'test_dataloader = {dict(loader, dataset=data)}\n'
        )
        init_default_scope('mmseg')
        plain = dict(data, pipeline=[pipeline[0], pipeline[2]])
        val = Runner.build_dataloader(dict(dataset=plain, num_workers=0, sampler=loader['sampler']))
        runner = make_runner(segmentor(**model), tmp_path, dict(type='GateStatisticsHook'), val=val)
        logged = runner.val()
        histories = runner.message_hub.state_dict()
        torch.save(dict(state_dict=runner.model.state_dict(), message_hub=histories), tmp_path / 'tiny.pth')
        return str(config), str(tmp_path / 'tiny.pth'), logged

    return write


SLIDE = dict(mode='slide', crop_size=(48, 48), stride=(32, 32))


@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), SLIDE], ids=['whole', 'slide'])
def test_segmentor_measured_on_images(scenes, test_cfg, tmp_path, capsys):
    config, checkpoint, logged = scenes(test_cfg=test_cfg)
    runs = [flops.main([config, '--checkpoint', checkpoint, '--workers', '0', *options])[0] for options in (
        [], ['--images', str(tmp_path / 'data')], ['--images', str(tmp_path / 'data/img')],
    )]  # fmt: skip
    measured = runs[0]['measured']
    assert all(row['measured'] == measured for row in runs)
    assert measured['images'] == len(SIZES)
    assert measured['gmacs']['min'] < measured['gmacs']['max']
    assert measured['backbone_gmacs']['mean'] == pytest.approx(logged['gmacs'], rel=1e-5)
    head = measured['gmacs']['mean'] - measured['backbone_gmacs']['mean']
    if test_cfg['mode'] == 'whole':
        assert runs[0]['shape'] == SIZES[0]
        sizes = [[-(-side // 32) for side in size] for size in SIZES]
        assert head * 1e9 == pytest.approx((9 * 512 * 8 + 8 * 5) * np.mean([h * w for h, w in sizes]), rel=1e-3)
        assert measured['kept_experts']['mean'] == pytest.approx(logged['kept_experts'], rel=1e-5)
        assert measured['kept_experts']['std'] > 0
    assert re.search(r'4 images .*\n +GMACs per image.*\n.*GateStatisticsHook.*\n +kept', capsys.readouterr().out)


def test_mistakes_with_images_of_a_segmentor_are_named(scenes, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            flops.main([config, *map(str, arguments), '--workers', '0'])
        return capsys.readouterr().err

    config, checkpoint, _ = scenes()
    (tmp_path / 'empty').mkdir()
    for name in ('nowhere', 'empty'):
        assert f'no images in {tmp_path / name}' in refused('--images', tmp_path / name)
    assert 'no checkpoint nowhere.pth: correct --checkpoint' in refused('--checkpoint', 'nowhere.pth')
    other = torch.load(checkpoint, weights_only=False)
    del other['state_dict']['decode_head.conv_seg.weight']
    torch.save(other, tmp_path / 'other.pth')
    assert 'other.pth does not fit' in refused('--checkpoint', tmp_path / 'other.pth')
    torch.save({'state_dict': {}, 'code': np.random.default_rng()}, tmp_path / 'code.pth')
    assert 'it is refused' in refused('--checkpoint', tmp_path / 'code.pth')
    assert '--split is for timm networks' in refused('--checkpoint', checkpoint, '--split', 'train')
    (tmp_path / 'tiny.py').write_text('model = dict()')
    assert 'has no `test_dataloader.dataset.pipeline`' in refused('--images', tmp_path)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'name networks'),
        (['resnet18', '--paper'], 'name networks'),
        (['wide_deepmoe_resnet2'], "no model 'wide_deepmoe_resnet2'. Similar: wide_deepmoe_resnet"),
        (['resnet18', '--kept', '1.5'], 'between 0 and 1'),
        (['resnet18', 'resnet34', '--checkpoint', 'x'], 'a single network'),
        (['resnet18', '--checkpoint', 'x'], '--checkpoint needs --images'),
        (['x.py', '--images', 'x'], 'no file x.py'),
        (['x.yaml'], 'no file x.yaml'),
        (['x.py'], '--shape HEIGHT WIDTH is needed'),
        (['x.py', '--shape', '32', '32'], 'no file x.py'),
        (['resnet18', '--images', '/nowhere'], 'no folder /nowhere'),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    if 'x.py' in arguments:
        pytest.importorskip('mmseg')
    with pytest.raises(SystemExit):
        flops.main(arguments)
    assert message in capsys.readouterr().err
