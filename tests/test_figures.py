"""Figures of what gates do."""

import warnings

import pytest
import torch

figures = pytest.importorskip('deepmoe_plugin.cli.figures')


@pytest.mark.parametrize('depth', [1, 9, 27, 66])
def test_experts_of_deep_networks_have_room(depth, tmp_path):
    """Layers that do not fit side by side go on in the next row; matplotlib warns where axes are left without room."""
    widths = [16] * depth
    layers = [f'layer{i}.conv1' for i in range(depth)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        figure = figures.draw_experts(torch.rand(3, sum(widths)), layers, widths, ['cat', 'dog', 'frog'])
        figure.savefig(tmp_path / 'experts.png')
    shown = [axes.get_title(loc) for axes in figure.axes for loc in ('center', 'left') if axes.get_title(loc)]
    assert [title.partition(',')[0] for title in shown] == layers
