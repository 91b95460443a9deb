"""Every structure in other types and memory formats, copied, traced, transformed, compiled and exported."""

import copy
import io
import pickle

import pytest
import timm
import torch
from registered_networks import gradients, missing_gradients, structures
from small_networks import SMALL, images, randomise, small
from torch import nn


@structures
def test_fx(structure):
    from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

    model = randomise(small(structure)).eval()
    leaves = dict(leaf_modules=list(timm.models.get_notrace_modules()))
    leaves['autowrap_functions'] = list(timm.models.get_notrace_functions())
    _, eval_nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    traced = create_feature_extractor(model, return_nodes={eval_nodes[-1]: 'out'}, tracer_kwargs=leaves)
    torch.testing.assert_close(traced(images())['out'], model(images()), rtol=0, atol=0)
    assert NodePathTracer(**leaves) is not None


@pytest.mark.parametrize('structure', [name for name in SMALL if name != 'vgg'])  # its dense twin cannot be traced
@pytest.mark.parametrize('train', [False, True])
def test_symbolic_trace(structure, train):
    model = randomise(small(structure)).train(train)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images()), twin(images()), rtol=0, atol=0)


@structures
def test_jit_trace(structure):
    model = randomise(small(structure, embed_loss_weight=1)).eval()
    traced = torch.jit.trace(model, images())
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    x = images(3, seed=1)
    torch.testing.assert_close(torch.jit.load(stored)(x), model(x), rtol=1e-5, atol=1e-5)


def test_quantization_observers_are_inserted():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    model = randomise(small('cifar')).eval()
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (images(),))
    torch.testing.assert_close(prepared(images()), model(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('structure', ['cifar', 'vgg_cifar', 'convnextv2'])
def test_gradients_of_each_image_by_function_transforms(structure):
    # In double precision: one rounding more or less and a ReLU near zero has another gradient.
    model, target = randomise(small(structure)).double().eval(), torch.tensor([1, 2])
    x = images(dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x, y):
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(logits, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    nn.functional.cross_entropy(model(x), target, reduction='sum').backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, msg=name)


def test_forward_mode_derivative():
    model = randomise(small('cifar')).double().eval()
    x, direction = images(dtype=torch.float64), images(seed=1, dtype=torch.float64)
    expected = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(model, (x,), (direction,))[1], expected, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        output = model(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def test_several_gradients_at_once():
    model, x = randomise(small('cifar')).eval(), images().requires_grad_()
    output = model(x)[0, :3]
    together = torch.autograd.grad(output, x, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    for i in range(3):
        torch.testing.assert_close(together[i], torch.autograd.grad(output[i], x, retain_graph=True)[0])


@structures
def test_calling_the_parts_one_by_one_names_what_works(structure):
    parts = nn.Sequential(*list(small(structure).children())[:-2])
    with pytest.raises(ValueError, match='features_only=True'):
        parts(images())
    listed = small(
        structure,
        features_only=True,
        feature_cls='list',
        out_indices=(0, 1),
    )
    with pytest.raises(ValueError, match='features_only=True'):
        listed(images())


@pytest.mark.parametrize('structure', ['bottleneck_a', 'cifar', 'vgg', 'convnextv2'])
def test_compile_forward_and_training_step(structure):
    from deepmoe_plugin import DeepMoELoss

    torch.manual_seed(0)
    model = randomise(small(structure, embed_loss_weight=1)).double()
    reference = copy.deepcopy(model)
    x, target = images(dtype=torch.float64), torch.tensor([1, 2])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    losses = [DeepMoELoss(each, nn.CrossEntropyLoss()) for each in (compiled, reference)]
    values = []
    for each, loss in zip((compiled, reference), losses, strict=True):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss(each(x), target)
            value.backward()
            optimizer.step()
        values.append(value.detach())
    assert 'loss_embed' in losses[0].terms
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients(model), gradients(reference))
    torch.testing.assert_close(compiled.eval()(x), reference.eval()(x))


@pytest.mark.slow
def test_compile_with_inductor():
    torch.compiler.reset()
    model = randomise(small('cifar', layers=(1, 1, 1)))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    compiled(images()).square().sum().backward()
    reference(images()).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-3, atol=1e-3)


@structures
def test_export(structure):
    model = randomise(small(structure)).eval()
    batch = torch.export.Dim('batch', min=2, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes={'x': {0: batch}})
    torch.testing.assert_close(program.module()(images(5)), model(images(5)), rtol=1e-5, atol=1e-5)


@structures
def test_channels_last(structure):
    model = randomise(small(structure)).eval()
    expected = model(images())
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images().to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)


@structures
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_dtype_on_creation(structure, dtype):
    model = small(structure, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = model(images(dtype=dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


@structures
def test_autocast_computes_gates_in_float32(structure):
    model = randomise(small(structure))
    with torch.autocast('cpu', torch.float16):
        output = model(images())
        gates = model.gating(images())
    assert {gate.dtype for gate in gates} == {torch.float32}
    output.float().sum().backward()
    assert not missing_gradients(model)


@structures
def test_deepcopy_and_pickle(structure):
    model = randomise(small(structure, embed_loss_weight=1, target_kept=0.5))
    output = model(images())  # leaves a record with a graph, which belongs to this model only
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.passes.take()
        torch.testing.assert_close(twin.eval()(images()), model.eval()(images()), rtol=0, atol=0)
        model.train()
    assert len(model.passes.take(output)) == 1
