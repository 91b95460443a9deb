"""Dense networks on the engines that a user would deploy them with, to time sparse execution against."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Any]


class Missing(Exception):
    """An engine that cannot run here; the message says why."""


def onnxruntime(model: nn.Module, x: Tensor) -> Run:
    """ONNX Runtime on the CPU, all graph optimisations on, as many threads as torch has; float32 only."""
    try:
        import onnxruntime as engine
    except ImportError as error:
        raise Missing('onnxruntime is not installed') from error
    if x.dtype != torch.float32 or x.device.type != 'cpu':
        raise Missing('only float32 on a CPU')
    options = engine.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = engine.InferenceSession(_onnx(model, x), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


def openvino(model: nn.Module, x: Tensor) -> Run:
    """OpenVINO on the CPU, set for latency; computes in bfloat16 where the images are."""
    try:
        import openvino as engine
    except ImportError as error:
        raise Missing('openvino is not installed') from error
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != 'cpu':
        raise Missing('only float32 and bfloat16 on a CPU')
    precision = engine.Type.bf16 if x.dtype == torch.bfloat16 else engine.Type.f32
    config = {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'INFERENCE_PRECISION_HINT': precision,
    }
    graph = engine.convert_model(model.float(), example_input=x.float(), input=[list(x.shape)])
    compiled = engine.compile_model(graph, 'CPU', config)
    return lambda images: compiled(images.float().numpy())[0]


def inductor(model: nn.Module, x: Tensor) -> Run:
    """torch.compile with weights frozen into the graph."""
    from torch._inductor import config

    with config.patch(freezing=True):
        compiled: Any = torch.compile(model)
        try:
            compiled(x)
        except Exception as error:  # no compiler for its code, for one thing
            raise Missing(f'torch.compile fails: {str(error).splitlines()[0]}') from error
    return lambda images: compiled(images)


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(model, (x,), dynamo=True, optimize=True)
    except ImportError as error:
        raise Missing(f'the export to ONNX needs another package: {error}') from error
    assert program is not None
    return program.model_proto.SerializeToString()


ENGINES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    'onnxruntime': onnxruntime,
    'openvino': openvino,
    'inductor': inductor,
}
