"""Norms whose statistics stay as they are, whatever the host does to the batch norms of a model."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


class FrozenNorm(_NormBase):
    """Stands in for a batch norm under a type of its own, with the parameters and buffers of the norm.

    Recalibration (`torch.optim.swa_utils.update_bn`, Lightning's weight averaging) resets every batch norm that it
    finds and counts on training mode to fill its statistics again. A frozen one would keep what the reset left.

    Args:
        norm: shares its tensors with this module, so that `unfreeze_norms` can put it back.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        nn.Module.__init__(self)
        for name in _NormBase.__constants__:
            setattr(self, name, getattr(norm, name))
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self._norm = (norm,)  # a tuple hides it from `modules()`
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) by the running statistics."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _FrozenSubclass(FrozenNorm):
    """The same for a subclass of batch norm, which may do more (an activation, as timm's `BatchNormAct2d`)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm[0].eval()(x)


def freeze_norms(module: nn.Module) -> None:
    """Put a `FrozenNorm` in the place of each batch norm inside a module."""
    for name, norm in list(module.named_modules()):
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            is_plain = type(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
            module.set_submodule(name, FrozenNorm(norm) if is_plain else _FrozenSubclass(norm))


def unfreeze_norms(module: nn.Module) -> None:
    """Undo `freeze_norms`."""
    for name, frozen in list(module.named_modules()):
        if isinstance(frozen, FrozenNorm):
            module.set_submodule(name, frozen._norm[0])
