"""What gating costs in training: step time and peak memory of a DeepMoE network against the same network without gates.

Both networks have the same widths and are timed in one process, step by step in turn; the ratio is the median over
the pairs of steps. Peak memory is that of torch's allocator (weights, gradients and optimizer state included), measured
over two steps in a process of its own for each network.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import trange

import deepmoe_plugin

from .parsing import create_parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    context = multiprocessing.get_context('spawn')
    with context.Pool(1, maxtasksperchild=1) as pool:
        memory = {gated: pool.apply(peak_memory, (args, gated)) for gated in (False, True)}
    steps = {gated: training_step(args, gated) for gated in (False, True)}
    for _ in range(args.warmup):
        for step in steps.values():
            step()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in trange(args.steps, desc=args.model, unit='pair'):
        for gated, step in steps.items():
            seconds[gated].append(timed(step, args.device))
    ratio = statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
    plain, gated_time = (1000 * statistics.median(seconds[gated]) for gated in (False, True))
    name = torch.cuda.get_device_name() if args.device == 'cuda' else f'{platform.machine()} CPU'
    print(
        f'{args.model}, batch {args.batch_size}, {args.image_size}x{args.image_size}, {args.dtype}, '
        f'{args.memory_format}{", compiled" if args.compile else ""}; {name}, {torch.get_num_threads()} threads, '
        f'torch {torch.__version__}, timm {timm.__version__}, medians of {args.steps} steps\n\n'
        '| | without gates | with gates | ratio |\n|---|--:|--:|--:|\n'
        f'| step time (ms) | {plain:.0f} | {gated_time:.0f} | {ratio:.3f} |\n'
        f'| peak memory (MiB) | {memory[False]:.0f} | {memory[True]:.0f} | {memory[True] / memory[False]:.3f} |'
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = create_parser('benchmark-training', __doc__)
    parser.add_argument('--model', default='wide_deepmoe_resnet50', help='a DeepMoE model (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=16, help='images per step (default: %(default)s)')
    parser.add_argument('--image-size', type=int, default=224, help='pixels per side (default: %(default)s)')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='autocast type')
    parser.add_argument('--memory-format', choices=('channels_last', 'contiguous_format'), default='channels_last')
    parser.add_argument('--compile', action='store_true', help='torch.compile both networks')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--threads', type=int, default=0, help='CPU threads (default: all)')
    parser.add_argument('--steps', type=int, default=11, help='timed steps of each network (default: %(default)s)')
    parser.add_argument('--warmup', type=int, default=2, help='untimed steps (default: %(default)s)')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: no CUDA device is available')
    return args


def training_step(args: argparse.Namespace, gated: bool) -> Callable[[], None]:
    """Build the network with or without its gates; return a function that trains it for one step."""
    torch.manual_seed(0)
    memory_format = getattr(torch, args.memory_format)
    model: Any = timm.create_model(args.model, gated=gated).to(args.device).to(memory_format=memory_format)
    called: Any = torch.compile(model) if args.compile else model
    criterion = deepmoe_plugin.DeepMoELoss(called, nn.CrossEntropyLoss()) if gated else nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    images = images.to(memory_format=memory_format)
    labels = torch.randint(model.num_classes, (args.batch_size,), device=args.device)

    def step() -> None:
        with torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != 'float32'):
            loss = criterion(called(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one step."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(args: argparse.Namespace, gated: bool) -> float:
    """Peak memory of training in MiB: the most that torch's allocator has handed out at one time."""
    if args.device == 'cuda':
        step = training_step(args, gated)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = training_step(args, gated)
        step()
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace.json')
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    return max(event['args']['Total Allocated'] for event in events if event['name'] == '[memory]') / 2**20
