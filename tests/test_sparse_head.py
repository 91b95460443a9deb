"""The classifier behind the features runs natively where it is a mean and linear layers, and as written elsewhere."""

from typing import Any

import pytest
import timm
import torch
from registered_networks import GATED
from small_networks import SMALL, images, randomise, small
from test_sparse import relative_error
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.sparse import build
from deepmoe_plugin.sparse.head import with_head
from deepmoe_plugin.sparse.trace import trace

pytestmark = pytest.mark.usefixtures('always_sparse')

NATIVE = [name for name in SMALL if name != 'vgg']  # whose head has convolutions, and looks at the size of its input

needs_native = pytest.mark.skipif(build.library() is None, reason='needs a C++ compiler and the OpenMP library of GNU')


def network(structure: str, **kwargs: Any) -> Any:
    return randomise(small(structure, **kwargs)).eval()


def head_in(sparse: Any) -> list[str]:
    """The operations of the head that run natively."""
    return [type(op).__name__ for op in sparse.executor.head]


@pytest.mark.parametrize('name', GATED)
def test_heads_of_registered_networks_are_found(name: str) -> None:
    view = trace(timm.create_model(name, device='meta').eval())
    kinds = [type(op).__name__ for op in with_head(view).head]
    pooled = ['Average', 'Depthwise'] if 'convnext' in name else ['Widen', 'Average'] if 'vgg' in name else ['Average']
    assert kinds == ([] if name.endswith('_bn') else [*pooled, 'Convolve'])


@torch.no_grad()
@needs_native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('structure', NATIVE)
def test_head_runs_natively(structure: str, dtype: torch.dtype) -> None:
    model = network(structure).to(dtype)
    sparse: Any = deepmoe_plugin.sparsify(model)
    x = images(3, 40).to(dtype)
    expected = model(x)
    sparse.view().forward_head = None
    assert relative_error(sparse(x), expected) < (1e-5 if dtype == torch.float32 else 0.03)


VARIANTS: dict[str, Any] = {
    'no classifier': ({'num_classes': 0}, True),
    'dropout': ({'drop_rate': 0.5}, True),
    'fast mean': ({'global_pool': 'fastavg'}, True),
    'largest': ({'global_pool': 'max'}, False),
    'both': ({'global_pool': 'avgmax'}, False),
    'side by side': ({'global_pool': 'catavgmax'}, False),
    'neither pooling nor classifier': ({'num_classes': 0, 'global_pool': ''}, False),
}


@torch.no_grad()
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('structure', ['basic', 'cifar', 'vgg_cifar', 'convnext', 'convnextv2'])
def test_variants_of_heads(structure: str, variant: str) -> None:
    kwargs, is_native = VARIANTS[variant]
    try:
        model = network(structure, **kwargs)
    except AssertionError:
        pytest.skip('timm does not build it')
    sparse: Any = deepmoe_plugin.sparsify(model)
    for batch in (1, 3):
        x = images(batch, 40)
        assert sparse(x).shape == model(x).shape
        assert relative_error(sparse(x), model(x)) < 1e-5
    assert bool(head_in(sparse)) == is_native
    assert relative_error(sparse.forward_head(sparse.forward_features(x)), model(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('arguments', [{'head_norm_first': True}, {'head_hidden_size': 12}], ids=str)
def test_other_heads_of_convnext(arguments: dict[str, Any]) -> None:
    model = network('convnext', **arguments)
    x = images(2, 40)
    assert relative_error(deepmoe_plugin.sparsify(model)(x), model(x)) < 1e-5


class Counting(nn.Module):
    """A mean that knows how often it was asked for."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mean((2, 3))


@torch.no_grad()
def test_modules_of_others_are_called() -> None:
    model = network('basic')
    model.global_pool = Counting()
    sparse = deepmoe_plugin.sparsify(model)
    for calls in (1, 2):
        sparse(images())
        assert model.global_pool.calls == 0  # the view counts its own
        assert sparse.view().global_pool.calls == calls


def _hook_on_classifier(model: Any) -> None:
    model.get_classifier().register_forward_hook(lambda module, inputs, output: output + 1)


def _hook_on_pooling(model: Any) -> None:
    pool = model.global_pool if hasattr(model, 'global_pool') else model.head
    pool.register_forward_hook(lambda module, inputs, output: 2 * output)


def _largest_instead_of_mean(model: Any) -> None:
    model.reset_classifier(10, 'max')


def _head_of_its_own(model: Any) -> None:
    model.forward_head = lambda x, pre_logits=False: x.mean((2, 3))


def _more_between(model: Any) -> None:
    if hasattr(model, 'head'):
        model.head.drop = nn.Tanh()
    else:
        model.global_pool.flatten = nn.Sequential(nn.Flatten(1), nn.Tanh())


EDITS = [_hook_on_classifier, _hook_on_pooling, _largest_instead_of_mean, _head_of_its_own, _more_between]


@torch.no_grad()
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('edit', EDITS)
@pytest.mark.parametrize('structure', ['bottleneck_a', 'vgg_cifar', 'convnext'])
def test_edited_head_runs_as_written(structure: str, edit: Any, when: str) -> None:
    model, x = network(structure), images(2, 40)
    before = model(x)
    if when == 'before':
        edit(model)
    sparse: Any = deepmoe_plugin.sparsify(model)
    if when == 'after':
        sparse(x)
        edit(model)
        sparse.refresh()
    assert relative_error(sparse(x), model(x)) < 1e-5
    assert before.shape != model(x).shape or relative_error(before, model(x)) > 1e-3


@torch.no_grad()
def test_forward_of_its_own_runs_as_written() -> None:
    class Louder(type(network('basic'))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = network('basic')
    model.__class__ = Louder
    sparse = deepmoe_plugin.sparsify(model)
    assert relative_error(sparse(images()), model(images())) < 1e-5
