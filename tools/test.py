"""Test a segmentor: `python tools/test.py CONFIG CHECKPOINT --show-dir output/pictures`."""

from pathlib import Path
from typing import Any

from segmentation import check_data, create_parser, load_config


def main() -> None:
    parser = create_parser('Test a segmentor with the Runner of mmengine.')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='folder to save the predicted label maps to')
    parser.add_argument('--show-dir', help='folder for pictures: input, ground truth and prediction side by side')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: mirrored and in several sizes')
    parser.add_argument('--sparse', action='store_true', help='compute only the channels that the gates keep')
    args = parser.parse_args()
    config = load_config(parser, args)
    if '://' not in args.checkpoint and not Path(args.checkpoint).is_file():
        parser.error(f'checkpoint {args.checkpoint} does not exist')
    config.load_from = args.checkpoint
    if args.tta:
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = dict(config.tta_model, module=config.model)
    if args.sparse:
        config.custom_hooks = [*config.get('custom_hooks', []), dict(type='SparseInferenceHook')]
    if args.out:
        config.test_evaluator.output_dir = args.out
    check_data(parser, config, 'test')

    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    if args.show_dir:
        runner.register_hook(picture_hook(Path(args.show_dir)))
    runner.test()


def picture_hook(folder: Path) -> Any:
    """A hook that writes each image beside its ground truth and its prediction, in the colours of the dataset."""
    import mmcv
    import numpy as np
    from mmengine.hooks import Hook

    class PictureHook(Hook):
        def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            palette = np.zeros((256, 3), np.uint8)  # what is ignored stays black
            colours = runner.test_dataloader.dataset.metainfo['palette']
            palette[: len(colours)] = colours
            for sample in outputs:
                panels = [mmcv.imread(sample.img_path)]
                for name in ('gt_sem_seg', 'pred_sem_seg'):
                    if name in sample:
                        labels = sample.get(name).data.squeeze().cpu().numpy().astype(np.uint8)
                        panels.append(palette[labels][..., ::-1])
                mmcv.imwrite(np.hstack(panels), str(folder / f'{Path(sample.img_path).stem}.png'))

    return PictureHook()


if __name__ == '__main__':
    main()
