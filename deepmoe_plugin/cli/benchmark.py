"""Time sparse execution against masked dense execution, against an ideal thin network and against the dense base.

All variants run in one process, one after the other in every repetition, on the same images and gates. Each
repetition draws new gates, so that no gathered weight is used twice. Norms are folded in every variant, and each plain
network runs in the memory format that suits it best. With --engines, the thin network and the wide one without gates
also run on what users deploy with instead of PyTorch. Before anything is timed, each of them must compute what the
masked network computes with the same experts, the thin ones with those that they have. Gates are random ones at an
exact fraction, without the time of the gating network, or those that a trained checkpoint gives to real images, with
it.

    deepmoe benchmark wide_deepmoe_resnet50 --kept 0.5 --out results/resnet50
    deepmoe benchmark wide_deepmoe_resnet50 --checkpoint model_best.pth.tar --images imagenet/val
    deepmoe benchmark wide_deepmoe_resnet20_cifar --pretrained --images photos
"""

import argparse
import copy
import csv
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from tqdm import tqdm

import deepmoe_plugin

from ..experts import expert_widths
from ..macs import MacsTable
from .engines import ENGINES, Missing
from .images import data_config
from .networks import NETWORK_HELP, add_network_arguments, create_network, read_settings
from .parsing import create_parser, output_folder
from .peers import (
    GivenGates,
    RealGates,
    SyntheticGates,
    check_same,
    folded,
    random_experts,
    thinned,
    wake,
    with_gates,
)
from .timm_options import model_arguments

DTYPES = {name: getattr(torch, name) for name in ('float32', 'bfloat16', 'float16', 'float64')}
VARIANTS = {
    'masked': 'masked dense',
    'sparse': 'sparse',
    'thin': 'ideal thin',
    'thin_fused': 'ideal thin, this engine',
    'base': 'dense base, unwidened',
}
BY_ENGINE = {
    f'{variant}_{engine}': f'{label}, {engine}'
    for variant, label in (('thin', 'ideal thin'), ('wide', 'wide, no gates'))
    for engine in ENGINES
}


