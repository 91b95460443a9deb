"""Statistics of gates, by hand."""

import pytest
import torch
from small_networks import images, randomise, small
from torch import nn

from deepmoe_plugin import GateStatistics, gate_statistics

# Four images, layers of two and three experts.
KEPT = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
STATS = GateStatistics(KEPT, ('first', 'second'), (2, 3))


def test_fractions_by_hand():
    assert STATS.kept_experts == pytest.approx(8 / 20)
    assert STATS.dynamic_experts == pytest.approx(3 / 5)
    torch.testing.assert_close(STATS.by_image(), torch.tensor([3, 2, 1, 2]) / 5)
    assert STATS.by_layer() == {'first': pytest.approx(3 / 8), 'second': pytest.approx(5 / 12)}
    assert STATS.dead() == {'first': 1, 'second': 1}


def test_classes_by_hand():
    usage = STATS.by_class(torch.tensor([0, 2, 2, 0]))
    expected = torch.tensor([[0.5, 0, 1, 1, 0], [float('nan')] * 5, [1, 0, 0, 0.5, 0]])
    torch.testing.assert_close(usage, expected, equal_nan=True)


@pytest.mark.parametrize('form', ['batch', 'batches', 'tuples'])
def test_images_come_as_a_batch_or_from_a_loader(form):
    model = randomise(small('cifar')).eval()
    x = images(5)
    given = {'batch': x, 'batches': x.split(2), 'tuples': [(part, torch.zeros(len(part))) for part in x.split(2)]}
    stats = gate_statistics(nn.Sequential(model), given[form])
    assert stats.widths == tuple(model.gating.gates.widths)
    assert stats.layers == tuple(layer.conv for layer in model.expert_layers)
    assert torch.equal(stats.kept, torch.cat(model.gating(x), 1) > 0)
    assert stats.kept.float().std(0).any()


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match='images is empty'):
        gate_statistics(small('cifar'), [])


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip('torch.utils.tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        STATS.log_to(writer, 7, 'val/')
    written = EventAccumulator(str(tmp_path))
    written.Reload()
    values = {tag: written.Scalars(tag) for tag in written.Tags()['scalars']}
    assert {tag: (events[0].step, events[0].value) for tag, events in values.items()} == {
        'val/kept_experts': (7, pytest.approx(0.4)),
        'val/dynamic_experts': (7, pytest.approx(STATS.dynamic_experts)),
        'val/kept_experts/first': (7, pytest.approx(3 / 8)),
        'val/kept_experts/second': (7, pytest.approx(5 / 12)),
    }
    sizes = {tag: written.Histograms(tag)[0].histogram_value.num for tag in written.Tags()['histograms']}
    assert sizes == {'val/kept_experts/by_image': 4, 'val/kept_experts/by_expert': 5}
