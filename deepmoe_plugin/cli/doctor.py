"""Versions, configs, and how sparse execution runs on this machine, with what keeps it from running faster.

deepmoe doctor
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence

import torch

from .. import __version__
from ..sparse import build, ragged
from .configs import configs_folder, shipped_configs
from .parsing import create_parser

# Distributions by what they are needed for; of several names the installed one counts.
DISTRIBUTIONS = {
    'core': (('torch',), ('torchvision',), ('timm',), ('safetensors',), ('numpy',)),
    'mmseg': (('onedl-mmengine', 'mmengine'), ('onedl-mmcv', 'mmcv'), ('onedl-mmsegmentation', 'mmsegmentation')),
    'plot': (('matplotlib',), ('scikit-learn',)),
    'export': (('onnx',), ('onnxruntime',), ('onnxscript',)),
    'GPU': (('triton',),),
}
FEATURES = ('sse4_2', 'avx', 'avx2', 'fma', 'avx512f', 'avx512_bf16', 'amx_tile', 'amx_bf16', 'asimd', 'bf16')


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser('doctor', __doc__)
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
    known = build.features()
    yield 'features: ' + (' '.join(name for name in FEATURES if name in known) or 'unknown')
    for name in ('OMP_NUM_THREADS', 'ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA'):
        if name in os.environ:
            yield f'{name}={os.environ[name]}'
    for index in range(torch.cuda.device_count()):
        yield f'GPU {index}: {torch.cuda.get_device_name(index)}'


def sparse_execution() -> Iterator[str]:
    """What runs the convolutions of `deepmoe_plugin.sparsify`, by device and type, and why nothing faster does."""
    reason = build.missing()
    if reason:
        yield f"CPU: torch's convolutions on gathered weights; no native program: {reason}"
    else:
        yield f'CPU, float32 and bfloat16: native program, built by {build.compiler()} in {build.cache_folder()}'
        if 'avx512f' not in build.features():
            yield 'CPU: without AVX-512 the native program runs right, how fast has not been measured'
        yield "CPU, other types: torch's convolutions on gathered weights"
    if not torch.cuda.is_available():
        yield 'GPU: none that this torch can use'
        return
    images = torch.zeros(2, 1, 1, 1, device='cuda')
    if ragged.available(images):
        yield 'GPU: ragged kernels for batches of different images'
    else:
        yield "GPU: torch's convolutions on gathered weights, image by image; no ragged kernels: Triton does not work"
