"""The DeepMoE objective `J = L_b + lambda * L_g + mu * L_e` (Eq. 7), and the one-liner for hand-written loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .gating import GateBudget, GatingNetwork, GatingRecord
from .macs import MacsTable
from .network import DeepMoE, find_deepmoe

Criterion = Callable[[Tensor, Tensor], Tensor]

TERMS = ('loss_gate', 'loss_embed')


def _fraction_kept(kept: Tensor) -> Tensor:
    return kept.double().mean(1)


class GatingLoss:
    """The terms `lambda * L_g` and `mu * L_e` of one DeepMoE network, with its weights and its `gate_norm`.

    Raises:
        ValueError: `target_macs` is below what the layers without gates cost.
    """

    def __init__(self, network: DeepMoE) -> None:
        self.network = network
        self._table: MacsTable | None = None
        self._costs: Tensor | None = None
        if network.gating.budget is not None and network.gating.budget_on_macs:
            self._check_reachable(network.gating.budget.target)

    def __call__(
        self, record: GatingRecord, target: Tensor | None = None, criterion: Criterion | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms of one training forward pass.

        Args:
            record: what the pass left, from `GatingNetwork.take_record`.
            target: what `criterion` takes; needed for `L_e` only.
            criterion: the loss of the base network, used for `L_e` as well, so that soft, smoothed and
                multi-label targets mean the same in both.

        Returns:
            Scalars `loss_gate` and `loss_embed`, weighted, to be added to the loss (each only where it applies),
            and `kept_experts`, the fraction of experts kept, without gradient.
        """
        gating = self.network.gating
        kept = record.preact.detach() > 0
        terms: dict[str, Tensor] = {}
        if not gating.frozen:
            if gating.budget is not None:
                terms['loss_gate'] = self._steered(gating, gating.budget, record.preact)
            elif gating.gate_loss_weight > 0:
                terms['loss_gate'] = gating.gate_loss_weight * self._norm(gating, record.preact.relu())
            if record.embed_logits is not None:
                if target is None or criterion is None:
                    raise ValueError('embed_loss_weight > 0 needs the target and the criterion of the base network.')
                terms['loss_embed'] = gating.embed_loss_weight * criterion(record.embed_logits, target)
        terms['kept_experts'] = kept.float().mean()
        return terms

    def _norm(self, gating: GatingNetwork, gates: Tensor) -> Tensor:
        """L_g of gates (B, N), Eq. 8: gates are not negative, so their sum is their L1 norm."""
        if gating.gate_norm == 'sum':
            return gates.sum(1).mean()
        if gating.gate_norm == 'mean':
            return gates.mean()
        if self._costs is None or self._costs.device != gates.device:
            self._costs = self._macs().expert_costs().to(gates.device)
        return (gates * self._costs).sum(1).mean()

    def _steered(self, gating: GatingNetwork, budget: GateBudget, preact: Tensor) -> Tensor:
        """L_g with a lambda that leads to the target; a negative lambda lifts gates, closed ones included.

        Lifted are the gates that the target has room for. Lifting all would outweigh closing, which moves the open ones
        only: where few are to stay open, images that differ would then lift more than they close, on average.
        """
        cost = self._macs().spent if gating.budget_on_macs else _fraction_kept
        weight, threshold = budget.step(preact.detach(), cost)
        closing = weight.clamp(min=0) * self._norm(gating, preact.relu())
        return closing + weight.clamp(max=0) * self._norm(gating, preact * (preact.detach() > threshold))

    def _check_reachable(self, target: float) -> None:
        table = self._macs()
        floor = table.spent(torch.zeros(1, sum(table.widths), dtype=torch.bool)).item()
        if target <= floor:
            raise ValueError(
                f'target_macs={target} cannot be reached: the layers without gates alone cost {floor:.3f} of the '
                f'dense MACs. Choose a larger target.'
            )

    def _macs(self) -> MacsTable:
        """MACs at the nominal image size: only ratios matter, and they hardly change with it."""
        if self._table is None:
            size = getattr(self.network, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
            self._table = MacsTable(self.network, (size[1], size[2]))
        return self._table


class DeepMoELoss(nn.Module):
    """Any criterion, with the terms of the gating network added: the one line for a hand-written training loop.

        criterion = DeepMoELoss(model, nn.CrossEntropyLoss())
        loss = criterion(model(images), targets)

    Each output remembers the forward pass that made it, so several forward passes may precede a backward pass. In
    eval mode, or without gradients, the plain criterion is returned.

    Args:
        model: the module that the loop calls: a DeepMoE network or a DDP or `torch.compile` wrapper around it.
        criterion: the loss L_b of the base network, from (output, target) to a scalar.

    Attributes:
        terms: `loss_gate`, `loss_embed` and `kept_experts` of the latest call, for logging, without gradient.

    Raises:
        ValueError: `model` holds no DeepMoE network.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        network = find_deepmoe(model)
        self.criterion = criterion
        self.terms: dict[str, Tensor] = {}
        self._gating_loss = GatingLoss(network)
        self._records = WeakTensorKeyDictionary()
        # A tuple keeps the network from becoming a child of its own loss.
        self._gating = (network.gating,)
        model.register_forward_hook(self._remember)

    def _remember(self, _model: nn.Module, _args: Any, output: Any) -> None:
        record = self._gating[0].take_record()
        if record is not None and isinstance(output, Tensor):
            self._records[output] = record

    def __getstate__(self) -> dict[str, Any]:
        # A copy (EMA and deepcopy of the model take this hook along) starts without the pending forward passes.
        return {**self.__dict__, '_records': WeakTensorKeyDictionary()}

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return J (scalar) for the model's output and the criterion's target.

        Raises:
            ValueError: the output needs gradients but was not made by this model's forward pass.
        """
        loss = self.criterion(output, target)
        record = self._records.get(output)
        if record is None:
            if output.requires_grad and self._gating[0].training and torch.is_grad_enabled():
                raise ValueError(
                    'This output was not returned by the model that DeepMoELoss was created with: pass it the module '
                    'that you call (the DDP or compiled one), and its output unchanged.'
                )
            return loss
        terms = self._gating_loss(record, target, self.criterion)
        self.terms = {name: value.detach() for name, value in terms.items()}
        return loss + sum(terms[name] for name in TERMS if name in terms)
