"""Export of the masked network, for runtimes that cannot choose shapes by gates; what cannot be exported says so."""

from pathlib import Path

import pytest
import torch
from small_networks import SMALL, images, randomise, small
from torch import nn

import deepmoe_plugin


def masked(structure: str) -> nn.Module:
    model = randomise(small(structure)).eval()
    with torch.no_grad():
        model.gating.gates.weight.sub_(0.3)
        kept = torch.cat(model.gating(images(3)), 1) > 0
    assert 0.2 < kept.float().mean() < 0.9
    return model


@torch.no_grad()
@pytest.mark.parametrize('structure', SMALL)
def test_torch_export_with_dynamic_batch(structure: str) -> None:
    model = masked(structure)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for batch in (1, 3):
        x = images(batch, seed=batch)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('structure', ['bottleneck_a', 'cifar', 'vgg'])
def test_onnx_with_dynamic_batch(structure: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = masked(structure)
    path = tmp_path / 'model.onnx'
    shapes = ({0: torch.export.Dim('batch')},)
    torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes=shapes, input_names=['images'])
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (1, 3):
        x = images(batch, seed=batch)
        (logits,) = session.run(None, {'images': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-4)


def test_sparse_network_refuses_export() -> None:
    sparse = deepmoe_plugin.sparsify(masked('cifar'))
    with pytest.raises(Exception, match='Export the network itself'):
        torch.export.export(sparse, (images(2),), strict=False)


@torch.no_grad()
def test_compiler_leaves_the_sparse_network_as_it_is() -> None:
    model = masked('cifar')
    sparse = deepmoe_plugin.sparsify(model)
    compiled = torch.compile(nn.Sequential(nn.Identity(), sparse), backend='eager')
    torch.testing.assert_close(compiled(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)