def load_images(in_chans: int, args: argparse.Namespace, settings: dict[str, Any]) -> list[Tensor]:
    """As many batches of real images as there are repetitions, prepared as timm does with these settings."""
    config = data_config({**settings, 'input_size': (in_chans, *args.size)})
    mode = settings.get('input_img_mode') or ('RGB' if in_chans == 3 else 'L')
    dataset = create_dataset('', root=args.images, transform=create_transform(**config), input_img_mode=mode)
    if len(dataset) < args.batch:
        raise SystemExit(f'--images {args.images} holds {len(dataset)} images, fewer than --batch {args.batch}.')
    wanted = args.batch * min(args.repeats, len(dataset) // args.batch)
    chosen = torch.randperm(len(dataset))[:wanted].tolist()
    images = torch.stack([dataset[i][0] for i in tqdm(chosen, desc='images')])
    return list(images.to(args.device, DTYPES[args.dtype]).split(args.batch))


FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
FORMAT_TRIALS, FORMAT_SECONDS = 8, 20


def best_format(model: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    """The model in the faster of both memory formats."""
    candidates = {
        name: (copy.deepcopy(model).to(memory_format=memory_format), x.contiguous(memory_format=memory_format))
        for name, memory_format in FORMATS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(FORMAT_TRIALS):
        if trial > 1 and sum(map(sum, times.values())) > FORMAT_SECONDS:
            break
        for name, (candidate, images) in candidates.items():
            times[name].append(measure(functools.partial(candidate, images), 'wall'))
    best = min(times, key=lambda name: min(times[name]))
    return candidates[best][0], best


REST = 0.02
"""Seconds before each variant where other engines run as well: the threads of ONNX Runtime and OpenVINO go on looking
for work after theirs, and would take the cores from what runs next."""


def measure(function: Callable[[], Any], clock: str) -> float:
    """Seconds that one call takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    now = time.perf_counter if clock == 'wall' else time.process_time
    start = now()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start


def build(
    args: argparse.Namespace, kept: float | None
) -> tuple[dict[str, Callable[[], Callable[[], Any]]], SyntheticGates | RealGates, dict[str, Any]]:
    """The variants, the gates that they share, and facts about them.

    A variant prepares the images of the current draw, which is not timed, and returns the function to time.
    """
    dtype, device = DTYPES[args.dtype], torch.device(args.device)
    height, width = args.size
    settings = read_settings(args.network, args)
    if not args.pretrained:
        settings.setdefault('num_classes', 1000)
    name = settings['model']
    network = create_network(settings, args).to(dtype)
    if not isinstance(network, deepmoe_plugin.DeepMoE):
        raise ValueError(f'{name} has no gates: choose a deepmoe model.')
    structure = dict(model_arguments(settings), device=device)
    deepmoe_plugin.GatingConfig.pop_from(structure)
    model: Any = network
    if kept is not None:
        wake(model)
    widths = expert_widths(model, model.expert_layers)
    size = model.gating.gates.experts_per_gate
    gates: SyntheticGates | RealGates
    if kept is None:
        gates = RealGates(model, load_images(model.in_chans, args, settings))
    else:
        x = torch.randn(args.batch, model.in_chans, height, width, device=device, dtype=dtype)
        gates = model.gating = SyntheticGates(widths, x, kept, size)
    wide: Any = timm.create_model(name, gated=False, **structure).to(dtype).eval()
    wide.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    base: Any = timm.create_model(name, gated=False, **dict(structure, widen=1)).to(dtype).eval()
    everything = [torch.arange(width) for width in widths]
    chosen = random_experts(widths, gates.counts, size)
    thin = thinned(wide, chosen)
    facts: dict[str, Any] = {
        'model': name,
        'base_gmacs': MacsTable(base, (height, width)).dense() / 1e9,
        'thin_gmacs': MacsTable(thin, (height, width)).dense() / 1e9,
    }
    masked = {
        'thin': with_gates(model, GivenGates(chosen, widths)),
        'wide': with_gates(model, GivenGates(everything, widths)),
    }
    functions: dict[str, Callable[[], Callable[[], Any]]] = {}

    def add(variant: str, network: Any, same_as: nn.Module | None, tune: bool = True) -> None:
        memory_format = torch.preserve_format
        if tune:
            network, facts[f'{variant}_format'] = best_format(network, gates.images)
            memory_format = FORMATS[facts[f'{variant}_format']]

        def prepare() -> Callable[[], Any]:
            images = gates.images.clone(memory_format=memory_format)
            return lambda: network(images)

        if same_as is not None:
            check_same({**VARIANTS, **BY_ENGINE}[variant], prepare(), same_as(gates.images))
        functions[variant] = prepare

    if 'masked' in args.variants:
        add('masked', folded(model), model)
    if 'sparse' in args.variants:
        gates.draw()
        x = gates.images
        sparse = deepmoe_plugin.sparsify(model, calibrate=x if args.calibrate else None, cache_mb=0)
        add('sparse', sparse, model, tune=False)
    if 'thin' in args.variants:
        add('thin', folded(thin), masked['thin'])
    if 'thin_fused' in args.variants:
        gated = thinned(model, chosen)
        counts = list(map(len, chosen))
        gated.gating = GivenGates([torch.arange(count) for count in counts], counts)
        add('thin_fused', deepmoe_plugin.sparsify(gated), masked['thin'], tune=False)
    if 'base' in args.variants:
        add('base', folded(base), None)
    for kind, dense in (('thin', thin), ('wide', wide)) if args.engines else ():
        for engine in args.engines:
            variant = f'{kind}_{engine}'
            try:
                found = ENGINES[engine](folded(dense), gates.images)
                add(variant, found, masked[kind], tune=False)
            except (Missing, ValueError) as error:
                print(f'Without {BY_ENGINE[variant]}: {error}.')
    return functions, gates, facts


def run(args: argparse.Namespace, kept: float | None) -> dict[str, Any]:
    """Time all variants at one fraction of kept experts, or with the gates of real images (None)."""
    functions, gates, facts = build(args, kept)
    times: dict[str, list[float]] = {name: [] for name in functions}
    if isinstance(gates, RealGates):
        kept = gates.stats.kept_experts
    for repetition in tqdm(range(-args.warmup, args.repeats), desc=f'{facts["model"]} kept {kept:.3g}'):
        gates.draw()
        for name, prepare in functions.items():
            call = prepare()
            if args.engines:
                time.sleep(REST)
                call()  # wakes the threads of this variant's engine
            seconds = measure(call, args.clock)
            if repetition >= 0:
                times[name].append(seconds)
    row: dict[str, Any] = {
        'size': f'{args.size[0]}x{args.size[1]}',
        'batch': args.batch,
        'dtype': args.dtype,
        'threads': torch.get_num_threads(),
        'kept': kept,
    }
    row |= {f'{name}_ms': 1e3 * statistics.median(values) for name, values in times.items()}
    for name, of, by in (
        ('speedup', 'masked', 'sparse'),
        ('efficiency', 'thin', 'sparse'),
        ('efficiency_fused', 'thin_fused', 'sparse'),
    ):
        if of in times and by in times:
            row[name] = statistics.median(a / b for a, b in zip(times[of], times[by], strict=True))
    if args.engines and 'sparse' in times:
        for name, candidates in (
            ('speedup_best', ['masked', *(f'wide_{engine}' for engine in ENGINES)]),
            ('efficiency_best', ['thin', *(f'thin_{engine}' for engine in ENGINES)]),
        ):
            timed = [candidate for candidate in candidates if candidate in times]
            if timed:
                best = min(timed, key=lambda candidate: statistics.median(times[candidate]))
                row[name] = statistics.median(a / b for a, b in zip(times[best], times['sparse'], strict=True))
                row[f'{name}_engine'] = best
    return row | facts


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the table; with `--out`, write it with what it was measured on, and a plot."""
    for row in rows:
        setting = ', '.join(f'{key} {row[key]}' for key in ('size', 'batch', 'dtype', 'threads'))
        setting += f', kept {row["kept"]:.3g}'
        print(f'\n{row["model"]}: {setting}')
        for name, label in {**VARIANTS, **BY_ENGINE}.items():
            if f'{name}_ms' in row:
                print(f'  {label:26}{row[f"{name}_ms"]:10.2f} ms')
        for name, label in (
            ('speedup', 'speed-up over masked'),
            ('efficiency', 'efficiency (thin / sparse)'),
            ('efficiency_fused', 'the same, thin fused'),
            ('speedup_best', 'speed-up over best dense'),
            ('efficiency_best', 'efficiency, best thin'),
        ):
            if name in row:
                against = f'  ({row[f"{name}_engine"]})' if f'{name}_engine' in row else ''
                print(f'  {label:26}{row[name]:10.3f}{against}')
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    circumstances = {
        'processor': processor_name(args.device),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'python': platform.python_version(),
        'arguments': {key: str(value) for key, value in vars(args).items()},
    }
    (args.out / 'benchmark.json').write_text(json.dumps({'setting': circumstances, 'rows': rows}, indent=2) + '\n')
    with (args.out / 'benchmark.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(args, rows)


def processor_name(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    for line in Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else ():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor()


def plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    try:
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot
    except ImportError:
        print('No plot: matplotlib is not installed.')
        return
    figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
    for name, label in {**VARIANTS, **BY_ENGINE}.items():
        points = [(row.get('thin_gmacs', row['kept']), row[f'{name}_ms']) for row in rows if f'{name}_ms' in row]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker='o', label=label)
    axes.set(xlabel='GMACs of the kept experts', ylabel='time of a batch [ms]', title=rows[0]['model'], ylim=(0, None))
    axes.legend()
    figure.savefig(args.out / 'benchmark.png', dpi=150)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = create_parser('benchmark', __doc__)
    parser.add_argument('network', help=NETWORK_HELP)
    add_network_arguments(parser)
    parser.add_argument(
        '--size', type=int, nargs='+', help="height and width of images, one number for both (default: the network's)"
    )
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dtype', choices=DTYPES, default='float32')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, help='threads of torch (default: its own choice)')
    parser.add_argument(
        '--kept', type=float, nargs='+', help='fraction(s) of experts kept in each layer (default: 0.5)'
    )
    parser.add_argument('--images', help='folder of images (any depth) whose gates to use; needs trained weights')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        '--engines', nargs='+', choices=ENGINES, default=[], help='also time the dense networks on these'
    )
    parser.add_argument('--calibrate', action='store_true', help='let sparsify time both ways first')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall', help='cpu: time of all threads together')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=output_folder, help='folder for benchmark.csv, benchmark.json and benchmark.png')
    args = parser.parse_args(argv)
    if args.size is not None:
        args.size = args.size * 2 if len(args.size) == 1 else args.size
        if len(args.size) != 2:
            parser.error('--size takes one or two numbers')
    if args.kept and any(not 0 <= kept <= 1 for kept in args.kept):
        parser.error('--kept takes fractions between 0 and 1')
    args.trained = args.pretrained or args.checkpoint is not None
    if args.trained != bool(args.images):
        parser.error(
            '--images and trained weights (--checkpoint or --pretrained) go together: the gates and the images that '
            'they see'
        )
    if args.trained and args.kept:
        parser.error('--kept makes random gates, trained weights bring their own: give one of them')
    return parser, args


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    fractions = [None] if args.trained else args.kept or [0.5]
    try:
        if args.size is None:
            args.size = list(data_config(read_settings(args.network, args))['input_size'][1:])
        rows = [run(args, kept) for kept in fractions]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    report(args, rows)
