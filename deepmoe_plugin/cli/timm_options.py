"""What the options of timm's train.py mean for the evaluation of what it trained.

Every run leaves all of them in its args.yaml. Each is honoured, or does not matter, or is refused by name: an option
that is left out in silence would give another accuracy.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg

# Read by `timm.data.resolve_data_config`.
DATA = ('in_chans', 'input_size', 'img_size', 'crop_pct', 'interpolation', 'mean', 'std')
# Given to `timm.data.create_dataset`, under the name behind the colon where it differs.
DATASET = {
    'dataset': 'name',
    'val_split': 'split',
    'val_num_samples': 'num_samples',
    'dataset_download': 'download',
    'class_map': 'class_map',
    'input_img_mode': 'input_img_mode',
    'input_key': 'input_key',
    'target_key': 'target_key',
}
# Given to `timm.create_model`, likewise.
MODEL = {'num_classes': 'num_classes', 'gp': 'global_pool', 'bn_eps': 'bn_eps'}
# Read in a way of its own.
OTHERS = ('model', 'model_kwargs', 'model_ema', 'model_ema_force_cpu', 'device_modules')

HONOURED = {*DATA, *DATASET, *MODEL, *OTHERS}

REFUSED = {
    'naflex_loader': 'images of many sizes in one batch are not evaluated here; use validate.py of timm',
    'split_bn': 'networks with split batch norm are not built here; use validate.py of timm',
    'tta': 'test-time augmentation is not done here; set tta: 0 to evaluate each image once',
    'dataset_trust_remote_code': 'code that comes with a data set is not run here; save its images in a folder',
}

# Where the weights came from before training: they are in the checkpoint.
ORIGIN = ('pretrained', 'pretrained_path', 'initial_checkpoint', 'resume')

IRRELEVANT = {
    *ORIGIN,
    # where things are, and what is printed; the images are given by --data-dir
    *('config', 'data', 'data_dir', 'output', 'experiment', 'log_interval', 'checkpoint_hist', 'recovery_interval'),
    *('save_images', 'eval_metric', 'val_interval', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id'),
    # how fast it runs and on what; evaluation is in float32
    *('device', 'amp', 'amp_dtype', 'amp_impl', 'model_dtype', 'channels_last', 'fuser', 'fast_norm', 'torchscript'),
    *('torchcompile', 'torchcompile_mode', 'workers', 'pin_mem', 'no_prefetcher', 'use_multi_epochs_loader'),
    *('batch_size', 'validation_batch_size', 'local_rank', 'no_ddp_bb', 'synchronize_step', 'sync_bn', 'dist_bn'),
    # the training images
    *('train_split', 'train_num_samples', 'epoch_repeats', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip'),
    *('vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'aug_repeats'),
    *('aug_splits', 'reprob', 'remode', 'recount', 'resplit', 'mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob'),
    *('mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch', 'train_interpolation', 'worker_seeding', 'seed'),
    *('train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'train_size_schedule'),
    *('train_size_schedule_spread', 'train_size_random_mix', 'train_batches_per_epoch', 'variable_batch_loss_scale'),
    *('naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes', 'naflex_patch_size_probs'),
    *('naflex_loss_scale', 'naflex_patchify_channels_first'),
    # the loss
    *('smoothing', 'jsd_loss', 'bce_loss', 'bce_sum', 'bce_target_thresh', 'bce_pos_weight', 'kd_model_name'),
    *('kd_distill_type', 'kd_loss_type', 'distill_loss_weight', 'task_loss_weight', 'kd_temperature'),
    *('kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type'),
    # the network while it trains
    *('drop', 'drop_connect', 'drop_path', 'drop_block', 'bn_momentum', 'head_init_scale', 'head_init_bias'),
    *('grad_checkpointing', 'grad_accum_steps', 'model_ema_decay', 'model_ema_warmup', 'no_resume_opt'),
    # optimizer and schedule
    *('opt', 'opt_eps', 'opt_betas', 'opt_kwargs', 'momentum', 'weight_decay', 'clip_grad', 'clip_mode'),
    *('layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale', 'sched', 'sched_on_updates', 'lr'),
    *('lr_base', 'lr_base_size', 'lr_base_scale', 'lr_noise', 'lr_noise_pct', 'lr_noise_std', 'lr_cycle_mul'),
    *('lr_cycle_decay', 'lr_cycle_limit', 'lr_k_decay', 'warmup_lr', 'min_lr', 'epochs', 'start_epoch'),
    *('decay_milestones', 'decay_epochs', 'warmup_epochs', 'warmup_prefix', 'cooldown_epochs', 'patience_epochs'),
    'decay_rate',
}


def check_options(settings: Mapping[str, Any], source: str) -> None:
    """Refuse what would change the result and cannot be honoured.

    Options that are off (false, 0, empty) change nothing, whatever they are.

    Args:
        settings: options of train.py.
        source: the file they come from, for the message.

    Raises:
        ValueError: an option is refused or unknown; the message names it.
    """
    for name, value in settings.items():
        if not value or (name == 'tta' and value == 1):
            continue
        if name in REFUSED:
            raise ValueError(f'{name}: {value!r} of {source}: {REFUSED[name]}.')
        if name not in HONOURED | IRRELEVANT:
            raise ValueError(
                f"{name}: {value!r} of {source} is no option of timm's train.py that this version knows: take the line "
                f'out if neither the images nor the network depend on it.'
            )


def import_modules(settings: Mapping[str, Any], source: str) -> None:
    """Import what train.py imports before it creates the network, so that the network has a name.

    Raises:
        ValueError: there is no such module.
    """
    try:
        for name in settings.get('device_modules') or ():
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f'device_modules of {source}: {error}: put its folder on PYTHONPATH.') from error


def model_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What train.py gives to `timm.create_model`, `model_kwargs` included.

    As there, the channels of `input_size` count where `in_chans` is not given.
    """
    arguments = {argument: settings[name] for name, argument in MODEL.items() if settings.get(name) is not None}
    in_chans, input_size = settings.get('in_chans'), settings.get('input_size')
    if in_chans is None and input_size is not None:
        in_chans = input_size[0]
    if in_chans is not None:
        arguments['in_chans'] = in_chans
    return {**arguments, **(settings.get('model_kwargs') or {})}


def class_count(settings: Mapping[str, Any]) -> int | None:
    """Classes of the network that `model_arguments` makes; None if its own default has no number."""
    count = model_arguments(settings).get('num_classes')
    if count is None:
        cfg = get_pretrained_cfg(settings['model'])
        count = cfg.num_classes if cfg is not None else None
    return count


def uses_ema(settings: Mapping[str, Any]) -> bool:
    """Whether train.py judged the moving average of the weights; it does not where it keeps it on the CPU."""
    return bool(settings.get('model_ema')) and not settings.get('model_ema_force_cpu')
