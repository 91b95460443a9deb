"""All hooks in two processes."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmseg')

from runs_of_hooks import (
    GATING,
    LOSS,
    STATISTICS,
    WEIGHTS,
    Watch,
    assert_same,
    cost,
    finetune,
    gradient_of_j,
    normalised,
)
from small_segmentors import backbone_config, loader, make_runner, segmentor

SHARED: dict[str, Any] = dict(cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)))


def two_process_runs(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """What each process does: J's gradient, stage 2 halfway, statistics of a validation."""
    results: dict[str, Any] = {}
    for name, accumulative_counts in (('one', 1), ('accumulated', 2)):
        model = segmentor(backbone_config(**WEIGHTS))
        twin, watch = copy.deepcopy(model), Watch()
        optim = dict(accumulative_counts=accumulative_counts)
        make_runner(model, folder / name, watch, LOSS, iters=2, optim=optim, **kwargs).train()
        expected = gradient_of_j(twin, watch.batches[:accumulative_counts])
        results[name] = (watch.grads[0], expected, watch.states[-1])
    model, watch = segmentor(backbone_config(**WEIGHTS)), Watch()
    runner = make_runner(
        model, folder / 'stages', watch, LOSS, STATISTICS, finetune(1), epochs=3, val=loader(4, 1), **kwargs
    )
    runner.train()
    states = [{key.removeprefix('module.'): value for key, value in state.items()} for state in watch.states]
    results['stages'] = [*states, model.state_dict()]
    last = (runner.message_hub.get_scalar(f'val/{name}').current() for name in ('gmacs', 'kept_experts'))
    results['metrics'] = [float(value) for value in last]
    return results


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    results = two_process_runs(Path(folder), launcher='pytorch', **SHARED)
    torch.save(results, f'{folder}/rank{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp('ddp')
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f'rank{rank}.pt', weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('case', ['one', 'accumulated'])
def test_two_processes_optimise_j(ranks: list[dict[str, Any]], case: str) -> None:
    (grads, first, _), (others, second, _) = (rank[case] for rank in ranks)
    assert not torch.equal(first['backbone.gating.gates.weight'], second['backbone.gating.gates.weight'])
    assert_same(grads, {name: (first[name] + second[name]) / 2 for name in first})
    for name, grad in grads.items():
        assert torch.equal(grad, others[name])


def test_two_processes_reach_stage_two_together(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank['stages'] for rank in ranks)
    heads = GATING + 'gates.weight'
    assert len(first) == 4  # one iteration an epoch
    assert not torch.equal(first[0][heads], first[1][heads])
    for i in (2, 3):
        assert torch.equal(first[i][heads], first[1][heads])
        weight = 'backbone.layer1.0.conv1.weight'
        assert not torch.equal(first[i][weight], first[i - 1][weight])
        assert torch.equal(first[i][weight], second[i][weight])


def test_two_processes_count_all_images(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]['metrics'] == ranks[1]['metrics']
    model = segmentor(backbone_config(**WEIGHTS))
    model.load_state_dict(ranks[0]['stages'][-1])
    dataset = loader(4, 1)['dataset']
    costs = [cost(model, normalised(model, dataset[i])) for i in range(4)]
    gmacs, kept = (torch.cat(values).double().mean().item() for values in zip(*costs, strict=True))
    # Norm statistics of the base network differ between processes; those of the gating network are frozen.
    assert ranks[0]['metrics'][0] == pytest.approx(gmacs, rel=0.05)
    assert ranks[0]['metrics'][1] == pytest.approx(kept, rel=0.05)
