"""Peers of the benchmark compute what the masked network computes, and what does not is refused."""

import pytest
import torch
from small_networks import SMALL, images, randomise, small, widths

from deepmoe_plugin import sparsify
from deepmoe_plugin.cli.peers import (
    GivenGates,
    SyntheticGates,
    check_same,
    folded,
    random_experts,
    thinned,
    wake,
    with_gates,
)


def thin_peers(structure):
    """A gated network, half of its experts, and its thin peers."""
    torch.manual_seed(0)
    model = randomise(small(structure)).eval()
    size = model.gating.gates.experts_per_gate
    chosen = random_experts(widths(model), [width // 2 // size * size for width in widths(model)], size)
    dense = small(structure, gated=False).eval()
    dense.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    gated = thinned(model, chosen)
    counts = list(map(len, chosen))
    gated.gating = GivenGates([torch.arange(count) for count in counts], counts)
    return with_gates(model, GivenGates(chosen, widths(model))), thinned(dense, chosen), gated


@torch.no_grad()
@pytest.mark.parametrize('structure', SMALL)
def test_thin_networks_compute_what_the_masked_one_does_with_their_experts(structure):
    masked, dense, gated = thin_peers(structure)
    x = images(2)
    for peer in (folded(dense), gated, sparsify(gated)):
        check_same('peer', lambda peer=peer: peer(x), masked(x))


@torch.no_grad()
@pytest.mark.parametrize('structure', ['basic', 'convnext'])
def test_a_network_that_leaves_out_a_block_is_refused(structure):
    """New networks hide their blocks from the output: `wake` must show them."""
    model = small(structure).eval()
    wake(model)
    masked = with_gates(model, GivenGates([torch.arange(width) for width in widths(model)], widths(model)))
    other = with_gates(model, GivenGates([torch.arange(0) for _ in widths(model)], widths(model)))
    x = images(2)
    with pytest.raises(ValueError, match='Another does not compute what the masked network computes'):
        check_same('Another', lambda: other(x), masked(x))


def test_copies_of_a_network_get_the_gates_that_are_drawn():
    model = small('basic').eval()
    gates = model.gating = SyntheticGates(widths(model), images(2), 0.5)
    copy = folded(model)
    gates.draw()
    check_same('copy', lambda: copy(gates.images), model(gates.images))


def test_synthetic_gates_keep_whole_groups():
    gates = SyntheticGates([16, 48], images(3), 0.5, experts_per_gate=8)
    assert gates.counts == [8, 24]
    for gate, count in zip(gates(gates.images), gates.counts, strict=True):
        assert (gate > 0).sum(1).tolist() == [count] * 3
        groups = gate.view(3, -1, 8)
        assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
