"""Versions, configs, and how sparse execution runs on this machine, with what keeps it from running faster.

deepmoe doctor
"""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence

import torch

from .. import __version__
from ..sparse import native, ragged, tiles
from .configs import configs_folder, shipped_configs

# Distributions by what they are needed for; of several names the installed one counts.
DISTRIBUTIONS = {
    'core': (('torch',), ('torchvision',), ('timm',), ('safetensors',), ('numpy',)),
    'fast': (('numba',),),
    'mmseg': (('onedl-mmengine', 'mmengine'), ('onedl-mmcv', 'mmcv'), ('onedl-mmsegmentation', 'mmsegmentation')),
    'plot': (('matplotlib',), ('scikit-learn',)),
    'export': (('onnx',), ('onnxruntime',), ('onnxscript',)),
    'GPU': (('triton',),),
}
DECISIVE = {torch.float32: 'avx2', torch.bfloat16: 'avx512bf16'}
FEATURES = ('sse4.2', 'avx', 'avx2', 'fma', 'avx512f', 'avx512bf16', 'avx512fp16', 'amx-tile', 'amx-bf16')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog='deepmoe doctor', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    for title, lines in (
        ('versions', versions()),
        ('configs', [f'{len(shipped_configs())} in {configs_folder()}']),
        ('processor', processor()),
        ('sparse execution', sparse_execution()),
    ):
        print('\n'.join([f'{title}:', *(f'  {line}' for line in lines)]))


def versions() -> Iterator[str]:
    """This package, Python and what is installed, by extra."""
    yield f'deepmoe-plugin {__version__}, Python {platform.python_version()}, {platform.platform()}'
    for extra, distributions in DISTRIBUTIONS.items():
        found = [_version(names) for names in distributions]
        lacking = any('not installed' in text for text in found)
        remedy = f": pip install 'deepmoe-plugin[{extra}]'" if lacking and extra not in ('core', 'GPU') else ''
        yield f'{extra}: {", ".join(found)}{remedy}'


def _version(names: Sequence[str]) -> str:
    for name in names:
        for distribution in importlib.metadata.distributions(name=name):
            return f'{name} {distribution.version}'
    return f'{names[0]} not installed'


def processor() -> Iterator[str]:
    """Kind, cores, threads and features of the processor, and the variables that bound them; then the GPUs."""
    yield f'{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch'
    known = native.features()
    yield 'features: ' + (' '.join(name for name in FEATURES if name in known) or 'unknown without numba')
    for name in ('OMP_NUM_THREADS', 'ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA'):
        if name in os.environ:
            yield f'{name}={os.environ[name]}'
    for index in range(torch.cuda.device_count()):
        yield f'GPU {index}: {torch.cuda.get_device_name(index)}'


def sparse_execution() -> Iterator[str]:
    """What runs the convolutions of `deepmoe_plugin.sparsify`, by device and type, and why nothing faster does."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix('torch.')
        if tiles.available(dtype):
            yield f'CPU, {name}: tiles, the fastest way'
        else:
            yield f"CPU, {name}: torch's convolutions on gathered weights; no tiles: {_why_no_tiles(dtype)}"
    if not torch.cuda.is_available():
        yield 'GPU: none that this torch can use'
        return
    images = torch.zeros(2, 1, 1, 1, device='cuda')
    if ragged.available(images):
        yield 'GPU: ragged kernels for batches of different images'
    else:
        yield "GPU: torch's convolutions on gathered weights, image by image; no ragged kernels: Triton does not work"


def _why_no_tiles(dtype: torch.dtype) -> str:
    if platform.machine() not in ('x86_64', 'AMD64'):
        return 'the processor is no x86-64'
    if not native.features():
        return "numba is not installed: pip install 'deepmoe-plugin[fast]'"
    if native.openmp() is None:
        return "torch does not run on GNU's OpenMP"
    if DECISIVE[dtype] not in native.features():
        return f'the processor lacks {DECISIVE[dtype]}'
    limits = [name for name in ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA') if name in os.environ]
    if limits and dtype != torch.float32:
        return f'{" and ".join(limits)} leave the instructions for it out'
    return f'torch {torch.__version__} does not offer the products that they are made of'
