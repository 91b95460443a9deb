"""Options of a run's args.yaml: each is honoured, does not matter, or is refused by name.

With TIMM_REPO=<a checkout of timm's repository> the table is compared with the options of its train.py.
"""

import argparse
import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_networks import randomise
from torch import nn

from deepmoe_plugin.cli import analyze, benchmark, evaluate, flops, images, networks
from deepmoe_plugin.cli.timm_options import HONOURED, IRRELEVANT, REFUSED, check_options

MODEL = {'model': 'wide_deepmoe_resnet20_cifar', 'model_kwargs': {'layers': [1, 1, 1]}}


def options_of_train_py() -> set[str]:
    source = Path(os.environ['TIMM_REPO'], 'train.py').read_text()
    options = set()
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and getattr(call.func, 'attr', '') == 'add_argument':
            flags = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            named = [keyword.value.value for keyword in call.keywords if keyword.arg == 'dest']
            long = [flag for flag in flags if flag.startswith('--')] or flags
            options.add(named[0] if named else long[0].lstrip('-').replace('-', '_'))
    return options


@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason="TIMM_REPO (a checkout of timm's repository) is not set")
def test_every_option_of_train_py_is_classified() -> None:
    options = options_of_train_py()
    assert len(options) > 100
    assert options <= HONOURED | IRRELEVANT | set(REFUSED)


def test_no_option_is_in_two_classes() -> None:
    assert not HONOURED & IRRELEVANT
    assert not set(REFUSED) & (HONOURED | IRRELEVANT)


def test_shipped_configs_are_accepted() -> None:
    from deepmoe_plugin.cli.configs import shipped_configs
    from deepmoe_plugin.cli.networks import yaml

    for path in shipped_configs('timm').values():
        check_options(yaml.safe_load(path.read_text()), str(path))


