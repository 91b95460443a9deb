"""Train a segmentor: `deepmoe train deepmoe_drn50_cityscapes`."""

from collections.abc import Sequence

from mmengine.runner import Runner

from .segmentation import check_data, check_types, load_config, segmentor_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = segmentor_parser('train', 'Train a segmentor with the Runner of mmengine.')
    parser.add_argument(
        '--resume', action='store_true', help='go on from the latest checkpoint in the work dir, if there is one'
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    args = parser.parse_args(argv)
    config = load_config(parser, args)
    config.resume = args.resume
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    check_types(parser, config)
    check_data(parser, config, 'train', 'val')
    Runner.from_cfg(config).train()
