"""The balancing constraint against its definition, example by example."""

import pytest
import torch
from torch import Tensor, nn

from deepmoe_plugin.balance import BalancedSoftmax


def example_by_example(logits: Tensor, totals: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The definition: gates after the constraint, and the totals after the batch."""
    totals, gates = totals.clone(), []
    for row in logits.double():
        gate = row.softmax(0)
        seen = totals + gate
        gate = torch.where(seen - seen.mean() > margin, 0.0, gate)
        gate = gate / gate.sum()
        totals += gate
        gates.append(gate)
    return torch.stack(gates), totals


def draw(seed: int, batch: int = 100, experts: int = 4, spread: float = 2.0, lead: float = 3.0) -> Tensor:
    """Logits that prefer the first expert."""
    logits = spread * torch.randn(batch, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, 0] += lead
    return logits


@pytest.mark.parametrize('margin', [0, 0.5, 5, 1000])
@pytest.mark.parametrize(('experts', 'lead'), [(2, 0.0), (4, 3.0), (16, 6.0)])
def test_a_batch_at_once_equals_example_by_example(margin: float, experts: int, lead: float) -> None:
    balance = BalancedSoftmax(experts, margin)
    totals = torch.zeros(experts, dtype=torch.float64)
    closed = 0
    for step in range(5):
        logits = draw(step, experts=experts, lead=lead)
        expected, totals = example_by_example(logits, totals, margin)
        gates = balance(logits)
        torch.testing.assert_close(gates, expected)
        torch.testing.assert_close(balance.totals, totals, rtol=0, atol=1e-4)
        closed += int((gates == 0).sum())
    assert (closed > 0) == (margin < 1000)


def test_batches_of_any_size_give_the_same() -> None:
    logits = draw(0, batch=60)
    whole, parts = BalancedSoftmax(4, 2.0), BalancedSoftmax(4, 2.0)
    gates = whole(logits)
    torch.testing.assert_close(torch.cat([parts(part) for part in logits.split([1, 7, 52])]), gates, rtol=0, atol=0)
    assert torch.equal(whole.units, parts.units)


def test_constraint_keeps_every_expert_in_use() -> None:
    balance, free = BalancedSoftmax(4, 5.0), BalancedSoftmax(4, None)
    logits = draw(0, batch=400, spread=0.5, lead=4.0)
    assert free(logits).mean(0)[1:].max() < 0.05
    balance(logits)
    assert (balance.totals - balance.totals.mean()).abs().max() < 6


def test_one_gate_always_stays_open() -> None:
    balance = BalancedSoftmax(3, 0)
    logits = torch.tensor([[0.0, -2000.0, -2000.0]]).repeat(20, 1)
    gates = balance(logits)
    torch.testing.assert_close(gates.sum(1), torch.ones(20))
    assert gates.isfinite().all()
    assert balance.totals.sum().item() == pytest.approx(20, abs=1e-4)


def test_gradient_goes_through_mask_and_renormalisation() -> None:
    logits = draw(1, batch=12).requires_grad_()

    def gates(x: Tensor) -> Tensor:
        return BalancedSoftmax(4, 0.5)(x)

    assert (gates(logits) == 0).any()
    torch.autograd.gradcheck(gates, logits)


def test_gradient_is_that_of_the_plain_loop() -> None:
    weights = draw(3, batch=12)
    first, second = draw(1, batch=12).requires_grad_(), draw(1, batch=12).requires_grad_()
    (BalancedSoftmax(4, 0.5)(first) * weights).sum().backward()
    (example_by_example(second, torch.zeros(4, dtype=torch.float64), 0.5)[0] * weights).sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_off_in_eval_mode_and_without_margin() -> None:
    logits = draw(0)
    balance = BalancedSoftmax(4, 0.5)
    balance(logits)
    before = balance.units.clone()
    torch.testing.assert_close(balance.eval()(logits), logits.softmax(1), rtol=0, atol=0)
    assert torch.equal(balance.units, before)
    second_phase = BalancedSoftmax(4, None)
    second_phase.load_state_dict(balance.state_dict())
    torch.testing.assert_close(second_phase(logits), logits.softmax(1), rtol=0, atol=0)
    assert torch.equal(second_phase.units, before)


def test_totals_are_saved_and_no_cast_rounds_them() -> None:
    balance = BalancedSoftmax(4, 0.5)
    balance(draw(0))
    copy = BalancedSoftmax(4, 0.5).bfloat16()
    copy.load_state_dict(balance.state_dict())
    assert torch.equal(copy.half().totals, balance.totals)
    assert balance.totals.sum().item() == pytest.approx(100, abs=1e-4)


def test_low_precision_logits_give_float32_gates() -> None:
    assert BalancedSoftmax(4, 1)(draw(0).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize('margin', [-1, float('nan'), float('inf'), '5', True])
def test_bad_margin_is_refused(margin: object) -> None:
    with pytest.raises(ValueError, match='balance_margin'):
        BalancedSoftmax(4, margin)  # type: ignore[arg-type]


def worker(rank: int, folder: str, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    balance = BalancedSoftmax(4, 2.0)
    gates = [balance(draw(step, batch=sum(sizes)).split(sizes)[rank]) for step in range(3)]
    torch.save({'gates': gates, 'units': balance.units}, f'{folder}/rank{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_count_together(tmp_path: object) -> None:
    sizes = [25, 15]
    torch.multiprocessing.spawn(worker, (str(tmp_path), sizes), nprocs=2)
    ranks = [torch.load(f'{tmp_path}/rank{rank}.pt', weights_only=True) for rank in range(2)]
    single = BalancedSoftmax(4, 2.0)
    for step in range(3):
        expected = single(draw(step, batch=sum(sizes)))
        torch.testing.assert_close(torch.cat([rank['gates'][step] for rank in ranks]), expected, rtol=0, atol=0)
    for rank in ranks:
        assert torch.equal(rank['units'], single.units)


def test_inside_a_compiled_module() -> None:
    torch._dynamo.reset()
    plain, compiled = (nn.Sequential(nn.Linear(6, 4), BalancedSoftmax(4, 0.5)) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    x = draw(0, batch=20, experts=6).float()
    torch.testing.assert_close(torch.compile(compiled, backend='eager')(x), plain(x))
    assert torch.equal(compiled[1].units, plain[1].units)
