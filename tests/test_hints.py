"""Hints: what the stages of a trained network compute teaches those of another."""

import copy

import pytest
import timm
import torch
from torch import nn

import deepmoe_plugin  # noqa: F401
from deepmoe_plugin.hints import StageHints, stage_names

SMALL = {
    'narrow_deepmoe_resnet20_cifar': dict(layers=(1, 1, 1)),
    'narrow_deepmoe_convnext_atto': dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), patch_size=1, ls_init_value=1.0),
    'narrow_deepmoe_vgg11_bn': {},
    'narrow_deepmoe_drn_a_50': dict(layers=(1, 1, 1, 1)),
}


def pair(student_gate: float = 1.0) -> tuple[nn.Module, nn.Module]:
    class Net(nn.Module):
        feature_info = [dict(module='first'), dict(module='second')]

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
            self.scale = scale

        def forward(self, x):
            return self.second(self.scale * self.first(x)).mean((2, 3))

    teacher = Net(1.0)
    student = Net(student_gate)
    student.load_state_dict(teacher.state_dict())
    return student.double(), teacher.double()


def test_error_is_relative_to_the_teacher_and_summed_over_stages():
    student, teacher = pair(0.5)
    with torch.no_grad():
        student.first.weight *= 3  # stages are then 3 and 1.5 times those of the teacher
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    with StageHints(student, teacher) as hints:
        student(x), teacher(x)
        loss = hints.take()
    assert loss.item() == pytest.approx(2**2 + 0.5**2)
    loss.backward()
    assert student.first.weight.grad.abs().sum() > 0
    assert teacher.first.weight.grad is None


def test_stages_of_other_shapes_and_those_not_run_are_left_out():
    student, teacher = pair(0.5)
    teacher.first, teacher.second = nn.Conv2d(2, 5, 1).double(), nn.Conv2d(5, 4, 1, bias=False).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    with StageHints(student, teacher) as hints:
        found, wanted = student(x), teacher(x)
        assert found.shape == wanted.shape
        maps = student.second(0.5 * student.first(x)), teacher.second(teacher.first(x))
        assert hints.take().item() == pytest.approx(
            ((maps[0] - maps[1]).square().mean() / maps[1].square().mean()).item()
        )
        student(x)
        assert hints.take().item() == 0


def test_networks_are_let_alone_afterwards():
    student, teacher = pair()
    hints = StageHints(student, teacher)
    with hints:
        pass
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])


@pytest.mark.parametrize('name', SMALL)
def test_stages_of_each_family(name):
    """A gated network in its dense state computes what its teacher does, at each stage; closed experts are seen."""
    arguments = dict(num_classes=3, **SMALL[name])
    student = timm.create_model(name, **arguments).eval()
    teacher = copy.deepcopy(student)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), StageHints(student, teacher) as hints:
        student(x), teacher.forward_intermediates(x)  # as backbones run
        assert len(hints._found) == 2 * len(stage_names(student)) >= 8
        assert hints.take().item() == 0
        student.gating.gates.weight.mul_(0.5)  # half of each expert
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
        student(x), teacher(x)
        assert hints.take().item() > 0.001
