"""Two DDP processes on the halves of a batch train as one process does on the whole batch (norm statistics frozen)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import images, randomise, small
from timm.task import ClassificationTask, FeatureDistillationTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepmoe_plugin import DeepMoELoss

CASES: dict[str, dict[str, Any]] = {
    'fixed lambda': {'gate_loss_weight': 0.7, 'embed_loss_weight': 0.3},
    'target_kept': {'target_kept': 0.3, 'target_steps': 4, 'embed_loss_weight': 0.3},
    'target_macs': {'target_macs': 0.5, 'target_steps': 4, 'gate_loss_weight': 5.0, 'gate_norm': 'macs'},
    'frozen': {'freeze_gating': True},
    'accumulation': {'gate_loss_weight': 0.7, 'embed_loss_weight': 0.3},
    'compiled': {'gate_loss_weight': 0.7, 'embed_loss_weight': 0.3},
    'distillation': {'gate_loss_weight': 0.7, 'embed_loss_weight': 0.3},
    'hand-written loop': {'target_kept': 0.3, 'target_steps': 4},
}
STEPS, BATCH = 3, 8
State = dict[str, Tensor]


def batch(step: int, rank: int | None) -> tuple[Tensor, Tensor]:
    # The second half differs in scale, so that its gates do.
    x = images(BATCH, seed=step, dtype=torch.float64) * torch.linspace(0.1, 3, BATCH)[:, None, None, None]
    y = torch.arange(BATCH) % 10
    half = BATCH // 2
    return (x, y) if rank is None else (x[rank * half :][:half], y[rank * half :][:half])


def train(case: str, rank: int | None) -> tuple[State, list[Tensor]]:
    """Train a few steps, on the whole batch or on one half of it under DDP; return state and kept experts."""
    torch.manual_seed(0)
    model = randomise(small('cifar', **CASES[case])).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    task = ClassificationTask(model, criterion)
    if case == 'distillation':
        task = FeatureDistillationTask(model, randomise(small('cifar', gated=False), seed=9).double().eval(), criterion)
    if case == 'compiled':
        task.compile(backend='eager')
    if rank is not None:
        task.prepare_distributed()
    called = task.get_trainable_module()
    loss_of = DeepMoELoss(called, criterion) if case == 'hand-written loop' else None
    kept = []
    for step in range(STEPS):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        if loss_of is not None:
            loss_of(called(x), y).backward()
            kept.append(loss_of.terms['kept_experts'])
        elif case == 'accumulation':
            with task.no_sync():
                task(x, y)['loss'].backward()
            task(x.flip(3), y)['loss'].backward()
        else:
            result = task(x, y)
            result['loss'].backward()
            kept.append(result['kept_experts'])
        optimizer.step()
    assert rank is None or isinstance(called, DistributedDataParallel)
    return model.state_dict(), kept


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.save({case: train(case, rank) for case in CASES}, f'{folder}/rank{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[State, list[Tensor]]]]:
    folder = tmp_path_factory.mktemp('ddp')
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(Path(folder, f'rank{rank}.pt'), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one(ranks: list[dict[str, tuple[State, list[Tensor]]]], case: str) -> None:
    expected, kept = train(case, None)
    (first, kept_first), (second, kept_second) = (results[case] for results in ranks)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(first[name], second[name]), name
    for whole, *halves in zip(kept, kept_first, kept_second, strict=True):
        torch.testing.assert_close(sum(halves) / 2, whole)
    if case.startswith('target'):
        assert kept_first[0] != kept_second[0]
        assert expected['gating.gates.threshold'] > 0
