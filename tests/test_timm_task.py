"""The loss hook on timm's training tasks: what train.py does at every step, in process, against a hand-written J.

The file is long since every task, wrapper and copy is compared with the same J, written by hand once.
"""

import copy
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_networks import images, randomise, small
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TrainingTask,
)
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin import timm_hook

LAMBDA, MU = 0.7, 0.3
NAMES = ('loss_gate', 'loss_embed', 'kept_experts', 'dynamic_experts', 'gate_entropy', 'use_entropy')
Grads = dict[str, Tensor]


def network(structure: str = 'cifar', **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    weights = {'gate_loss_weight': LAMBDA, 'embed_loss_weight': MU}
    return randomise(small(structure, **{**weights, **kwargs})).train()


def labels(batch: int = 4) -> Tensor:
    return torch.arange(batch) % 10


def soft_labels(batch: int = 4) -> Tensor:
    return torch.rand(batch, 10, generator=torch.Generator().manual_seed(5)).softmax(1)


def embedding_logits(model: nn.Module, mixture: Tensor) -> Tensor:
    return model.gating.class_scores(mixture * mixture.shape[1])


def hand_written(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the network and of the embedding classifier, and the mean gate, in plain torch."""
    gating = model.gating
    mixture = gating.embedding(x)
    gates = (mixture @ gating.gates.weight.t()).clamp(min=0)
    layers = list(gates.split(gating.gates.widths, dim=1))
    gating.forward = lambda _: layers
    logits = model(x)
    del gating.forward
    return logits, embedding_logits(model, mixture), gates.mean()


def hand_written_j(
    model: nn.Module, x: Tensor, y: Tensor, criterion: Callable[..., Tensor], base: Any = None
) -> Tensor:
    logits, embed_logits, mean_gate = hand_written(model, x)
    loss = (base or (lambda out: criterion(out, y)))(logits) + LAMBDA * mean_gate
    return loss + MU * criterion(embed_logits, y)


def gradients(module: nn.Module) -> Grads:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def gradients_of(loss: Tensor, module: nn.Module) -> Grads:
    module.zero_grad()
    loss.backward()
    return gradients(module)


def assert_same(grads: Grads, expected: Grads, tolerance: float = 1e-5) -> None:
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=tolerance * max(scale, 1e-3), msg=name)


CRITERIA: dict[str, tuple[type[TrainingTask], nn.Module, Tensor]] = {
    'cross-entropy': (ClassificationTask, nn.CrossEntropyLoss(), labels()),
    'smoothing': (ClassificationTask, LabelSmoothingCrossEntropy(0.1), labels()),
    'soft targets': (ClassificationTask, SoftTargetCrossEntropy(), soft_labels()),
    'bce': (ClassificationTask, BinaryCrossEntropy(smoothing=0.1), labels()),
    'multi-label': (MultiLabelClassificationTask, BinaryCrossEntropy(smoothing=0.0), (soft_labels() > 0.1).float()),
    'jsd': (ClassificationTask, JsdCrossEntropy(num_splits=2), labels()),
}


OTHER_STRUCTURES = [('cross-entropy', 'vgg_cifar'), ('soft targets', 'bottleneck_a')]


@pytest.mark.parametrize(('name', 'structure'), [*((name, 'cifar') for name in CRITERIA), *OTHER_STRUCTURES])
def test_classification_optimises_j(name: str, structure: str) -> None:
    task_type, criterion, y = CRITERIA[name]
    model, x = network(structure), images(4)
    expected = gradients_of(hand_written_j(model, x, y, criterion), model)
    task = task_type(model, criterion)
    result = task(x, y)
    torch.testing.assert_close(result['loss'], hand_written_j(model, x, y, criterion))
    assert_same(gradients_of(result['loss'], model), expected)


def test_terms_are_in_the_result() -> None:
    model, x, y = network(), images(4), labels()
    result = ClassificationTask(model, nn.CrossEntropyLoss())(x, target=y)
    _, embed_logits, mean_gate = hand_written(model, x)
    torch.testing.assert_close(result['loss_gate'], LAMBDA * mean_gate)
    torch.testing.assert_close(result['loss_embed'], MU * F.cross_entropy(embed_logits, y))
    gates = torch.cat(model.gating(x), 1)
    assert 0 < gates.count_nonzero() < gates.numel()
    assert result['kept_experts'].item() == pytest.approx(gates.count_nonzero().item() / gates.numel())


@pytest.mark.parametrize('teacher', ['dense', 'deepmoe'])
def test_logit_distillation_optimises_j(teacher: str) -> None:
    model, x, y = network(), images(4), labels()
    teacher_model = randomise(small('cifar', gated=False) if teacher == 'dense' else network(), seed=9).eval()
    criterion = nn.CrossEntropyLoss()
    task = LogitDistillationTask(
        model, teacher_model, criterion, distill_loss_weight=0.4, task_loss_weight=0.9, temperature=2.0
    )
    with torch.no_grad():
        soft = (teacher_model(x) / 2).log_softmax(1)

    def base(logits: Tensor) -> Tensor:
        kd = F.kl_div((logits / 2).log_softmax(1), soft, reduction='batchmean', log_target=True) * 4
        return 0.9 * criterion(logits, y) + 0.4 * kd

    expected = gradients_of(hand_written_j(model, x, y, criterion, base), model)
    task.train()
    assert_same(gradients_of(task(x, y)['loss'], model), expected)
    assert all(parameter.grad is None for parameter in teacher_model.parameters())


@pytest.mark.parametrize('teacher', ['dense', 'deepmoe'])
def test_feature_distillation_optimises_j(teacher: str) -> None:
    model, x, y = network(), images(4), labels()
    wide = small('vgg_cifar', gated=False, layout=(8, 'M', 20, 'M'), widen=1)
    teacher_model = (wide if teacher == 'dense' else randomise(network(), seed=9)).eval()
    criterion = nn.CrossEntropyLoss()
    task = FeatureDistillationTask(model, teacher_model, criterion, distill_loss_weight=0.4, task_loss_weight=0.9)
    projection = task.trainable_module.projection
    assert (projection is None) == (teacher == 'deepmoe')

    mixture = model.gating.embedding(x)
    gates = (mixture @ model.gating.gates.weight.t()).clamp(min=0)
    features = model.forward_features(x)
    student = model.forward_head(features, pre_logits=True)
    with torch.no_grad():
        target = teacher_model.forward_head(teacher_model.forward_features(x), pre_logits=True)
    kd = F.mse_loss(student if projection is None else projection(student), target)
    base = 0.9 * criterion(model.forward_head(features), y) + 0.4 * kd
    embed = criterion(embedding_logits(model, mixture), y)
    expected = gradients_of(base + LAMBDA * gates.mean() + MU * embed, task.trainable_module)

    task.train()
    assert_same(gradients_of(task(x, y)['loss'], task.trainable_module), expected)


def test_two_forwards_before_a_backward() -> None:
    model = network()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    first, second = images(4, seed=1), images(4, seed=2)
    losses = [hand_written_j(model, x, labels(), nn.CrossEntropyLoss()) for x in (first, second)]
    expected = gradients_of(losses[0] + 3 * losses[1], model)
    results = [task(x, labels()) for x in (first, second)]
    assert_same(gradients_of(results[0]['loss'] + 3 * results[1]['loss'], model), expected)


def test_an_evaluation_between_forward_and_backward() -> None:
    model, x, y = network(), images(4), labels()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    expected = gradients_of(hand_written_j(model, x, y, nn.CrossEntropyLoss()), model)
    loss = task(x, y)['loss']
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    task.eval()
    with torch.inference_mode():
        assert task(images(4, seed=8), y).keys() == {'loss', 'output'}
    task.train()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert_same(gradients_of(loss, model), expected)


def test_gradient_accumulation() -> None:
    model = network()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    batches = [(images(4, seed=i), labels()) for i in range(3)]
    losses = [hand_written_j(model, x, y, nn.CrossEntropyLoss()) for x, y in batches]
    expected = gradients_of(sum(losses) / 3, model)
    model.zero_grad()
    for x, y in batches:
        loss = task(x, y)['loss']
        loss /= 3
        loss.backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize('structure', ['cifar', 'bottleneck_b'])
def test_grad_checkpointing(structure: str) -> None:
    model, x, y = network(structure), images(4), labels()
    expected = gradients_of(hand_written_j(model, x, y, nn.CrossEntropyLoss()), model)
    model.set_grad_checkpointing(True)
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    assert_same(gradients_of(task(x, y)['loss'], model), expected)


def test_ema_copies_follow_the_model() -> None:
    model, x, y = network(), images(4), labels()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    task(x, y)
    loss = task(x, y)['loss']
    model(x)
    task.setup_ema(decay=0.5)
    before = model.gating.gates.weight.detach().clone()
    gradients_of(loss, model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    task.update_ema()
    averaged = task.get_trainable_module(ema=True).module
    torch.testing.assert_close(averaged.gating.gates.weight, (before + model.gating.gates.weight) / 2)
    assert not torch.equal(before, model.gating.gates.weight)
    with torch.inference_mode():
        assert task.get_eval_model(ema=True)(x).shape == (4, 10)
    assert task(x, y)['loss'].requires_grad


@pytest.mark.parametrize('backend', ['eager', 'aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    model, x, y = network(), images(4), labels()
    expected = gradients_of(hand_written_j(model, x, y, nn.CrossEntropyLoss()), model)
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    task.compile(backend=backend)
    assert_same(gradients_of(task(x, y)['loss'], model), expected, tolerance=1e-4)
    other = images(4, seed=3)
    expected = gradients_of(hand_written_j(model, other, y, nn.CrossEntropyLoss()), model)
    result = task(other, y)
    assert_same(gradients_of(result['loss'], model), expected, tolerance=1e-4)
    assert {'loss_gate', 'loss_embed', 'kept_experts'} <= result.keys()


@pytest.mark.parametrize('task_type', [LogitDistillationTask, FeatureDistillationTask])
def test_compiled_distillation_equals_eager(task_type: Any) -> None:
    torch._dynamo.reset()
    model, x, y = network(), images(4), labels()
    task = task_type(model, randomise(small('cifar', gated=False), seed=9), nn.CrossEntropyLoss()).train()
    expected = gradients_of(task(x, y)['loss'], model)
    task.compile(backend='aot_eager')
    assert_same(gradients_of(task(x, y)['loss'], model), expected, tolerance=1e-4)


def test_copies_mid_training_are_independent() -> None:
    model, x, y = network(), images(4), labels()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    expected = gradients_of(hand_written_j(model, x, y, nn.CrossEntropyLoss()), model)
    loss = task(x, y)['loss']
    model(x)
    model_copy, task_copy = copy.deepcopy(model), copy.deepcopy(task)
    assert_same(gradients_of(loss, model), expected)
    assert_same(gradients_of(task_copy(x, y)['loss'], task_copy.trainable_module), expected)
    assert_same(gradients_of(ClassificationTask(model_copy, nn.CrossEntropyLoss())(x, y)['loss'], model_copy), expected)


def test_a_task_that_gets_another_network_trains_that_one() -> None:
    model, other, x, y = network(), randomise(network(), seed=4), images(4), labels()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    expected = gradients_of(hand_written_j(other, x, y, nn.CrossEntropyLoss()), other)
    task.trainable_module = other
    assert_same(gradients_of(task(x, y)['loss'], other), expected)
    other(x)
    task.trainable_module = small('cifar', gated=False)
    assert task(x, y).keys() == {'loss', 'output'}


def test_gates_stay_in_float32_under_autocast() -> None:
    model, x, y = network(), images(4), labels()
    seen: list[Tensor] = []
    model.gating.register_forward_hook(lambda _module, _args, gates: seen.extend(gates))
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    with torch.autocast('cpu', torch.bfloat16):
        result = task(x, y)
    assert result['output'].dtype == torch.bfloat16
    assert {gate.dtype for gate in seen} == {torch.float32}
    assert result['loss'].dtype == result['loss_gate'].dtype == torch.float32
    result['loss'].backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_loss_scaling_scales_every_gradient() -> None:
    model, x, y = network(), images(4), labels()
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    plain = gradients_of(task(x, y)['loss'], model)
    scaled = gradients_of(task(x, y)['loss'] * 2.0**12, model)
    assert all(torch.equal(grad / 2.0**12, plain[name]) for name, grad in scaled.items())


def test_frozen_gating_leaves_the_plain_loss() -> None:
    model, x, y = small('cifar', freeze_gating=True).train(), images(4), labels()
    result = ClassificationTask(model, nn.CrossEntropyLoss())(x, y)
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], y))
    assert result['kept_experts'] == 1
    assert not {'loss_gate', 'loss_embed'} & result.keys()
    result['loss'].backward()
    assert all(parameter.grad is None for parameter in model.gating.parameters())


def test_other_models_are_untouched() -> None:
    dense, x, y = small('cifar', gated=False).train(), images(4), labels()
    task = ClassificationTask(dense, nn.CrossEntropyLoss())
    assert not task._forward_hooks
    assert not dense._forward_hooks
    result = task(x, y)
    assert result.keys() == {'loss', 'output'}
    assert torch.equal(result['loss'], F.cross_entropy(result['output'], y))
    distilled = LogitDistillationTask(dense, network(), nn.CrossEntropyLoss()).train()
    assert not distilled._forward_hooks
    assert distilled(x, y).keys() == {'loss', 'output', 'task_loss', 'kd_loss'}


def test_scripting_is_refused_with_what_works_instead() -> None:
    for module in (network(), nn.Sequential(network()), small('cifar', features_only=True)):
        with pytest.raises(RuntimeError, match=r'torch\.jit\.trace.*torch\.export.*--torchcompile'):
            torch.jit.script(module)
    ClassificationTask(torch.jit.script(small('cifar', gated=False)), nn.CrossEntropyLoss())


def test_terms_are_appended_to_the_progress_lines(caplog: pytest.LogCaptureFixture) -> None:
    task = ClassificationTask(network(), nn.CrossEntropyLoss())
    logger = logging.getLogger('train')
    timm_hook._train_log.filter(logging.makeLogRecord({'msg': 'Train: what earlier tests have left'}))
    with caplog.at_level(logging.INFO, logger='train'):
        logger.info('Train: 0 [   0/10]  Loss: 2.3')
        results = [task(images(4, seed=i), labels()) for i in range(2)]
        logger.info('Test: [   0/10]  Loss: 2.3')
        logger.info('Training in distributed mode with %d processes', 2)
        logger.info('Train: 0 [   1/10]  Loss: 2.3')
        logger.info('Train: 0 [   2/10]  Loss: 2.3')
        logging.getLogger('train.other').info('Train: 0 [   3/10]  Loss: 2.3')
    mean = {
        name: (results[0][name] + results[1][name]).item() / 2 for name in results[0] if name not in ('loss', 'output')
    }
    assert mean.keys() == {'loss_gate', 'loss_embed', 'kept_experts', 'dynamic_experts', 'gate_entropy', 'use_entropy'}
    assert [record.getMessage() for record in caplog.records] == [
        'Train: 0 [   0/10]  Loss: 2.3',
        'Test: [   0/10]  Loss: 2.3',
        'Training in distributed mode with 2 processes',
        'Train: 0 [   1/10]  Loss: 2.3' + ''.join(f'  {name}: {value:#.3g}' for name, value in mean.items()),
        'Train: 0 [   2/10]  Loss: 2.3',
        'Train: 0 [   3/10]  Loss: 2.3',
    ]


def test_terms_join_the_row_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm commits a row for each epoch: until then, later values of a name replace earlier ones."""
    rows: list[dict[str, float]] = [{}]

    def log(row: dict[str, float], commit: bool = True) -> None:
        rows[-1].update(row)
        if commit:
            rows.append({})

    task = ClassificationTask(network(), nn.CrossEntropyLoss())
    logger = logging.getLogger('train')
    monkeypatch.setattr(logger, 'level', logging.INFO)
    timm_hook._train_log.filter(logging.makeLogRecord({'msg': 'Train: what earlier tests have left'}))
    wandb = types.SimpleNamespace(run=None, log=log)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    task(images(4), labels())
    logger.info('Train: 0 [   0/10]  Loss: 2.3')
    assert rows == [{}]
    wandb.run = 'a run'
    for epoch in range(2):
        results = []
        for step in range(3):
            results.append(task(images(4, seed=3 * epoch + step), labels()))
            if step != 1:
                logger.info(f'Train: {epoch} [   {step}/10]  Loss: 2.3')
        wandb.log({'epoch': epoch})
        means = {f'train_{name}': sum(result[name].item() for result in results) / 3 for name in NAMES}
        assert rows[epoch] == pytest.approx({'epoch': epoch, **means})


@pytest.mark.parametrize('wrapped', [False, True], ids=['plain', 'compiled'])
def test_one_line_for_a_hand_written_loop(wrapped: bool) -> None:
    torch._dynamo.reset()
    model, x, y = network(), images(4), labels()
    expected = gradients_of(hand_written_j(model, x, y, nn.CrossEntropyLoss()), model)
    called = torch.compile(model, backend='eager') if wrapped else model
    criterion = deepmoe_plugin.DeepMoELoss(called, nn.CrossEntropyLoss())
    assert not list(criterion.parameters())
    assert_same(gradients_of(criterion(called(x), y), model), expected)
    assert criterion.terms.keys() == {
        'loss_gate',
        'loss_embed',
        'kept_experts',
        'dynamic_experts',
        'gate_entropy',
        'use_entropy',
    }
    first, second = called(x), called(images(4, seed=2))
    criterion(second, y)
    assert_same(gradients_of(criterion(first, y), model), expected)


def test_one_liner_survives_a_copy_of_the_model() -> None:
    model, x, y = network(), images(4), labels()
    criterion = deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    expected = gradients_of(hand_written_j(model, x, y, nn.CrossEntropyLoss()), model)
    output = model(x)
    averaged = copy.deepcopy(model)
    averaged(x).sum().backward()
    assert_same(gradients_of(criterion(output, y), model), expected)


def test_one_liner_returns_the_plain_loss_in_eval_mode() -> None:
    model, x, y = network().eval(), images(4), labels()
    criterion = deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    with torch.no_grad():
        output = model(x)
        assert torch.equal(criterion(output, y), F.cross_entropy(output, y))


def test_one_liner_refuses_what_it_cannot_pair() -> None:
    model, x, y = network(), images(4), labels()
    criterion = deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='No training forward pass of this DeepMoEResNet led to the loss'):
        criterion(network()(x), y)
    with pytest.raises(ValueError, match='Expected a DeepMoE network in ResNet, found none'):
        deepmoe_plugin.DeepMoELoss(timm.create_model('resnet18'), nn.CrossEntropyLoss())
