"""Registries of mmengine for the types of `deepmoe_plugin.mmseg`.

mmengine imports this module where a config says `type='deepmoe_plugin.DeepMoEResNet'`, and then what `locations` names:
such a config needs no `custom_imports`.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='deepmoe_plugin', locations=['deepmoe_plugin.mmseg'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='deepmoe_plugin', locations=['deepmoe_plugin.mmseg'])
