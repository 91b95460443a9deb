"""The networks of the two sibling papers: timm's contract, training, and what runs them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_mixtures import ALL, CASES, SPECIALISED, batch_for, build, cases, missing_gradients, parameters, step
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.task import ClassificationTask
from torch import Tensor, nn

# Names and numbers


def test_registered_names_are_those_of_the_design() -> None:
    registered = timm.list_models(module='stacked_moe') + timm.list_models(module='specialised_moe')
    assert sorted(registered) == sorted(ALL)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'expected'),
    [
        ('dmoe_4x100_4x100', {}, 630_518),
        ('dmoe_4x100_4x20', {}, 597_398),
        ('dmoe_4x100_4x20', dict(gate_hidden=(50, 20)), 594_248),
        ('dmoe_4x50_4x20', {}, 290_818),
        ('dmoe_4x100', {}, 584_864),
        ('moe_mnist', dict(num_experts=1), 1_382),
        ('moe_mnist', {}, 32_973),
        ('moe_mnist', dict(gate='attentive'), 34_856),
    ],
)
def test_parameters_are_those_of_the_papers(name: str, kwargs: dict[str, Any], expected: int) -> None:
    assert parameters(name, **kwargs) == expected


# timm's model contract


@pytest.mark.parametrize('name', ALL)
def test_contract_on_shapes(name: str) -> None:
    model = timm.create_model(name, device='meta', dtype=torch.float64, num_classes=7, drop_rate=0.0)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {'meta'}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    model.eval()
    x = torch.empty(2, *model.default_cfg['input_size'], device='meta', dtype=torch.float64)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.num_features == model.head_hidden_size
    assert model(x).shape == (2, 7)
    model(x).sum().backward()
    assert not missing_gradients(model)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize('name', ALL)
def test_default_cfg_names_what_exists(name: str) -> None:
    model = timm.create_model(name, device='meta')
    cfg = model.default_cfg
    assert cfg['architecture'] == name
    assert model.num_classes == cfg['num_classes']
    assert (model.in_chans, *model.img_size) == cfg['input_size']
    assert all(isinstance(model.get_submodule(path), nn.Conv2d) for path in cfg['first_conv'])
    assert bool(cfg['first_conv']) == (name in SPECIALISED)
    names = [cfg['classifier']] if isinstance(cfg['classifier'], str) else cfg['classifier']
    heads = [model.get_classifier()] if isinstance(cfg['classifier'], str) else list(model.get_classifier())
    assert [model.get_submodule(path) for path in names] == heads
    assert {head.out_features for head in heads} == {model.num_classes}


@pytest.mark.parametrize('name', ALL)
def test_features_only_and_gradient_checkpointing_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match='features_only'):
        timm.create_model(name, features_only=True)
    model = timm.create_model(name, device='meta')
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match='checkpointing'):
        model.set_grad_checkpointing()
    with pytest.raises(ValueError, match='global_pool'):
        model.reset_classifier(3, 'avg')


@cases
def test_features_and_head_make_the_output(case: str) -> None:
    model = build(case).eval()
    x, _ = batch_for(model)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), before)


@cases
def test_weights_in_bfloat16_give_outputs_in_bfloat16(case: str) -> None:
    model = build(case).eval()
    x, _ = batch_for(model)
    expected = model(x)
    output = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    model.reset_classifier(0)
    assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16
    model.reset_classifier(3)
    assert not any(module.training for module in model.modules())


@cases
def test_images_do_not_influence_each_other(case: str) -> None:
    model = build(case).eval()
    x, _ = batch_for(model)
    torch.testing.assert_close(model(x[:1]), model(x)[:1])


@cases
def test_dropout_before_the_classifier(case: str) -> None:
    model = build(case, drop_rate=0.5)
    x, _ = batch_for(model)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


@cases
def test_wrong_images_are_named(case: str) -> None:
    model = build(case)
    x, _ = batch_for(model)
    with pytest.raises(ValueError, match='Expected images of shape'):
        model(x[..., :-1])
    with pytest.raises(ValueError, match='floating-point'):
        model(x.to(torch.uint8))


@cases
def test_layer_wise_learning_rates(case: str) -> None:
    model = build(case)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert {p for group in groups for p in group['params']} == set(model.parameters())
    assert len({group['lr_scale'] for group in groups}) >= 2


@pytest.mark.parametrize(
    ('name', 'kwargs', 'match'),
    [
        ('dmoe_4x100', dict(second_layer='sum'), 'second_layer'),
        ('dmoe_4x100', dict(hidden=(100, 100)), 'hidden'),
        ('dmoe_4x100', dict(experts=(0,)), 'experts'),
        ('dmoe_4x100', dict(experts=4), 'experts'),
        ('dmoe_4x100', dict(balance_margin=-1), 'balance_margin'),
        ('moe_mnist', dict(gate='sigmoid'), 'gate'),
        ('moe_mnist', dict(num_experts=0), 'num_experts'),
        ('moe_mnist', dict(num_experts=1, importance_loss_weight=0.2), 'num_experts=1'),
        ('moe_mnist', dict(distilled='all'), 'distilled'),
        ('moe_mnist', dict(distilled='output', gate='attentive'), 'distilled'),
        ('moe_mnist', dict(img_size=2), 'img_size'),
    ],
)
def test_bad_arguments_are_named(name: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        timm.create_model(name, **kwargs)


# Terms


@pytest.mark.parametrize('case', ['dnn', 'single'])
def test_networks_without_gates_have_no_terms(case: str) -> None:
    model = build(case)
    x, y = batch_for(model)
    assert ClassificationTask(model, nn.CrossEntropyLoss())(x, y).keys() == {'loss', 'output'}


# Training


@cases
def test_training_resumes_to_the_bit(case: str) -> None:
    model = build(case)
    optimizer = create_optimizer_v2(model, opt='momentum', lr=0.05)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = build(case)
    resumed.load_state_dict(saved[0])
    other = create_optimizer_v2(resumed, opt='momentum', lr=0.05)
    other.load_state_dict(saved[1])
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(resumed, other, seed)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@cases
def test_safetensors(case: str, tmp_path: Path) -> None:
    model = build(case)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    timm.models.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    name, args = CASES[case]
    overlay = dict(file=str(tmp_path / 'saved/model.safetensors'))
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@cases
def test_bfloat16_autocast(case: str) -> None:
    model = build(case)
    x, y = batch_for(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = ClassificationTask(model, nn.CrossEntropyLoss())(x, y)
    result['loss'].backward()
    assert not missing_gradients(model)
    torch.testing.assert_close(result['output'].float(), build(case)(x), rtol=0.1, atol=0.1)


@cases
def test_compiled_without_a_graph_break_in_eval_mode(case: str) -> None:
    torch._dynamo.reset()
    model = build(case).eval()
    x, _ = batch_for(model)
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize('case', ['stacked', 'attentive'])
def test_compiled_training_has_the_same_gradient(case: str) -> None:
    torch._dynamo.reset()
    plain, model = build(case), build(case)
    x, y = batch_for(model)
    expected = ClassificationTask(plain, nn.CrossEntropyLoss())(x, y)
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    task.compile(backend='eager')
    result = task(x, y)
    for value in (expected['loss'], result['loss']):
        value.backward()
    torch.testing.assert_close(result['loss'], expected['loss'])
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@torch.no_grad()
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('case', [case for case in CASES if case != 'stacked'])  # its constraint counts examples
def test_symbolic_trace(case: str, train: bool) -> None:
    model = build(case).train(train)
    x, _ = batch_for(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@torch.no_grad()
@cases
def test_export_with_dynamic_batch(case: str) -> None:
    model = build(case).eval()
    x, _ = batch_for(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for size in (1, 3):
        images, _ = batch_for(model, size)
        torch.testing.assert_close(program.module()(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize('case', ['stacked', 'attentive'])
def test_onnx_with_dynamic_batch(case: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = build(case).eval()
    x, _ = batch_for(model)
    path = tmp_path / 'model.onnx'
    shapes = ({0: torch.export.Dim('batch')},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, input_names=['images'])
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {'images': x[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x[:3]), rtol=1e-3, atol=1e-4)


def train_distributed(case: str, rank: int | None) -> dict[str, Tensor]:
    """Three steps on a batch, or under DDP on the part of it that belongs to a process."""
    model = build(case, balance_margin=1.0).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    if rank is not None:
        task.prepare_distributed()
    for seed in range(3):
        x, y = batch_for(model, 12, seed)
        part = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
        optimizer.zero_grad()
        task(x.double()[part], y[part])['loss'].backward()
        optimizer.step()
    return model.state_dict()


def worker(rank: int, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.save(train_distributed(case, rank), f'{folder}/rank{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """With the constraint: the examples of both are counted in the order of one batch."""
    torch.multiprocessing.spawn(worker, (str(tmp_path), 'stacked'), nprocs=2)
    expected = train_distributed('stacked', None)
    for rank in range(2):
        state = torch.load(tmp_path / f'rank{rank}.pt', weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert expected['layers.0.balance.units'].sum() > 0
