"""Test a segmentor: `deepmoe test CONFIG CHECKPOINT --show-dir output/pictures`."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from .parsing import output_folder
from .segmentation import check_data, check_types, load_config, segmentor_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = segmentor_parser('test', 'Test a segmentor with the Runner of mmengine.')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=output_folder, help='folder to save the predicted label maps to')
    parser.add_argument('--show-dir', type=output_folder, help='folder for pictures: input, ground truth, prediction')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: mirrored and in several sizes')
    parser.add_argument('--sparse', action='store_true', help='compute only the channels that the gates keep')
    args = parser.parse_args(argv)
    config = load_config(parser, args)
    if '://' not in args.checkpoint and not Path(args.checkpoint).is_file():
        parser.error(f'checkpoint {args.checkpoint} does not exist')
    config.load_from = args.checkpoint
    if args.tta:
        lacking = [name for name in ('tta_pipeline', 'tta_model') if name not in config]
        if lacking:
            parser.error(f'--tta needs {" and ".join(lacking)} in the config')
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = dict(config.tta_model, module=config.model)
    if args.sparse:
        config.custom_hooks = [*config.get('custom_hooks', []), dict(type='deepmoe_plugin.SparseInferenceHook')]
    check_types(parser, config)
    check_data(parser, config, 'test')
    runner = Runner.from_cfg(config)
    for folder, draw in ((args.show_dir, _picture), (args.out, _labels)):
        if folder:
            runner.register_hook(_WriteHook(folder, draw))
    runner.test()


class _WriteHook(Hook):
    """Writes a picture of each tested image, in the sub-folder and under the name that the image has in its data set.

    Args:
        folder: to write to.
        draw: makes the pixels from a data sample and the colours of the classes.
    """

    def __init__(self, folder: Path, draw: Any) -> None:
        self.folder = folder
        self.draw = draw

    def before_test(self, runner: Any) -> None:
        roots = [os.path.abspath(root) for root in _image_folders(runner.test_dataloader.dataset)]
        self.root = os.path.commonpath(roots) if roots else os.getcwd()
        self.palette = np.zeros((256, 3), np.uint8)  # what is ignored stays black
        colours = runner.test_dataloader.dataset.metainfo['palette']
        self.palette[: len(colours)] = colours

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for sample in outputs:
            path = Path(os.path.relpath(os.path.abspath(sample.img_path), self.root))
            inside = Path(*(part for part in path.parts if part != os.pardir))
            mmcv.imwrite(self.draw(sample, self.palette), str(self.folder / inside.with_suffix('.png')))


def _image_folders(dataset: Any) -> Iterator[str]:
    """The folders of images of a dataset, or of those inside of it."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    for part in inner:
        yield from _image_folders(part)
    folder = getattr(dataset, 'data_prefix', {}).get('img_path')
    if folder and not inner:
        yield folder


def _picture(sample: Any, palette: np.ndarray) -> np.ndarray:
    """The image beside its ground truth and its prediction, in the colours of the dataset."""
    panels = [mmcv.imread(sample.img_path)]
    for name in ('gt_sem_seg', 'pred_sem_seg'):
        if name in sample:
            labels = sample.get(name).data.squeeze().cpu().numpy().astype(np.uint8)
            panels.append(palette[labels][..., ::-1])
    return np.hstack(panels)


def _labels(sample: Any, _: np.ndarray) -> np.ndarray:
    """The predicted label map, counted from 1 where the dataset reads label 0 as none, as its label maps are."""
    labels = sample.pred_sem_seg.data.squeeze().cpu().numpy().astype(np.uint8)
    return labels + 1 if sample.metainfo.get('reduce_zero_label', False) else labels
