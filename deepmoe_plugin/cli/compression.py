"""What `deepmoe compress` does alike for classifiers and segmentors: arguments, budgets, and the table."""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..budgets import recalibrate_norms, set_budget
from ..network import deepmoe_networks
from ..warm_start import DYNAMIC

RAMP = 0.2
"""Share of the training in which the budget falls from everything to the target, before stage 2."""
TEMPERATURE = 4.0
"""Logits are divided by it before the network is compared with its teacher (Hinton et al. 2015)."""
GROUPS = 8
"""Latent experts of the gated network: each stands for a group of images that keep the same experts."""
NORM_IMAGES, NORM_BUDGETS = 4000, 5
"""Training images that the norms are measured on, and at how many budgets of a range."""
_SHARES = {
    'kept_experts': 'kept experts (%)',
    'dynamic_experts': 'dynamic (%)',
    'embedding_right': 'embedding alone (%)',
    'right_where_wrong': 'right where it is wrong (%)',
}
"""Columns that hold fractions of gated networks."""
_UNITS = {'MMACs': 1e3, 'GMACs': 1.0}


def add_recipe(parser: argparse.ArgumentParser, baselines: Sequence[str]) -> None:
    """Add the arguments of the recipe; `check_recipe` checks them."""
    parser.add_argument(
        '--macs',
        type=float,
        nargs='+',
        default=[0.5],
        metavar='FRACTION',
        help='of the dense MACs, gating included (default: 0.5); two fractions, the smaller one first, are a range: '
        'each step draws a budget from it, and the network can be given any of them afterwards',
    )
    parser.add_argument(
        '--dynamic-experts',
        type=float,
        default=DYNAMIC,
        metavar='FRACTION',
        help='of the experts that some groups of images keep and others close; with 0 all images keep the same, and '
        '`deepmoe_plugin.prune` removes the others for good (default: %(default)s)',
    )
    parser.add_argument(
        '--stage2',
        type=float,
        default=1.0,
        help='share of the training with frozen gates, the last; before it, the budget falls to its target step by '
        'step (default: %(default)s: experts close at once)',
    )
    parser.add_argument(
        '--distill', type=float, default=0.9, help="weight of the teacher's logits, from 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        '--hint',
        type=float,
        default=1.0,
        help="weight of the relative error of each stage's output, seen from the teacher's (default: %(default)s)",
    )
    parser.add_argument('--resume', action='store_true', help='go on from the last state in the output folder')
    parser.add_argument(
        '--baselines', nargs='*', choices=baselines, default=[], help='train these as long as well: %(choices)s'
    )


def check_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message where an argument of the recipe cannot work."""
    for name in ('stage2', 'distill', 'dynamic_experts'):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f'--{name.replace("_", "-")} must be a fraction between 0 and 1, got {getattr(args, name)}')
    if args.hint < 0:
        parser.error(f'--hint must not be negative, got {args.hint}')
    given = ' '.join(map(str, args.macs))
    if not all(0 < fraction < 1 for fraction in args.macs):
        parser.error(f'--macs must be a fraction between 0 and 1, got {given}')
    if len(args.macs) > 2 or sorted(set(args.macs)) != args.macs:
        parser.error(f'--macs takes one fraction, or a smaller and a larger one, got {given}')


def target_of(targets: Mapping[float, float]) -> float | tuple[float, ...]:
    """`target_macs` of a network with these targets; see `each_budget`."""
    values = tuple(targets.values())
    return values if len(values) > 1 else values[0]


def each_budget(
    targets: Mapping[float, float], title: str, model: nn.Module, loader: Iterable[Sequence[Any]]
) -> Iterator[str]:
    """Give a trained network each of its budgets in turn, the smallest last, and yield a title for each.

    Each budget of a range gets norm statistics of its own: those of the training are a mixture of all. Budgets between
    these three are then within reach as well.

    Args:
        targets: what the user asked for, and the `target_macs` that it takes: one of each, or the ends of a range, the
            smaller one first.
        title: of the network.
        model: one with gates keeps the budget that was set for one target; a dense one is not changed.
        loader: of training images as tuples that start with a batch; the norms are measured on the first of them.
    """
    if len(targets) < 2 or not any(True for _ in deepmoe_networks(model)):
        yield title
        return
    (low, first), (high, last) = targets.items()
    recalibrate_norms(model, _FirstImages(loader), macs=torch.linspace(first, last, NORM_BUDGETS).tolist())
    for fraction, target in ((high, last), ((low + high) / 2, (first + last) / 2), (low, first)):
        set_budget(model, macs=target)
        yield f'{title}, at {fraction:.4g}'


class _FirstImages:
    """The first batches of a loader, as often as they are asked for."""

    def __init__(self, loader: Iterable[Sequence[Any]]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        for images, *_ in self._loader:
            yield images
            seen += len(images)
            if seen >= NORM_IMAGES:
                return


def write_table(folder: Path, summary: dict[str, Any], accuracy: tuple[str, str], unit: str) -> str:
    """Write results.json and results.md, and return the table.

    Args:
        folder: to write to.
        summary: whose `results` are rows with `name`, accuracy, `gmacs`, its spread `gmacs_std` where it is known,
            and the time `ms` with its `engine` if it was measured.
        accuracy: its name in the rows, and the title of its column.
        unit: 'MMACs' or 'GMACs'.
    """
    table = format_table(summary['results'], accuracy, unit)
    (folder / 'results.json').write_text(json.dumps(summary, indent=2) + '\n')
    (folder / 'results.md').write_text(table + '\n')
    return table


def format_table(rows: Sequence[dict[str, Any]], accuracy: tuple[str, str], unit: str) -> str:
    """The results as Markdown; see `write_table`."""
    shares = {name: title for name, title in _SHARES.items() if any(row.get(name) is not None for row in rows)}
    timed = ['ms per image'] if any('ms' in row for row in rows) else []
    titles = ['network', accuracy[1], f'{unit} per image', *timed, *shares.values()]
    lines = [f'| {" | ".join(titles)} |', '|---|' + '--:|' * (len(titles) - 1)]
    for row in rows:
        macs = f'{_UNITS[unit] * row["gmacs"]:.2f}'
        if 'gmacs_std' in row:
            macs += f' ± {_UNITS[unit] * row["gmacs_std"]:.2f}'
        times = [f'{row["ms"]:.2f} ({row["engine"]})' for _ in timed]
        fractions = ['' if row.get(name) is None else f'{100 * row[name]:.1f}' for name in shares]
        lines.append(f'| {" | ".join([row["name"], f"{row[accuracy[0]]:.2f}", macs, *times, *fractions])} |')
    return '\n'.join(lines)
