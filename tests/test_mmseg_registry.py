"""Both spellings of the types of `deepmoe_plugin.mmseg`: with the scope and no import, and without it after one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

BUILD = """
import torch
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmseg.registry import MODELS as MMSEG_MODELS
init_default_scope('mmseg')
{before}
backbone = dict(type='{scope}DeepMoEResNet', depth=18, widen=0.25)
models = []
with torch.device('meta'):
    for registry in (MODELS, MMSEG_MODELS):
        models.append(registry.build(dict(backbone)))
import deepmoe_plugin
assert all(isinstance(model, deepmoe_plugin.DeepMoE) for model in models)
hook = HOOKS.build(dict(type='{scope}DeepMoELossHook'))
assert type(hook).__module__.startswith('deepmoe_plugin.mmseg')
"""


@pytest.mark.parametrize(
    ('scope', 'before'),
    [
        ('deepmoe_plugin.', ''),
        ('deepmoe_plugin.', 'import deepmoe_plugin.mmseg'),
        ('deepmoe_plugin.', 'import deepmoe_plugin.registry'),
        ('', 'import deepmoe_plugin.mmseg'),
    ],
)
def test_spellings(scope: str, before: str) -> None:
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'}
    code = BUILD.format(scope=scope, before=before)
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_type_is_in_both_registries() -> None:
    from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

    import deepmoe_plugin.mmseg
    from deepmoe_plugin import registry

    for name in deepmoe_plugin.mmseg.__all__:
        of_all, own = (HOOKS, registry.HOOKS) if name.endswith('Hook') else (MODELS, registry.MODELS)
        if name == 'DeepMoELearningRateDecay':
            of_all, own = OPTIM_WRAPPER_CONSTRUCTORS, registry.OPTIM_WRAPPER_CONSTRUCTORS
        assert of_all.get(name) is own.get(name) is getattr(deepmoe_plugin.mmseg, name)