@pytest.mark.parametrize('name', [*REFUSED, 'an_option_of_a_later_timm'])
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    check_options({**MODEL, name: 0 if name == 'tta' else False}, 'args.yaml')
    with pytest.raises(ValueError, match=f'^{name}: 2 of args.yaml'):
        check_options({**MODEL, name: 2}, 'args.yaml')


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One validation image in folder a, three in folder b, all of them grey noise."""
    rng = np.random.default_rng(0)
    for name in ('a/0', 'b/1', 'b/2', 'b/3'):
        save(tmp_path / 'data/val' / f'{name}.png', rng.integers(0, 256, (40, 40, 3)))
    return tmp_path


def run_of(folder: Path, network: nn.Module | None = None, **options: Any) -> list[str]:
    """The arguments for a run with these options, and with the weights of a network."""
    (folder / 'args.yaml').write_text(json.dumps({**MODEL, **options}))
    arguments = [str(folder / 'args.yaml'), '--workers', '0']
    if network is not None:
        torch.save(network.state_dict(), folder / 'model.pth')
        arguments += ['--checkpoint', str(folder / 'model.pth')]
    return arguments


def network(num_classes: int = 2, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(MODEL['model'], num_classes=num_classes, layers=(1, 1, 1), **kwargs)
    return randomise(model).eval()


def always(label: int) -> nn.Module:
    model = network()
    nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.eye(2)[label]
    return model


def test_class_map(folder: Path) -> None:
    (folder / 'classes.txt').write_text('b\na\n')
    data = ['--data-dir', str(folder / 'data')]
    assert evaluate.main([*run_of(folder, always(0), num_classes=2), *data])['top1'] == 25
    arguments = run_of(folder, always(0), num_classes=2, class_map=str(folder / 'classes.txt'))
    result = evaluate.main([*arguments, *data])
    assert result['top1'] == 75
    assert {name: row['top1'] for name, row in result['by_class'].items()} == {'b': 100, 'a': 0}
    given = evaluate.main(
        [*run_of(folder, always(0)), *data, '--num-classes', '2', '--class-map', f'{folder}/classes.txt']
    )
    assert given['top1'] == 75


def test_class_map_in_figures_and_costs(folder: Path) -> None:
    (folder / 'classes.txt').write_text('b\na\n')
    arguments = run_of(folder, network(), num_classes=2, class_map=str(folder / 'classes.txt'))
    parsed = analyze.parse_args(['dead', *arguments, '--data-dir', str(folder / 'data')])[1]
    subject = analyze.look(parsed)
    assert subject.labels.tolist() == [1, 0, 0, 0]
    assert [subject.describe(i)['class'] for i in range(4)] == ['a', 'b', 'b', 'b']
    (row,) = flops.main([*arguments, '--images', str(folder / 'data')])
    assert row['measured']['images'] == 4


def test_split(folder: Path) -> None:
    save(folder / 'data/holdout/b/9.png', np.zeros((32, 32, 3)))
    save(folder / 'data/holdout/a/9.png', np.zeros((32, 32, 3)))
    arguments = [*run_of(folder, always(0), num_classes=2, val_split='holdout'), '--data-dir', str(folder / 'data')]
    result = evaluate.main(arguments)
    assert (result['images'], result['split']) == (2, 'holdout')
    assert evaluate.main([*arguments, '--split', 'val'])['images'] == 4


def test_classes_of_the_network_are_those_that_train_py_takes(folder: Path) -> None:
    """Without num_classes it takes the default of the model, whatever the images have."""
    model = network(100)
    result = evaluate.main([*run_of(folder, model), '--data-dir', str(folder / 'data')])
    assert result['images'] == 4


def test_one_channel_by_input_size(folder: Path) -> None:
    model = network(in_chans=1)
    size = {'input_size': [1, 48, 48], 'mean': [0.5], 'std': [0.25]}
    arguments = [*run_of(folder, model, num_classes=2, **size), '--data-dir', str(folder / 'data')]
    large = evaluate.main(arguments)['gmacs']['dense']
    small = evaluate.main([*arguments, '--img-size', '32'])['gmacs']['dense']
    assert large == pytest.approx(2.25 * small, rel=0.02)


@pytest.mark.parametrize('option', [{'gp': 'max'}, {'mean': [0.1]}, {'std': [0.5]}, {'crop_pct': 0.5}])
def test_options_that_change_logits(folder: Path, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits: list[torch.Tensor] = []
    original = evaluate.create_network

    def create(*args: Any) -> nn.Module:
        model = original(*args)
        model.fc.register_forward_hook(
            lambda _module, _args, out: logits.append(out) if out.device.type == 'cpu' else None
        )
        return model

    monkeypatch.setattr(evaluate, 'create_network', create)
    for options in ({}, option):
        evaluate.main([*run_of(folder, network(), num_classes=2, **options), '--data-dir', str(folder / 'data')])
    assert len(logits) == 2
    assert not torch.allclose(*logits, atol=1e-3)


def test_image_mode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    original = images.create_dataset
    monkeypatch.setattr(
        images,
        'create_dataset',
        lambda *args, **kwargs: modes.append(kwargs['input_img_mode']) or original(*args, **kwargs),
    )
    for options in ({}, {'input_img_mode': 'RGB'}):
        size = {'input_size': [3, 32, 32], **options}
        evaluate.main([*run_of(folder, network(), num_classes=2, **size), '--data-dir', str(folder / 'data')])
    with pytest.raises(Exception, match=r'channels|size|shape'):
        evaluate.main([*run_of(folder, network(), num_classes=2, input_img_mode='L', mean=[0.5], std=[0.5]),
                       '--data-dir', str(folder / 'data')])  # fmt: skip
    assert modes == ['RGB', 'RGB', 'L']


@pytest.mark.parametrize(
    ('options', 'flags', 'is_average'),
    [
        ({}, [], False),
        ({'model_ema': True}, [], True),
        ({'model_ema': True}, ['--no-use-ema'], False),
        ({'model_ema': True, 'model_ema_force_cpu': True}, [], False),
        ({}, ['--use-ema'], True),
    ],
)
def test_weights_are_those_that_train_py_judged(folder: Path, options, flags, is_average) -> None:
    torch.save(
        {'state_dict': always(0).state_dict(), 'state_dict_ema': always(1).state_dict()}, folder / 'last.pth.tar'
    )
    arguments = [*run_of(folder, num_classes=2, **options), '--checkpoint', str(folder / 'last.pth.tar'), *flags]
    result = evaluate.main([*arguments, '--data-dir', str(folder / 'data')])
    assert result['top1'] == (75 if is_average else 25)


def test_a_name_of_both_means_the_model_and_its_suffix_the_config() -> None:
    args = argparse.Namespace(model_kwargs={})
    assert 'epochs' not in networks.read_settings('wide_deepmoe_resnet56_cifar', args)
    assert networks.read_settings('wide_deepmoe_resnet56_cifar.yaml', args)['epochs'] > 100
    assert networks.read_settings('table4_w1_high', args)['model'] == 'narrow_deepmoe_vgg16_cifar'


def test_benchmark_prepares_images_as_the_run_did(folder: Path) -> None:
    args = argparse.Namespace(
        size=[32, 32], images=str(folder / 'data'), batch=4, repeats=1, device='cpu', dtype='float32'
    )
    plain, shifted = (
        benchmark.load_images(channels, args, {'model_kwargs': {}, 'model': MODEL['model'], **options})[0]
        for channels, options in ((1, {'mean': [0.5], 'std': [0.5]}), (1, {'mean': [0.0], 'std': [0.5]}))
    )
    assert plain.shape == (4, 1, 32, 32)
    assert (shifted.mean() - plain.mean()).item() == pytest.approx(1)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'pretrained': True}, 'pretrained: True, which is where training started: give the trained weights'),
        ({'device_modules': ['no_such_module']}, "device_modules of .*: No module named 'no_such_module'"),
        ({'mean': [0.1, 0.2]}, 'mean=.* do not fit together'),
        ({'class_map': 'nowhere.txt'}, 'nowhere.txt'),
        ({'split_bn': True}, 'split_bn: True'),
        ({'bn_eps': 0.1}, 'does not take .*bn_eps'),
    ],
)
def test_mistakes_are_named(folder: Path, options, message, capsys) -> None:
    error = refused([*run_of(folder, num_classes=2, **options), '--data-dir', str(folder / 'data')], capsys)
    assert re.search(message, error), error


def test_missing_average_is_named(folder: Path, capsys) -> None:
    arguments = [*run_of(folder, always(0), num_classes=2), '--use-ema', '--data-dir', str(folder / 'data')]
    assert 'holds no moving average' in refused(arguments, capsys)


@pytest.mark.parametrize(
    ('lacking', 'message'), [('val', 'no images of the class a,'), ('train', 'no training images of')]
)
def test_class_that_one_folder_lacks(folder: Path, lacking: str, message: str, capsys) -> None:
    for name in 'abc':
        if (lacking, name) != ('train', 'c'):
            save(folder / f'data/train/{name}/0.png', np.zeros((32, 32, 3)))
        if (lacking, name) != ('val', 'a'):
            save(folder / f'data/val/{name}/0.png', np.zeros((32, 32, 3)))
    if lacking == 'val':
        (folder / 'data/val/a/0.png').unlink()
    arguments = [*run_of(folder, network(3), num_classes=3), '--data-dir', str(folder / 'data')]
    error = refused(arguments, capsys)
    assert message in error
    assert '--class-map' in error
    (folder / 'classes.txt').write_text('a\nb\nc\n')
    assert evaluate.main([*arguments, '--class-map', str(folder / 'classes.txt')])['images'] > 0


def test_fewer_classes_than_the_network_has_are_a_warning(folder: Path, capsys) -> None:
    evaluate.main([*run_of(folder, network(3), num_classes=3), '--data-dir', str(folder / 'data')])
    assert 'has 2 classes, the network 3' in capsys.readouterr().err
