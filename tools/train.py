"""Train a segmentor: `python tools/train.py configs/mmseg/deepmoe_drn50_cityscapes.py`."""

from segmentation import check_data, create_parser, load_config


def main() -> None:
    parser = create_parser('Train a segmentor with the Runner of mmengine.')
    parser.add_argument(
        '--resume', action='store_true', help='go on from the latest checkpoint in the work dir, if there is one'
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    args = parser.parse_args()
    config = load_config(parser, args)
    config.resume = args.resume
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    check_data(parser, config, 'train', 'val')

    from mmengine.runner import Runner

    Runner.from_cfg(config).train()


if __name__ == '__main__':
    main()
