"""deepmoe train, test and street-scenes as a user runs them, and mmseg's own train.py on our configs."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmseg')

import mmseg
from mmseg.datasets import CityscapesDataset
from small_segmentors import STREETS, small_street_scenes

from deepmoe_plugin.mmseg import SparseInferenceHook

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
CITYSCAPES = ROOT / 'configs/mmseg/drn50_cityscapes.py'
MMSEG_TRAIN = Path(mmseg.__file__).parent / '.mim/tools/train.py'

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script of tools/ in this process."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(script: str | Path, *args: object) -> None:
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        runpy.run_path(str(TOOLS / script), run_name='__main__')

    return run


@pytest.fixture(scope='module')
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_street_scenes(tmp_path_factory.mktemp('scenes'))


@pytest.fixture(scope='module')
def scenes(small_config: Path) -> Path:
    return small_config.parent


@pytest.fixture(scope='module')
def checkpoint(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training that was killed after a checkpoint and then resumed."""
    work_dir = tmp_path_factory.mktemp('work')
    train = [sys.executable, str(TOOLS / 'train.py'), str(small_config), '--work-dir', str(work_dir)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    log = work_dir / 'log'
    with log.open('w') as file:
        endless = [*train, '--cfg-options', 'train_cfg.max_iters=10000']
        process = subprocess.Popen(endless, env=environment, stdout=file, stderr=file)
        deadline = time.monotonic() + 200
        while not (work_dir / 'last_checkpoint').exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = int(Path((work_dir / 'last_checkpoint').read_text()).stem.removeprefix('iter_'))
    last = killed_at + 2
    options = ['--resume', '--cfg-options', f'train_cfg.max_iters={last}']
    result = subprocess.run([*train, *options], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    log = result.stdout + result.stderr
    assert f'[{killed_at + 1}/{last}]' in log.replace(' ', '')
    assert f'[{killed_at}/{last}]' not in log.replace(' ', '')
    return work_dir / f'iter_{last}.pth'


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*.png'))}


@pytest.fixture
def draw(run: Run, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    def draw(name: str, seed: int) -> dict[str, bytes]:
        size = ('--width', 96, '--height', 48)
        run('street_scenes.py', tmp_path / name, '--train', 2, '--val', 1, *size, '--seed', seed)
        return files(tmp_path / name)

    return draw


def test_scenes_depend_on_the_seed_alone(draw: Callable[..., dict[str, bytes]]) -> None:
    first = draw('a', 1)
    assert draw('b', 1) == first
    other = draw('c', 2)
    assert list(other) == list(first)
    assert all(other[name] != first[name] for name in first)
    assert len(set(first.values())) == len(first)


def test_scenes_look_like_cityscapes_to_mmseg(scenes: Path) -> None:
    dataset = CityscapesDataset(
        data_root=str(scenes), data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    )
    assert len(dataset) == 4
    counts = np.zeros(256, int)
    for info in dataset:
        assert Image.open(info['img_path']).size == Image.open(info['seg_map_path']).size == (128, 64)
        counts += np.bincount(np.asarray(Image.open(info['seg_map_path'])).ravel(), minlength=256)
    assert set(counts.nonzero()[0]) <= {*range(19), 255}
    names = np.array(dataset.metainfo['classes'])
    assert {'road', 'sidewalk', 'building', 'vegetation', 'sky', 'car'} <= set(names[counts[:19] > 0])
    assert counts[255] < 0.05 * counts.sum()


@pytest.mark.parametrize('args', [('--train', 0), ('--width', 0)])
def test_scenes_of_no_size_are_refused(run: Run, tmp_path: Path, args: tuple, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run('street_scenes.py', tmp_path, *args)
    assert f'{args[0]} must be at least 1' in capsys.readouterr().err


def test_resumed_training_can_be_tested(
    run: Run, checkpoint: Path, small_config: Path, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run('test.py', small_config, checkpoint, '--work-dir', tmp_path, '--show-dir', tmp_path / 'pictures', '--out',
        tmp_path / 'labels')  # fmt: skip
    printed = capfd.readouterr()
    assert all(name in printed.out + printed.err for name in ('mIoU', 'kept_experts', 'gmacs'))
    pictures, labels = (sorted((tmp_path / name).rglob('*.png')) for name in ('pictures', 'labels'))
    inputs = sorted((scenes / 'leftImg8bit/val').rglob('*.png'))
    assert [path.stem for path in pictures] == [path.stem for path in labels] == [path.stem for path in inputs]
    palette = np.array(CityscapesDataset.METAINFO['palette'], np.uint8)
    for picture, predicted, path in zip(pictures, labels, inputs, strict=True):
        image, truth, prediction = np.split(np.asarray(Image.open(picture)), 3, axis=1)
        assert np.array_equal(image, np.asarray(Image.open(path)))
        assert np.array_equal(prediction, palette[np.asarray(Image.open(predicted))])
        stem = path.name.removesuffix('_leftImg8bit.png')
        known = np.asarray(Image.open(next(scenes.rglob(f'{stem}_gtFine_labelTrainIds.png'))))
        assert np.array_equal(truth[known < 255], palette[known[known < 255]])
        assert not truth[known == 255].any()


SWAP = SparseInferenceHook._before_epoch
SLIDE = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=64,64', 'model.test_cfg.stride=32,32']


@pytest.mark.parametrize(
    'options', [['--sparse'], ['--tta'], ['--cfg-options', *SLIDE]], ids=['sparse', 'tta', 'slide']
)
def test_other_ways_to_test(
    run: Run,
    checkpoint: Path,
    small_config: Path,
    tmp_path: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sparse execution predicts the same; windows and augmentations do not, quite."""
    state = torch.load(checkpoint, weights_only=False)
    for name in ('backbone.gating.gates.weight', 'decode_head.conv_seg.weight'):  # all open, all the same class so far
        state['state_dict'][name].normal_(generator=torch.Generator().manual_seed(0))
    torch.save(state, tmp_path / 'random.pth')
    swapped = []
    monkeypatch.setattr(
        SparseInferenceHook, '_before_epoch', lambda self, runner, mode: swapped.append(SWAP(self, runner, mode))
    )
    predictions = []
    for name, extra in (('plain', []), ('other', options)):
        run('test.py', small_config, tmp_path / 'random.pth', '--work-dir', tmp_path, '--out', tmp_path / name, *extra)
        predictions.append([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).rglob('*.png'))])
    same = np.mean(np.equal(*predictions))
    sparse = options == ['--sparse']
    assert len(swapped) == sparse
    assert same > 0.999 if sparse else 0.3 < same < 1


def test_mmseg_train_py_runs_our_configs(run: Run, small_config: Path, tmp_path: Path) -> None:
    run(MMSEG_TRAIN, small_config, '--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_iters=2')
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=False)['state_dict']
    assert 'backbone.gating.gates.weight' in state


def refused(run: Run, capsys: pytest.CaptureFixture, *args: object) -> str:
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_images_of_one_name_in_two_folders(
    run: Run, checkpoint: Path, small_config: Path, scenes: Path, tmp_path: Path
) -> None:
    """Pictures and label maps keep the folders of their images."""
    for kind, suffix in (('leftImg8bit', 'leftImg8bit'), ('gtFine', 'gtFine_labelTrainIds')):
        (source,) = scenes.glob(f'{kind}/val/*/*000000_000019_{suffix}.png')
        for city in ('walk', 'drive'):
            (tmp_path / kind / 'val' / city).mkdir(parents=True)
            shutil.copy(source, tmp_path / kind / 'val' / city / f'0001_{suffix}.png')
    folders = [('--show-dir', tmp_path / 'pictures'), ('--out', tmp_path / 'labels')]
    run('test.py', small_config, checkpoint, '--work-dir', tmp_path / 'work', *folders[0], *folders[1],
        '--cfg-options', f'test_dataloader.dataset.data_root={tmp_path}')  # fmt: skip
    for _, folder in folders:
        written = sorted(str(path.relative_to(folder)) for path in folder.rglob('*.png'))
        assert written == ['drive/0001_leftImg8bit.png', 'walk/0001_leftImg8bit.png']


PURE = """
from deepmoe_plugin.mmseg import DeepMoEResNet
from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmcv.transforms import LoadImageFromFile

dataset = dict(
    type=CityscapesDataset, data_root={root!r}, data_prefix=dict(img_path={images!r}, seg_map_path='gtFine/train'),
    pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackSegInputs)],
)
"""


def pure(tmp_path: Path, root: Path, images: str = 'leftImg8bit/train') -> Path:
    """A config in pure Python, whose types are classes, for one iteration of training."""
    path = tmp_path / 'pure.py'
    path.write_text(
        PURE.format(root=str(root), images=images) + 'default_scope = "mmseg"\n'
        'train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset,\n'
        '                        sampler=dict(type="InfiniteSampler", shuffle=True))\n'
        'train_cfg = dict(type="IterBasedTrainLoop", max_iters=1)\n'
        'optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01))\n'
        'model = dict(type="EncoderDecoder", backbone=dict(type=DeepMoEResNet, depth=18, widen=0.25),\n'
        '             data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 128), seg_pad_val=255),\n'
        '             decode_head=dict(type="FCNHead", in_channels=512, in_index=3, channels=8, num_convs=1,\n'
        '                              num_classes=19, norm_cfg=dict(type="BN")),\n'
        '             train_cfg=dict(), test_cfg=dict(mode="whole"))\n'
        'custom_hooks = [dict(type="deepmoe_plugin.DeepMoELossHook")]\n'
        'default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False))\n'
    )
    return path


def test_config_in_pure_python(run: Run, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    message = refused(run, capsys, 'train.py', pure(tmp_path, scenes, 'nowhere'))
    assert f'folder {scenes}/nowhere does not exist' in message
    assert 'csCreateTrainIdLabelImgs' in message
    run('train.py', pure(tmp_path, scenes), '--work-dir', tmp_path / 'work')
    state = torch.load(tmp_path / 'work/iter_1.pth', weights_only=False)['state_dict']
    assert 'backbone.gating.gates.weight' in state


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'train_dataloader.dataset.type=CityscapesDatset',
            'train_dataloader.dataset: there is no type CityscapesDatset;',
        ),
        ('model.backbone.type=DeepMoEResNt', 'no type DeepMoEResNt; did you mean DeepMoEResNet'),
        ('model.decode_head.type=FNCHead', 'no type FNCHead; did you mean FPNHead or FCNHead'),
        ('custom_hooks.0.type=GateStatisticHook', 'no type GateStatisticHook; did you mean GateStatisticsHook'),
        ('train_dataloader.dataset.pipeline.0.type=LoadImage', 'no type LoadImage; did you mean LoadImageFromFile'),
    ],
)
def test_misspelt_types_are_named(run: Run, capsys: pytest.CaptureFixture, option: str, message: str) -> None:
    assert message in refused(run, capsys, 'train.py', STREETS, '--cfg-options', option)


def test_config_of_timm(run: Run, capsys: pytest.CaptureFixture) -> None:
    message = refused(run, capsys, 'train.py', 'wide_deepmoe_resnet50_imagenet')
    assert 'deepmoe run train.py --config wide_deepmoe_resnet50_imagenet' in message


def test_tta_that_the_config_lacks(run: Run, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / 'x.pth').touch()
    assert '--tta needs tta_pipeline and tta_model in the config' in refused(
        run, capsys, 'test.py', pure(tmp_path, scenes), tmp_path / 'x.pth', '--tta'
    )


def test_configs_by_name(run: Run, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    option = f'train_dataloader.dataset.data_root={tmp_path}/nowhere'
    for name in ('drn50_cityscapes', 'drn50_cityscapes.py'):
        message = refused(run, capsys, 'train.py', name, '--cfg-options', option)
        assert f'folder {tmp_path}/nowhere/leftImg8bit/train does not exist' in message
    assert 'did you mean drn50_cityscapes' in refused(run, capsys, 'train.py', 'drn50_cityscape')


def test_missing_config(run: Run, capsys: pytest.CaptureFixture) -> None:
    message = refused(run, capsys, 'train.py', CITYSCAPES.with_stem('drn50_cityscape'))
    assert 'drn50_cityscape.py does not exist; did you mean drn50_cityscapes' in message


def test_unknown_option(run: Run, capsys: pytest.CaptureFixture) -> None:
    message = refused(run, capsys, 'train.py', CITYSCAPES, '--cfg-options', 'modle.backbone.widen=2')
    assert 'the config has no key modle; did you mean model?' in message


def test_missing_checkpoint(run: Run, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert 'nothing.pth does not exist' in refused(run, capsys, 'test.py', STREETS, tmp_path / 'nothing.pth')


def test_missing_data(run: Run, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    option = f'train_dataloader.dataset.data_root={tmp_path}/nowhere'
    message = refused(run, capsys, 'train.py', CITYSCAPES, '--cfg-options', option)
    assert f'train_dataloader: folder {tmp_path}/nowhere/leftImg8bit/train does not exist' in message
    assert 'leftImg8bit_trainvaltest.zip' in message


def test_missing_camvid(run: Run, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    config = CITYSCAPES.with_stem('resnet18_camvid')
    message = refused(
        run, capsys, 'train.py', config, '--cfg-options', f'train_dataloader.dataset.data_root={tmp_path}'
    )
    assert f'folder {tmp_path}/img_dir/train does not exist' in message
    assert 'CityScapes' not in message


@pytest.mark.parametrize(('left', 'message'), [(0, '4 of 4 images'), (3, '1 of 4 images')])
def test_half_converted_data(
    run: Run, capsys: pytest.CaptureFixture, scenes: Path, tmp_path: Path, left: int, message: str
) -> None:
    root = tmp_path / 'data'
    shutil.copytree(scenes, root)
    for path in sorted((root / 'gtFine/train').rglob('*_labelTrainIds.png'))[left:]:
        path.unlink()
    error = refused(run, capsys, 'train.py', CITYSCAPES, '--cfg-options', f'train_dataloader.dataset.data_root={root}')
    assert message in error
    assert f'CITYSCAPES_DATASET={root} csCreateTrainIdLabelImgs' in error


def test_no_images(run: Run, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / 'leftImg8bit/train').mkdir(parents=True)
    option = f'train_dataloader.dataset.data_root={tmp_path}'
    assert 'no *_leftImg8bit.png in folder' in refused(run, capsys, 'train.py', CITYSCAPES, '--cfg-options', option)
