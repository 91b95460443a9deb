"""The DeepMoE objective `J = L_b + lambda * L_g + mu * L_e` (Eq. 7), and the one-liner for hand-written loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gating import GatingNetwork, GatingRecord
from .information import gate_entropy, use_entropy
from .macs import MacsTable
from .stats import dynamic_experts, fraction_kept
from .terms import Criterion, Terms, gating_terms, term_sources

Table = Callable[[], MacsTable]


def gating_loss(
    gating: GatingNetwork, record: GatingRecord, target: Any, criterion: Criterion | None, table: Table
) -> Terms:
    """Compute what one training forward pass adds to the loss, and let the budget look at it.

    Args:
        gating: holds the weights and `gate_norm`.
        record: what the pass left.
        target: what `criterion` takes; needed for `L_e` only.
        criterion: the loss of the base network, used for `L_e` as well, so that soft, smoothed and multi-label targets
            mean the same in both.
        table: gives the MACs of the network, where they are needed.

    Returns:
        Scalars `loss_gate`, `loss_embed`, `loss_importance` and `loss_similarity`, weighted (each only where it
        applies); and without gradient `kept_experts`, the fraction of experts kept, `dynamic_experts`, the fraction of
        experts that some images of the batch keep and others do not, and the entropies of the latent mixture in bits,
        `gate_entropy` of each image's and `use_entropy` of their mean.

    Raises:
        ValueError: `L_e` needs a target and a criterion; or see `MacsTable.check_target`.
    """
    terms: Terms = {}
    if not gating.frozen:
        gating.forget_budgets()
        if gating.gate_loss_weight > 0:
            terms['loss_gate'] = gating.gate_loss_weight * _norm(
                gating, gating.gates.cut(record.preact, threshold=gating.threshold), table
            )
        if record.embed_logits is not None:
            if target is None or criterion is None:
                raise ValueError('embed_loss_weight > 0 needs the target and the criterion of the base network.')
            terms['loss_embed'] = gating.embed_loss_weight * criterion(record.embed_logits, target)
        terms.update(gating.specialisation.terms(record.mixture, record.samples))
    terms['gate_entropy'] = gate_entropy(record.mixture.detach())
    terms['use_entropy'] = use_entropy(record.mixture.detach())
    kept = record.preact.detach() > gating.threshold
    terms['kept_experts'] = kept.float().mean()
    terms['dynamic_experts'] = dynamic_experts(kept)
    if gating.budget is not None and not gating.frozen:
        if gating.budget_on_macs:
            table().check_target(gating.budget.target)
        cost = table().spent if gating.budget_on_macs else fraction_kept
        gating.budget.step(gating.gates, record.preact.detach(), cost)
    return terms


def _norm(gating: GatingNetwork, gates: Tensor, table: Table) -> Tensor:
    """L_g of gates (B, N), Eq. 8: gates are not negative, so their sum is their L1 norm."""
    if gating.gate_norm == 'sum':
        return gates.sum(1).mean()
    if gating.gate_norm == 'mean':
        return gates.mean()
    return (gates * table().expert_costs(gates.device)).sum(1).mean()


class DeepMoELoss(nn.Module):
    """Any criterion, with the terms of the gating network added: the one line for a hand-written training loop.

        criterion = DeepMoELoss(model, nn.CrossEntropyLoss())
        loss = criterion(model(images), targets)

    The output may be anything that the criterion takes. The terms are those of the forward passes that made it, so
    several forward passes may precede a backward pass; where several made it, they are the mean over these. In eval
    mode, or without gradients, the plain criterion is returned.

    Args:
        model: holds networks of this package, in any wrapper.
        criterion: the loss L_b of the base network, from (output, target) to a scalar.
        embed_criterion: for `L_e`, from (logits, target) to a scalar; by default `criterion`, which then must take
            logits.

    Attributes:
        terms: `loss_gate`, `loss_embed` and `kept_experts` of the latest call, for logging, without gradient.

    Raises:
        ValueError: `model` holds no network with terms, or its settings cannot work.
    """

    def __init__(self, model: nn.Module, criterion: Criterion, embed_criterion: Criterion | None = None) -> None:
        super().__init__()
        sources = term_sources(model)
        if not sources:
            raise ValueError(f'Expected a DeepMoE network in {type(model).__name__}, found none.')
        for source in sources:
            source.check_terms()
        self.criterion = criterion
        self.embed_criterion = embed_criterion or criterion
        self.terms: Terms = {}
        self._model = (model,)  # a tuple keeps the network from becoming a child of its own loss

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return J (scalar) for the model's output and the criterion's target.

        Raises:
            ValueError: the model trains, but none of its forward passes made the output.
        """
        loss = self.criterion(output, target)
        if not (torch.is_grad_enabled() and loss.requires_grad):
            return loss
        terms = gating_terms(self._model[0], target, self.embed_criterion, loss)
        self.terms = {name: value.detach() for name, value in terms.items()}
        return loss + sum(value for name, value in terms.items() if 'loss' in name)
