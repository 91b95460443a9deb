"""timm's own train.py, unmodified, on a handful of images.

Run with TIMM_REPO=<a checkout of timm's repository> and -m slow; the script is copied out of the checkout, so that it
imports the installed timm.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from image_folders import save_images
from torch import Tensor

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif('TIMM_REPO' not in os.environ, reason="TIMM_REPO (a checkout of timm's repository) is not set"),
]

STAGE1 = ('--model-kwargs', 'target_kept=0.5', 'embed_loss_weight=1.0', 'num_latent_experts=8')
# train.py passes device_ids to DistributedDataParallel on a CPU as well, which refuses them for every model.
CPU_DDP = """
from torch.nn.parallel import DistributedDataParallel
original = DistributedDataParallel.__init__
DistributedDataParallel.__init__ = lambda self, module, device_ids=None, **kwargs: original(self, module, **kwargs)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.py, the helper for DDP on a CPU, and images of 4 classes."""
    folder = tmp_path_factory.mktemp('train')
    shutil.copy(Path(os.environ['TIMM_REPO'], 'train.py'), folder)
    (folder / 'cpu_ddp.py').write_text(CPU_DDP)
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 4)):
        for label in range(4):
            pictures = (rng.integers(0, 128, (32, 32, 3)) + 30 * label for _ in range(count))
            save_images(folder / 'data' / split / str(label), pictures)
    return folder


class Run:
    """One run of train.py; `ranks=2` trains with DDP."""

    def __init__(self, folder: Path, name: str, *args: str, ranks: int = 1) -> None:
        self.output = folder / 'out' / name
        self.logs = [folder / f'{name}.{rank}.log' for rank in range(ranks)]
        command = [
            sys.executable, 'train.py', '--data-dir', 'data', '--output', 'out', '--experiment', name,
            '--device', 'cpu', '--device-modules', 'deepmoe_plugin', 'cpu_ddp', '--workers', '0',
            '--model', 'wide_deepmoe_resnet20_cifar', '--num-classes', '4', '--batch-size', '8', '--lr', '0.05',
            '--warmup-epochs', '0', '--log-interval', '1', '--epochs', '1', *args,
        ]  # fmt: skip
        with socket.socket() as probe:
            probe.bind(('localhost', 0))
            port = probe.getsockname()[1]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
        env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
        self.processes = []
        for rank, log in enumerate(self.logs):
            ddp = {
                'WORLD_SIZE': ranks,
                'RANK': rank,
                'LOCAL_RANK': rank,
                'MASTER_ADDR': 'localhost',
                'MASTER_PORT': port,
            }
            with log.open('w') as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        env=env | {name: str(value) for name, value in ddp.items()},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    @property
    def log(self) -> str:
        return self.logs[0].read_text()

    def finish(self) -> 'Run':
        codes = [process.wait() for process in self.processes]
        assert codes == [0] * len(codes), self.log[-2000:]
        return self

    def kill_at(self, line: str) -> 'Run':
        """Send SIGKILL once the log holds the line."""
        while line not in self.log:
            assert self.processes[0].poll() is None, self.log[-2000:]
            time.sleep(0.01)
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        assert {process.wait() for process in self.processes} == {-signal.SIGKILL}
        return self

    def checkpoint(self, name: str = 'last.pth.tar') -> dict[str, Any]:
        with torch.serialization.safe_globals([__import__('argparse').Namespace]):
            return torch.load(self.output / name, weights_only=True)

    def terms(self) -> list[dict[str, float]]:
        """Loss and terms of each progress line."""
        lines = re.findall(r'Train: .*', self.log)
        pattern = r'(Loss|loss_gate|loss_embed|kept_experts): ([\d.]+)'
        return [{name: float(value) for name, value in re.findall(pattern, line)} for line in lines]


def gating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith('gating.')}


def assert_identical(first: Any, second: Any) -> None:
    """Compare nested checkpoints to the bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_identical(value, second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_identical(one, other)
    elif isinstance(first, Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def assert_same_training(first: Run, second: Run) -> None:
    for part in ('state_dict', 'state_dict_ema', 'optimizer', 'epoch'):
        assert_identical(first.checkpoint()[part], second.checkpoint()[part])


@pytest.fixture(scope='module')
def stage1(folder: Path) -> Run:
    return Run(folder, 'stage1', *STAGE1, '--epochs', '2', '--model-ema').finish()


def test_loss_is_j_and_the_log_shows_its_terms(folder: Path, stage1: Run) -> None:
    assert all(
        entry.keys()
        == {'Loss', 'loss_gate', 'loss_embed', 'kept_experts', 'dynamic_experts', 'gate_entropy', 'use_entropy'}
        for entry in stage1.terms()
    )
    assert len(stage1.terms()) == 2 * 12
    plain = Run(folder, 'plain', '--model-kwargs', 'gate_loss_weight=0').finish().terms()[0]
    gated = Run(folder, 'gated', '--model-kwargs', 'gate_loss_weight=5').finish().terms()[0]
    assert gated['loss_gate'] == pytest.approx(5)
    assert gated['Loss'] - plain['Loss'] == pytest.approx(5, abs=0.02)


def test_killed_and_resumed_from_the_same_checkpoint(folder: Path) -> None:
    args = (*STAGE1, '--model-ema', '--epochs', '3')
    killed = Run(folder, 'killed', *args).kill_at('Train: 1 [   5/12')
    start = folder / 'start.pth.tar'
    shutil.copy(killed.output / 'last.pth.tar', start)
    again = Run(folder, 'again', *args, '--resume', str(start)).kill_at('Train: 2 [   3/12')
    assert again.checkpoint()['epoch'] == 1
    resumed = Run(folder, 'resumed', *args, '--resume', str(start)).finish()
    reference = Run(folder, 'reference', *args, '--resume', str(start)).finish()
    assert reference.checkpoint()['epoch'] == 2
    assert_same_training(resumed, reference)


def test_ddp_killed_and_resumed_equals_the_uninterrupted_run(folder: Path) -> None:
    """Without augmentation, timm's distributed sampler depends on the epoch alone: nothing may differ at all."""
    args = (*STAGE1, '--model-ema', '--epochs', '3', '--no-aug', '--batch-size', '4')
    whole = Run(folder, 'whole', *args, ranks=2).finish()
    killed = Run(folder, 'ddp_killed', *args, ranks=2).kill_at('Train: 1 [   5/12')
    resumed = Run(folder, 'ddp_resumed', *args, '--resume', str(killed.output / 'last.pth.tar'), ranks=2).finish()
    assert_same_training(resumed, whole)
    assert whole.checkpoint()['state_dict']['gating.gates.threshold'] > 0


@pytest.mark.parametrize('ema', [True, False], ids=['ema weights', 'weights'])
def test_stage2_changes_no_gating_tensor(folder: Path, stage1: Run, ema: bool) -> None:
    start = stage1.checkpoint()
    source = folder / 'weights.pth'
    torch.save(start['state_dict_ema' if ema else 'state_dict'], source)
    frozen = ('--model-kwargs', 'freeze_gating=True', 'num_latent_experts=8')
    stage2 = Run(folder, f'stage2_{ema}', *frozen, '--initial-checkpoint', str(source)).finish()
    before, after = torch.load(source, weights_only=True), stage2.checkpoint()['state_dict']
    assert len(gating(after)) > 20
    assert_identical(gating(after), {name: gating(before)[name] for name in gating(after)})
    base = [name for name in after if not name.startswith('gating.')]
    assert not any(
        torch.equal(after[name], before[name]) for name in base if name.endswith(('conv1.weight', '.running_mean'))
    )
    assert all(
        entry.keys() == {'Loss', 'kept_experts', 'dynamic_experts', 'gate_entropy', 'use_entropy'}
        for entry in stage2.terms()
    )


def test_shipped_configs_run(folder: Path) -> None:
    small = ('--dataset', '', '--epochs', '1')
    config = ROOT / 'configs/timm/table4_w1_high.yaml'
    first = Run(folder, 'config', '--config', str(config), '--model', 'narrow_deepmoe_vgg16_cifar', *small).finish()
    second = Run(
        folder, 'config2', '--config', str(config.with_stem('table4_w1_high_stage2')),
        '--model', 'narrow_deepmoe_vgg16_cifar', *small, '--initial-checkpoint', str(first.output / 'last.pth.tar'),
    ).finish()  # fmt: skip
    before, after = first.checkpoint()['state_dict'], second.checkpoint()['state_dict']
    assert after['features.40.weight'].shape[0] == 2503
    assert_identical(gating(after), {name: gating(before)[name] for name in gating(after)})


def test_scripting_is_refused(folder: Path) -> None:
    run = Run(folder, 'scripted', *STAGE1, '--torchscript')
    assert run.processes[0].wait() == 1
    assert 'leave out --torchscript' in run.log


@pytest.fixture(scope='module')
def digits(folder: Path) -> Path:
    """Jittered digits of random pixels, and the same digits as torchvision keeps MNIST."""
    from test_digits import write_idx

    from deepmoe_plugin.cli.jittered_digits import write_jittered

    for name, count in (('train', 200), ('t10k', 30)):
        write_idx(folder / 'mnist/MNIST/raw', name, count, 0)
    write_jittered(folder / 'jittered', str(folder / 'mnist'))
    return folder


def sibling(folder: Path, name: str, config: str, data: str, *args: str) -> Run:
    path = ROOT / f'configs/timm/{config}.yaml'
    model = yaml.safe_load(path.read_text())['model']
    options = ('--config', str(path), '--model', model, '--data-dir', data, '--num-classes', '10', '--lr', '0.01')
    return Run(folder, name, *options, *args)


def test_stacked_mixture_in_two_phases(digits: Path) -> None:
    first = sibling(digits, 'phase1', 'dmoe_4x50_4x20', 'jittered').finish()
    assert 'use_entropy_2' in first.log
    start = str(first.output / 'last.pth.tar')
    second = sibling(digits, 'phase2', 'dmoe_4x50_4x20_phase2', 'jittered', '--initial-checkpoint', start).finish()
    before, after = (run.checkpoint()['state_dict'] for run in (first, second))
    assert before['layers.0.balance.units'].sum() > 0
    assert torch.equal(before['layers.0.balance.units'], after['layers.0.balance.units'])
    assert not torch.equal(before['head.weight'], after['head.weight'])


def test_specialised_mixture_logs_its_losses_and_is_distilled(digits: Path) -> None:
    first = sibling(digits, 'attentive', 'moe_mnist_attentive_similarity', 'mnist').finish()
    assert 'loss_similarity' in first.log
    start = str(first.output / 'last.pth.tar')
    second = sibling(digits, 'distilled', 'moe_mnist_distilled', 'mnist', '--initial-checkpoint', start).finish()
    before, after = (run.checkpoint()['state_dict'] for run in (first, second))
    assert_identical(
        *({k: v for k, v in state.items() if k.startswith(('experts.', 'gate.trunk.'))} for state in (before, after))
    )
    assert 'gate.head.weight' in after
