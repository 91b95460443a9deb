"""Segmentors that a command line names by an mmseg config, and the images that they test on."""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from timm.data import get_img_extensions
from timm.models import load_state_dict
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoints import check_readable
from ..mmseg import allow_histories


def read_segmentor(config: str) -> Any:
    """A config of mmseg, ready to build what it names.

    Raises:
        ValueError: there is no such file, or it has no model.
    """
    if not Path(config).is_file():
        raise ValueError(f'There is no file {config}.')
    register_all_modules(init_default_scope=False)
    settings = Config.fromfile(config)
    if 'model' not in settings:
        raise ValueError(f'{config} is no mmseg config of a network: it has no `model`.')
    init_default_scope(settings.get('default_scope', 'mmseg'))
    return settings


def create_segmentor(config: str, checkpoint: str | None = None, device: str = 'cpu') -> nn.Module:
    """The segmentor of an mmseg config, in evaluation mode, with the weights of the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config has no model, or the checkpoint is unsafe to read or belongs to another network.
    """
    settings = read_segmentor(config)
    settings.model.pretrained = None
    model = MODELS.build(settings.model)
    if checkpoint is not None:
        allow_histories()
        check_readable(checkpoint, '--checkpoint')
        try:
            model.load_state_dict(load_state_dict(checkpoint))
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} does not fit {config}: {error}') from error
    return model.eval().to(device)


def create_scenes(config: str, folder: str | None = None, workers: int = 0) -> DataLoader:
    """The images that an mmseg config tests on, read as it reads them, without label maps.

    Args:
        folder: others in their place: a data root in the layout of the config, or any folder of images.

    Raises:
        ValueError: the config does not say how test images are read, or there are none.
    """
    loader = read_segmentor(config).get('test_dataloader', {})
    dataset = loader.get('dataset', {})
    if 'pipeline' not in dataset:
        raise ValueError(f'{config} has no `test_dataloader.dataset.pipeline`, which says how images are read: add it.')
    dataset.pipeline = [step for step in dataset.pipeline if 'LoadAnnotations' not in str(step['type'])]
    inside = dataset.get('data_prefix', {}).get('img_path')
    if folder is not None and inside and Path(folder, inside).is_dir():
        dataset.data_root = folder
    elif folder is not None:
        images = dict(data_prefix=dict(img_path=folder), img_suffix=tuple(get_img_extensions()))
        loader.dataset = dict(type='mmseg.BaseSegDataset', pipeline=dataset.pipeline, **images)
    loader.update(num_workers=workers, persistent_workers=False)
    try:
        return Runner.build_dataloader(loader)
    except (FileNotFoundError, AssertionError, ValueError) as error:
        source = folder or f'test_dataloader of {config}'
        raise ValueError(f'There are no images in {source} ({error}): give their folder as --images.') from error
