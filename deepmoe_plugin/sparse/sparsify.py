"""`deepmoe_plugin.sparsify`: from a trained model to fast inference."""

from torch import Tensor, nn

from ..budgets import set_budget
from ..network import find_deepmoe
from .engine import SparseNetwork
from .fold import eval_view


def sparsify(
    model: nn.Module, calibrate: Tensor | None = None, cache_mb: float = 128, macs: float | None = None
) -> nn.Module:
    """Make a model that computes, for each image, only the experts that its gates keep.

    The result equals `model.eval()(x)` to float rounding and follows later changes of the model's weights; see
    `SparseNetwork`.

    Args:
        model: a DeepMoE network, or any module that holds one (`features_only` models, segmentors).
        calibrate: images (B, in_chans, H, W) of the size, and as many, as to come. Each layer then is timed on this
            machine, and runs on compact weights only where that is faster. On a GPU, so are the kernels for batches
            whose images keep different experts, which without calibration run on trust: they have not been measured
            on a GPU yet.
        cache_mb: MiB of gathered weights kept for gates that come again (video, similar images); 0 keeps none.
        macs: sets the budget of `model` first, by its budget curve; see `set_budget`.

    Returns:
        A `SparseNetwork`, or a copy of `model` in evaluation mode that shares its weights and holds one.

    Raises:
        ValueError: `model` holds no DeepMoE network or several, or has parts that cannot run so; or it has no budget
            curve for `macs`.
    """
    if cache_mb < 0:
        raise ValueError(f'cache_mb must be at least 0, got {cache_mb}.')
    if calibrate is not None and not len(calibrate):
        raise ValueError('calibrate holds no image: give as many as are to come at once.')
    if macs is not None:
        set_budget(model, macs=macs)
    network = find_deepmoe(model)
    sparse = SparseNetwork(network, cache_mb)
    if calibrate is not None:
        from .calibrate import calibrate as measure

        measure(sparse, calibrate)
    if network is model:
        return sparse
    view = eval_view(model)
    path = next(name for name, module in model.named_modules() if module is network)
    view.set_submodule(path, sparse)
    return view
