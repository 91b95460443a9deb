"""Time of one image: networks of different kinds, each as a user would run it, by turns in one process."""

import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deepmoe_plugin

from ..network import DeepMoE
from .benchmark import FORMATS, REST, best_format, measure, processor_name
from .engines import ENGINES, Missing
from .peers import check_same, folded

TORCH = 'torch'
SPARSE = 'sparse'
WAYS = (TORCH, *ENGINES)
"""What dense networks can run on."""
REPEATS, WARMUP = 40, 5
TIMED_BATCHES, TIMED_IMAGES = 16, 40


class Timing(NamedTuple):
    """Median time of one image in milliseconds, and what ran it."""

    ms: float
    engine: str


class _Candidate(NamedTuple):
    network: str
    engine: str
    memory_format: torch.memory_format
    run: Callable[[Tensor], Any]


@torch.no_grad()
def time_of_an_image(
    networks: Mapping[str, nn.Module], images: Sequence[Tensor], engines: Sequence[str]
) -> dict[str, Timing]:
    """Time networks on the same images, one after the other in each repetition.

    Args:
        networks: gated ones run sparsely, and gather the weights of each image anew; dense ones run on torch, with
            norms folded and in their fastest memory format, and on the engines. The fastest of these counts.
        images: each of shape (1, in_chans, H, W); the repetitions take them in turn.
        engines: names of those to try, of `ENGINES` or 'torch'.

    Raises:
        ValueError: no engine runs a dense network.
    """
    candidates = [candidate for name, model in networks.items() for candidate in _ways(name, model, images[0], engines)]
    times: dict[_Candidate, list[float]] = {candidate: [] for candidate in candidates}
    for repetition in range(-WARMUP, REPEATS):
        image = images[repetition % len(images)]
        for candidate in candidates:
            x = image.contiguous(memory_format=candidate.memory_format)
            if any(engine != TORCH for engine in engines):
                time.sleep(REST)
            candidate.run(x)  # wakes the threads of this engine
            seconds = measure(functools.partial(candidate.run, x), 'wall')
            if repetition >= 0:
                times[candidate].append(seconds)
    found: dict[str, Timing] = {}
    for candidate, seconds_each in times.items():
        timing = Timing(1e3 * statistics.median(seconds_each), candidate.engine)
        found[candidate.network] = min(timing, found.get(candidate.network, timing))
    return found


def _ways(name: str, model: nn.Module, x: Tensor, engines: Sequence[str]) -> list[_Candidate]:
    """The ways to run a network."""
    if isinstance(model, DeepMoE):
        sparse = deepmoe_plugin.sparsify(model.eval(), cache_mb=0)
        return [_Candidate(name, SPARSE, torch.preserve_format, sparse)]
    plain = folded(model)
    ways = []
    for engine in engines:
        if engine == TORCH:
            network, memory_format = best_format(plain, x)
            ways.append(_Candidate(name, engine, FORMATS[memory_format], network))
            continue
        try:
            run = ENGINES[engine](copy.deepcopy(plain), x)
            check_same(engine, functools.partial(run, x), plain(x))
        except (Missing, ValueError) as error:
            print(f'{name} without {engine}: {error}.')
        else:
            ways.append(_Candidate(name, engine, torch.contiguous_format, run))
    if not ways:
        raise ValueError(f'--time: none of {", ".join(engines)} runs {name} here: name torch as well.')
    return ways


def time_rows(
    rows: Sequence[dict[str, Any]],
    networks: Mapping[str, nn.Module],
    loader: Iterable[Sequence[Any]],
    engines: Sequence[str],
    device: str,
) -> dict[str, Any]:
    """Add the time of one image to rows of a table.

    Args:
        rows: one for each network, with its `name`; each gets `ms` and `engine`.
        networks: by their names.
        loader: batches that start with images, of which some of the first batches are taken.
        engines: see `time_of_an_image`.
        device: of the networks.

    Returns:
        What the times depend on.
    """
    images = torch.cat([batch[0] for _, batch in zip(range(TIMED_BATCHES), loader, strict=False)])
    chosen = images[:: max(1, len(images) // TIMED_IMAGES)][:TIMED_IMAGES]  # folders are in the order of their classes
    timings = time_of_an_image(networks, chosen.to(device).split(1), engines)
    for row in rows:
        row.update(timings[row['name']]._asdict())
    versions = {'torch': torch.__version__, 'python': platform.python_version()}
    threads = torch.get_num_threads()
    return {
        'processor': processor_name(device),
        'threads': threads,
        'batch': 1,
        'dtype': 'float32',
        'versions': versions,
    }
