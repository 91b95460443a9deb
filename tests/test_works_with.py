"""What works with what: `python tests/test_works_with.py` writes docs/works_with.md from the table below.

Each line of the page is checked: by a function here, which fails where the page says otherwise, or by the test named.
The file is long since the table is one, and the functions of its lines share nothing that could stand elsewhere.
"""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from small_networks import images, randomise, small
from torch import nn

import deepmoe_plugin

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'works_with.md'


def network(**kwargs: Any) -> nn.Module:
    return randomise(small('cifar', **kwargs)).eval()


def same(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def trains(model: nn.Module, output: Callable[[Any], torch.Tensor] = lambda output: output) -> None:
    """A step with the terms of J, which reaches the gates."""
    model.train()
    loss = output(model(images(4, 64))).square().mean()
    terms = deepmoe_plugin.gating_terms(model, loss=loss)
    (loss + terms['loss_gate']).backward()
    gates = next(p for name, p in model.named_parameters() if name.endswith('gates.weight'))
    assert gates.grad is not None


def anomalib() -> None:
    extractors = pytest.importorskip('anomalib.models.components.feature_extractors')
    for backbone in ('narrow_deepmoe_resnet18', timm.create_model('narrow_deepmoe_resnet18')):
        features = extractors.TimmFeatureExtractor(backbone, ['layer1', 'layer2'], pre_trained=False)(images(1, 64))
        assert [tuple(maps.shape[1:]) for maps in features.values()] == [(64, 16, 16), (128, 8, 8)]


def unet() -> None:
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-narrow_deepmoe_resnet18', encoder_weights=None, classes=3)
    trains(model)
    x = images(2, 64)
    same(deepmoe_plugin.sparsify(model)(x), model.eval()(x))


def smp_strides(name: str, depth: int = 5, in_channels: int = 3, **kwargs: Any) -> list[int]:
    """Strides of the levels of an encoder of segmentation_models.pytorch, which must be those that it announces."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    encoder = smp.encoders.get_encoder(f'tu-{name}', in_channels, depth, weights=None, **kwargs).eval()
    with torch.inference_mode():
        levels = encoder(torch.rand(1, in_channels, 64, 64))
    assert [level.shape[1] for level in levels] == list(encoder.out_channels)
    strides = [64 // level.shape[2] for level in levels]
    assert strides[-1] == encoder.output_stride
    return strides


def smp_encoders() -> None:
    strides = [1, 2, 4, 8, 16, 32]
    for name in ('narrow_deepmoe_resnet18', 'narrow_deepmoe_vgg11_bn', 'narrow_deepmoe_convnext_atto'):
        for depth, in_channels in ((3, 1), (5, 4)):
            assert smp_strides(name, depth, in_channels) == strides[: depth + 1]
    for name in ('narrow_deepmoe_resnet18', 'narrow_deepmoe_convnext_atto'):
        for stride in (8, 16):
            assert smp_strides(name, output_stride=stride) == [min(stride, s) for s in strides]


def lightning() -> None:
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            return loss + deepmoe_plugin.gating_terms(self.net, loss=loss).get('loss_gate', 0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    deepmoe_plugin.freeze_gating(module)
    gates = module.net.gating.packed_gates(images())
    data = torch.utils.data.TensorDataset(images(16), torch.arange(16) % 10)
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=3, accelerator='cpu', callbacks=[averaging], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, 8))
    assert torch.equal(module.net.gating.packed_gates(images()), gates)


def transformers() -> None:
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture='wide_deepmoe_resnet20_cifar', num_labels=10)
    trains(transformers.TimmWrapperForImageClassification(config), lambda output: output.logits)


def extractor() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = network()
    same(create_feature_extractor(model, ['fc'])(images())['fc'], model(images()))


def fpn() -> None:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    BackboneWithFPN(small('basic'), {'layer1': '0', 'layer2': '1'}, [64, 128], 8)(images(2, 64))


def adapters() -> nn.Module:
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(target_modules=['layer1.0.conv1', 'layer1.0.conv2'], r=2)
    model = peft.get_peft_model(network(), config)
    nn.init.normal_(model.base_model.model.layer1[0].conv1.lora_B['default'].weight)
    return model.eval()


def merged_adapters() -> None:
    model = adapters()
    expected = model(images())
    merged = model.merge_and_unload().eval()
    same(merged(images()), expected)
    same(deepmoe_plugin.sparsify(merged)(images()), expected)


def torch_pruning() -> None:
    tp = pytest.importorskip('torch_pruning')
    model = network()
    graph = tp.DependencyGraph().build_dependency(model, images())
    graph.get_pruning_group(model.layer1[0].conv1, tp.prune_conv_out_channels, [0, 1]).prune()
    model(images())


def fvcore() -> None:
    fvcore = pytest.importorskip('fvcore.nn')
    total = fvcore.FlopCountAnalysis(network(), images(1)).unsupported_ops_warnings(False).total()
    assert total == pytest.approx(deepmoe_plugin.count_macs(network(), images(1)).dense_total, rel=0.02)


def compiled() -> None:
    model = network()
    same(torch.compile(model, backend='aot_eager')(images()), model(images()))


def fx() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    model = network()
    same(torch.fx.symbolic_trace(model)(images()), model(images()))
    same(prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (images(),))(images()), model(images()))


def transforms() -> None:
    model = network()
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, (weights, buffers), (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images())
    model(images()[:1]).square().sum().backward()
    for name, weight in weights.items():
        same(found[name][0], weight.grad, 1e-3)


def dynamic_quantisation() -> None:
    model = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
    same(deepmoe_plugin.sparsify(model)(images()), model(images()))


def checkpointed(model: nn.Module, **kwargs: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    x = images().requires_grad_()
    deepmoe_plugin.gating_terms(model, loss=checkpoint(model.train(), x, **kwargs).sum())


def traced() -> None:
    model = network()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, images()), buffer)
    buffer.seek(0)
    same(torch.jit.load(buffer)(images()), model(images()))


def openvino() -> None:
    openvino = pytest.importorskip('openvino')
    model = network()
    precise = {'INFERENCE_PRECISION_HINT': 'f32'}
    run = openvino.compile_model(openvino.convert_model(model, example_input=images()), 'CPU', precise)
    same(torch.from_numpy(run(images().numpy())[0]), model(images()))


def optimizer(name: str) -> Callable[[], None]:
    def check() -> None:
        from timm.optim import create_optimizer_v2

        model = network()
        steps = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.01)
        trains(model)
        steps.step()
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    return check


def averaged() -> None:
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    torch.optim.swa_utils.update_bn([images(4)], average)
    same(average.module.gating.gates.weight, model.gating.gates.weight)


class Predicted(torch.utils.data.Dataset):
    """Each item is what a network says of an image: a worker runs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 1

    @torch.no_grad()
    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(images(1))[0]


def spawned_workers() -> None:
    model = network()
    expected = model(images(1))  # what the parent computes makes a forked worker hang
    for runs in (model, deepmoe_plugin.sparsify(model)):
        workers = dict(num_workers=1, multiprocessing_context='spawn', timeout=120)
        (result,) = torch.utils.data.DataLoader(Predicted(runs), **workers)
        same(result, expected)


class Line(NamedTuple):
    """A line of the page.

    Attributes:
        group, what: what is tried.
        check: runs it, or names the test that does, as file::function.
        refused: the error, as a regular expression; '' where it works.
        note: what to know, or what works instead.
    """

    group: str
    what: str
    check: Callable[[], Any] | str
    refused: str = ''
    note: str = ''


F, W, E, P = 'Frameworks', 'Wrappers and transformations', 'Exporters', 'Optimizers and averaging'
LINES = (
    Line(F, 'timm: training tasks and `train.py`', 'test_timm_task.py::test_classification_optimises_j'),
    Line(
        F,
        "timm: `features_only=True`, `feature_cls='getter'` (default)",
        'test_sparse_as_a_module.py::test_saved_and_copied',
    ),
    Line(
        F,
        "timm: `feature_cls='list'`",
        lambda: small('basic', features_only=True, feature_cls='list')(images()),
        'features_only=True',
        'leave `feature_cls` out',
    ),
    Line(
        F,
        'MMSegmentation and mmengine: Runner, hooks, `--amp`, resume',
        'test_mmseg_loss_hook.py::test_training_optimises_j',
    ),
    Line(
        F,
        'Lightning: hand-written step, weight averaging with frozen gating',
        lightning,
        note='terms by `gating_terms`',
    ),
    Line(F, 'segmentation_models.pytorch: encoders `tu-...deepmoe...`', unet, note='terms by `gating_terms`'),
    Line(
        F,
        'segmentation_models.pytorch: its own tests of encoders',
        smp_encoders,
        note='all but that of `torch.jit.script`; VGGs take no `encoder_output_stride`, as those of timm',
    ),
    Line(
        F,
        'segmentation_models.pytorch: `tu-...deepmoe_drn_a_50`',
        lambda: smp_strides('narrow_deepmoe_drn_a_50'),
        'Unsupported model downsampling pattern',
        'it wants stride 32; use `tu-...deepmoe_resnet50` with `encoder_output_stride=8`, the same network',
    ),
    Line(F, 'anomalib: `TimmFeatureExtractor`, of a name and of a module', anomalib),
    Line(F, 'transformers: `TimmWrapperForImageClassification`', transformers, note='terms by `gating_terms`'),
    Line(F, 'torchvision: `create_feature_extractor`', extractor),
    Line(
        F,
        'torchvision: `BackboneWithFPN`, `nn.Sequential(*model.children())`',
        fpn,
        'called without gates',
        'calls the parts one by one; use `features_only=True`',
    ),
    Line(F, 'fvcore: `FlopCountAnalysis`', fvcore, note='counts dense; `count_macs` counts each image'),
    Line(
        F,
        'Torch-Pruning on a gated layer',
        torch_pruning,
        'deepmoe_plugin.prune',
        'knows no gates; use `deepmoe_plugin.prune`, or prune the dense twin',
    ),
    Line(W, 'DistributedDataParallel', 'test_distributed.py::test_two_processes_equal_one'),
    Line(
        W,
        'DataParallel, AveragedModel, `torch.compile`: `count_macs`',
        'test_sparse_as_a_module.py::test_macs_are_those_of_the_network',
    ),
    Line(
        W,
        'Data loaders whose workers run a network: `spawn`',
        spawned_workers,
        note='forked workers hang, as with any network; see [workers](training.md#workers)',
    ),
    Line(W, '`torch.compile`', compiled),
    Line(
        W,
        '`torch.compile` of a sparse network',
        'test_export.py::test_compiler_leaves_the_sparse_network_as_it_is',
        note='runs as it is, uncompiled',
    ),
    Line(W, '`torch.func`: grad, vmap, jvp', transforms),
    Line(W, 'torch.fx: `symbolic_trace`, `prepare_fx`', fx),
    Line(W, 'Dynamic quantisation of linear layers', dynamic_quantisation),
    Line(
        W, 'Checkpointing of blocks (`set_grad_checkpointing`, `with_cp`)', 'test_timm_task.py::test_grad_checkpointing'
    ),
    Line(
        W,
        'Checkpointing of the whole network, reentrant',
        lambda: checkpointed(network(), use_reentrant=True),
        'checkpoint the activations of blocks',
        'use `set_grad_checkpointing`',
    ),
    Line(
        W,
        '`copy.deepcopy`, `torch.save` of a model and of a sparse one',
        'test_sparse_as_a_module.py::test_saved_and_copied',
    ),
    Line(W, 'peft: LoRA on gated convolutions, masked', lambda: adapters()(images())),
    Line(
        W,
        'peft: LoRA on gated convolutions, `sparsify`',
        lambda: deepmoe_plugin.sparsify(adapters()),
        r'layer1\.0\.conv1',
        'call `merge_and_unload` first',
    ),
    Line(W, 'peft: after `merge_and_unload`, `sparsify`', merged_adapters),
    Line(
        W,
        'Weight norm, spectral norm, pruning masks, hooks, subclasses on gated layers',
        'test_foreign_modules.py::test_convolutions_that_are_more_than_they_seem',
        note='run as they are; `sparsify` and `prune` refuse them by name; elsewhere `sparsify` runs them as they are',
    ),
    Line(E, '`torch.jit.trace`', traced),
    Line(
        E,
        '`torch.jit.script`',
        lambda: torch.jit.script(network()),
        'torch.jit.trace',
        'use `torch.jit.trace` or `torch.export`',
    ),
    Line(E, '`torch.export`', 'test_export.py::test_torch_export_with_dynamic_batch'),
    Line(E, 'ONNX, ONNX Runtime', 'test_export.py::test_onnx_with_dynamic_batch'),
    Line(E, 'OpenVINO: `convert_model`', openvino),
    Line(
        E,
        'Any exporter on a sparse network',
        lambda: torch.export.export(deepmoe_plugin.sparsify(network()), (images(),)),
        'Export the network itself',
        'export the network itself, or what `prune` made of it',
    ),
    Line(E, '`timm.models.save_for_hf`, safetensors', 'test_pruning.py::test_saved_and_loaded_by_name'),
    *(Line(P, f'timm: `{name}`', optimizer(name)) for name in ('sgd', 'adamw', 'lamb', 'lion', 'adafactor')),
    Line(
        P,
        'timm: `muon`, `nmuon`, `adamuon`',
        'test_hosts_by_name.py::test_muon_leaves_the_gate_heads_to_its_other_method',
        note='gate heads are updated by its AdamW',
    ),
    Line(
        P,
        'timm: layer decay',
        'test_hosts_by_name.py::test_layer_decay',
        note='the gating network trains at the rate of the classifier',
    ),
    Line(P, 'timm: `--clip-mode agc`', 'test_hosts_by_name.py::test_gates_of_a_clipped_step_as_in_timm'),
    Line(P, 'mmengine: `paramwise_cfg.custom_keys`', 'test_hosts_by_name.py::test_custom_keys_of_mmengine'),
    Line(
        P,
        'mmseg: layer decay constructors',
        'test_hosts_by_name.py::test_layer_decay_of_mmseg_knows_neither_network',
        'NotImplementedError',
        'they know ConvNeXt, BEiT and MAE only',
    ),
    Line(P, '`AveragedModel` and `update_bn`', averaged, note='frozen gating stays as it is'),
)


def page() -> str:
    text = [
        '# What works with what',
        '',
        'Written by `python tests/test_works_with.py`, whose table the tests check line by line.',
        'Refused means: an error names the cause and what works instead.',
    ]
    for group in dict.fromkeys(line.group for line in LINES):
        text += ['', f'## {group}', '', '| what | | |', '|---|---|---|']
        lines = [line for line in LINES if line.group == group]
        text += [f'| {line.what} | {"refused" if line.refused else "works"} | {line.note} |' for line in lines]
    return '\n'.join(text) + '\n'


@pytest.mark.parametrize('line', LINES, ids=lambda line: line.what)
def test_line(line: Line) -> None:
    if isinstance(line.check, str):
        file, _, function = line.check.partition('::')
        assert re.search(rf'^def {function}\(', (Path(__file__).parent / file).read_text(), re.MULTILINE)
    elif line.refused:
        with pytest.raises((ValueError, RuntimeError), match=line.refused):
            line.check()
    else:
        line.check()


def test_the_page_says_what_is_tested() -> None:
    assert PAGE.read_text() == page(), 'run python tests/test_works_with.py'


if __name__ == '__main__':
    PAGE.write_text(page())
