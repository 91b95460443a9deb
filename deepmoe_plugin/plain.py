"""Whether a module computes what its class says and no more: only then may other code compute in its place.

Sparse execution, pruning and widening read the weights of modules instead of calling them. That would leave out
whatever else a user has put there: subclasses, parametrisations, adapters, hooks.
"""

from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

# Also what mmengine makes of SyncBatchNorm on one device: a batch norm that only checks its input less.
BATCH_NORMS = (nn.SyncBatchNorm, _BatchNorm, FrozenBatchNorm2d)
# They do nothing in evaluation mode.
IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropBlock2d, DropPath)
REMEDY = 'merge it into a plain one, or remove it'

_CALLED = ('__call__', 'forward', '_conv_forward')
_TENSORS = (nn.Parameter, Tensor, FakeTensor, type(None))


def oddity(module: nn.Module | None, *kinds: type[nn.Module]) -> str:
    """What sets the module apart from a plain one of these kinds, as the end of a sentence; '' if nothing does."""
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    if module is None or kind is None:
        return f'is of type {type(module).__name__}'
    held = {**module._parameters, **module._buffers}
    for name in ('weight', 'bias') if held or type(module) is not kind else ():
        if not hasattr(module, name):
            continue
        if name not in held or hasattr(type(module), name):
            return f'computes its {name} (by a parametrisation, as weight norm or pruning masks)'
        if type(held[name]) not in _TENSORS:
            return f'has a {name} of type {type(held[name]).__name__}'
    if type(module) is not kind and any(
        getattr(type(module), name, None) is not getattr(kind, name, None) for name in _CALLED
    ):
        return f'is of type {type(module).__name__}'
    if 'forward' in module.__dict__:
        return 'has another forward than its class'
    if module._forward_hooks or module._forward_pre_hooks:
        return 'has a forward hook'
    return ''


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a call of the module does the arithmetic of one of these kinds, on its own weights, and nothing else."""
    return not oddity(module, *kinds)
