"""Trains a network on digits that stay in memory, with the settings of a YAML of timm's train.py.

The images of these networks are so small that reading them one by one takes longer than training. Task, optimizer and
schedule are timm's; where the network's images are wider than a digit, every epoch sees fresh shifts.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from .digits import Digits, draw_shifts, pad, shift
from .information import gate_entropy, mutual_information, use_entropy
from .mixture import Mixture
from .terms import gating_terms

# Options of train.py that this understands, and their values there. Others are refused: they would be left out.
OPTIONS: dict[str, Any] = {
    'model': None,
    'model_kwargs': {},
    'input_size': None,
    'mean': None,
    'std': None,
    'epochs': 300,
    'batch_size': 128,
    'opt': 'sgd',
    'lr': 0.05,
    'momentum': 0.9,
    'weight_decay': 2e-5,
    'sched': 'cosine',
    'min_lr': 0.0,
    'warmup_epochs': 5,
    'sched_on_updates': False,
}
# Of no meaning for images in memory, or what is done in any case.
IGNORED = ('dataset', 'device_modules', 'scale', 'ratio', 'train_interpolation', 'hflip', 'color_jitter', 'smoothing')


class DigitData:
    """Digits as a network takes them: windows of the size of its images, normalised.

    Args:
        digits: images of one split.
        split: 'train' or 'validation', for the shifts that are drawn once.
        size: side of the network's images; wider than a digit by twice the largest shift.
        mean, std: of the normalisation.
    """

    def __init__(self, digits: Digits, split: str, size: int, mean: float, std: float) -> None:
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
    """The options of a YAML of train.py, with the defaults that train.py has.

    Raises:
        ValueError: there is an option that this does not understand.
    """
    unknown = sorted(set(config) - set(OPTIONS) - set(IGNORED))
    if unknown:
        raise ValueError(f"Training in memory has no option {unknown[0]}: leave it out, or use timm's train.py.")
    return {**OPTIONS, **{name: value for name, value in config.items() if name in OPTIONS}}


def train_digits(options: dict[str, Any], model: nn.Module, data: DigitData, seed: int, log: Any = print) -> nn.Module:
    """Train a network with the options of `read_options`; returns it."""
    rng = np.random.default_rng(seed)
    criterion = nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(
        model,
        opt=options['opt'],
        lr=options['lr'],
        weight_decay=options['weight_decay'],
        **({} if options['opt'].startswith('adam') else {'momentum': options['momentum']}),
    )
    steps = len(data.labels) // options['batch_size']
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options['sched'],
        num_epochs=options['epochs'],
        min_lr=options['min_lr'],
        warmup_epochs=options['warmup_epochs'],
        warmup_lr=1e-5,
        decay_epochs=options['epochs'],
        step_on_epochs=not options['sched_on_updates'],
        updates_per_epoch=steps,
    )
    for epoch in range(options['epochs']):
        model.train()
        started, total, step = time.perf_counter(), torch.zeros(()), epoch * steps
        for images, labels in data.epoch(options['batch_size'], rng):
            loss = criterion(model(images), labels)
            terms = gating_terms(model, labels, criterion, loss)
            loss = loss + sum(value for name, value in terms.items() if 'loss' in name)
            total += loss.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if scheduler is not None:
                scheduler.step_update(step)
        if scheduler is not None:
            scheduler.step(epoch + 1)
        seconds = time.perf_counter() - started
        log(f'epoch {epoch + 1}/{options["epochs"]} ({seconds:.1f} s)  loss: {float(total) / steps:#.3g}')
        if not math.isfinite(float(total)):
            raise ValueError('The loss is not finite: lower the learning rate.')
    return model


@torch.inference_mode()
def test_digits(model: nn.Module, data: DigitData) -> dict[str, Any]:
    """Error, and what the gates tell, in bits, for all images with their fixed shifts."""
    model.eval()
    wrong, labels, gates, predicted = 0, [], [], []
    for images, truth in data.fixed():
        wrong += int((model(images).argmax(1) != truth).sum())
        labels.append(truth)
        if isinstance(model, Mixture):
            record = model.look(images)
            gates.append(record.gates)
            predicted.append(record.predicted)
    result: dict[str, Any] = {'error': wrong / len(data.labels)}
    truth = torch.cat(labels)
    places = torch.from_numpy((data.shifts + data.max_shift) @ [2 * data.max_shift + 1, 1])
    for layer in zip(*gates, strict=True):
        all_gates = torch.cat(layer)
        chosen = all_gates.argmax(1)
        result.setdefault('layers', []).append(
            {
                'gate_entropy': float(gate_entropy(all_gates)),
                'use_entropy': float(use_entropy(all_gates)),
                'prediction_information': float(mutual_information(chosen, torch.cat(predicted))),
                'class_information': float(mutual_information(chosen, truth)),
                'shift_information': float(mutual_information(chosen, places)),
                'mean_gates': all_gates.mean(0).tolist(),
                'chosen_share': (torch.bincount(chosen, minlength=all_gates.shape[1]) / len(chosen)).tolist(),
            }
        )
    return result
