"""The one way to the terms that a network adds to the loss: any framework asks `gating_terms` after a forward pass.

A network that has such terms is a `TermSource`. Each training forward pass leaves a record of what its terms are
computed from. The record belongs to the autograd graph of the pass, not to the network: it ends with that graph, or
with the backward pass through it. So a pass whose terms nobody takes costs no memory, copies of the network start
without records, and a loss finds the records of the passes that led to it.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tracing import is_transformed

Criterion = Callable[[Any, Any], Tensor]
Terms = dict[str, Tensor]


class _Record:
    """What one pass left, and a tensor of its graph for passes whose graph cannot hold the record."""

    def __init__(self, content: Any = None, root: Tensor | None = None) -> None:
        self.content = content
        self.root = root


class _Carry(torch.autograd.Function):
    """The identity; its node in the autograd graph holds the record of the pass until the backward pass reaches it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: _Record) -> Tensor:
        ctx.record = record
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        ctx.record = None
        return grads[0], None


class Passes:
    """The training forward passes of one network whose terms nobody has taken yet.

    The graph of a pass holds its record, and this object only refers to it. `torch.compile` cannot trace that: there
    the latest four passes are held here. Passes without a graph (frozen gating) hold little, the latest eight stay.
    """

    def __init__(self) -> None:
        self._nodes: list[weakref.ref[Any]] = []
        self._without_graph: deque[Any] = deque(maxlen=8)
        # The compiler starts anew when a list has another length or two attributes become one object. So these are
        # four objects of one type at any time, some of them empty.
        self._compiled_1, self._compiled_2 = _Record(), _Record()
        self._compiled_3, self._compiled_4 = _Record(), _Record()

    def __reduce__(self) -> tuple[Any, ...]:
        return Passes, ()  # copies and pickles start without passes: the graphs belong to the original

    def wanted(self, x: Tensor) -> bool:
        """Whether a training pass on `x` should leave a record: not without gradients, in a tracer or a transform."""
        return torch.is_grad_enabled() and not is_transformed(x)

    def leave(self, content: Any, x: Tensor) -> Tensor:
        """Remember a training pass of the network, if it is `wanted`.

        Args:
            content: what the terms are computed from; its graph must not lead through the result.
            x: a tensor of the pass, which the output of the network is computed from.

        Returns:
            `x`, to be used in its place.
        """
        if torch.compiler.is_compiling():
            self._compiled_4, self._compiled_3 = self._compiled_3, self._compiled_2
            self._compiled_2, self._compiled_1 = self._compiled_1, _Record(content, x)
        elif x.requires_grad:
            x = _Carry.apply(x, _Record(content))
            self._nodes = [ref for ref in self._nodes if ref() is not None]
            self._nodes.append(weakref.ref(x.grad_fn))
        else:
            self._without_graph.append(content)
        return x

    def take(self, loss: Any = None) -> list[Any]:
        """Hand over what passes left, the oldest first, each at most once.

        Args:
            loss: takes only the passes that led to it: a tensor, or tensors in lists and dictionaries.
        """
        found: dict[Any, Any] = {}
        for record in (self._compiled_4, self._compiled_3, self._compiled_2, self._compiled_1):
            if record.root is not None and record.root.grad_fn is None:
                self._without_graph.append(record.content)
            elif record.root is not None:
                found.setdefault(record.root.grad_fn, []).append(record)
        for ref in self._nodes:
            node = ref()
            if node is not None and node.record is not None:
                found[node] = [node.record]
        reached = found if loss is None else _reached(_tensors(loss), set(found))
        taken = [record for node, records in found.items() if node in reached for record in records]
        self._nodes = [ref for ref in self._nodes if ref() in found and ref() not in reached]
        rest = [record for node, records in found.items() if node not in reached for record in records]
        left = [record for record in rest if record.root is not None]
        slots = [_Record() for _ in range(4 - len(left))] + left
        self._compiled_4, self._compiled_3, self._compiled_2, self._compiled_1 = slots
        without_graph = list(self._without_graph)
        self._without_graph.clear()
        return without_graph + [record.content for record in taken]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _reached(tensors: Iterable[Tensor], wanted: set[Any]) -> set[Any]:
    """Those of the wanted nodes that the graphs of the tensors lead to; the search ends once all are found."""
    reached: set[Any] = set()
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set(stack)
    while stack and len(reached) < len(wanted):
        node = stack.pop()
        if node in wanted:
            reached.add(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return reached


class TermSource(nn.Module):
    """Mixin of networks whose training forward passes leave terms of the loss.

    A network calls `passes.leave` in its forward pass and computes in `terms` what one pass adds to the loss.
    """

    @property
    def passes(self) -> Passes:
        """What the forward passes left."""
        raise NotImplementedError

    @property
    def expects_terms(self) -> bool:
        """Whether a forward pass in the present mode would leave terms that training must not miss."""
        return self.training

    def check_terms(self) -> None:
        """Refuse settings that cannot work; callers ask before the first step.

        Raises:
            ValueError: names the setting and the remedy.
        """

    def finish_training(self) -> None:
        """Look back at the end of training, and warn of what made it useless; hosts' hooks call this."""

    def terms(self, record: Any, target: Any, criterion: Criterion | None) -> Terms:
        """Compute the terms of one pass; those whose name contains 'loss' are weighted and belong to the loss.

        Args:
            record: what the pass left.
            target, criterion: see `gating_terms`.
        """
        raise NotImplementedError

    def take_terms(self, target: Any = None, criterion: Criterion | None = None, loss: Any = None) -> Terms:
        """The mean terms of the passes since they were last taken, each pass at most once; see `gating_terms`."""
        found = [self.terms(record, target, criterion) for record in self.passes.take(loss)]
        return {name: torch.stack(values).mean(0) for name, values in _by_name(found).items()}

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f'torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace(model.eval(), images) or '
            f'torch.export.export(model.eval(), (images,)), and torch.compile for training (--torchcompile of timm).'
        )


def _by_name(found: list[Terms]) -> dict[str, list[Tensor]]:
    names = dict.fromkeys(name for terms in found for name in terms)
    return {name: [terms[name] for terms in found if name in terms] for name in names}


def term_sources(model: nn.Module) -> list[TermSource]:
    """All networks inside a module that have terms, through any wrapper (DDP, torch.compile, a detector, ...)."""
    return [module for module in model.modules() if isinstance(module, TermSource)]


@torch.compiler.disable
def gating_terms(
    model: nn.Module, target: Any = None, criterion: Criterion | None = None, loss: Any = None
) -> dict[str, Tensor]:
    """Take the terms of the training forward passes that just ran.

        terms = deepmoe_plugin.gating_terms(model)
        loss = loss + sum(value for name, value in terms.items() if 'loss' in name)

    A network that ran several times (a siamese network, several crops) gives the mean over its passes; several
    networks add up. Each pass gives its terms once.

    Args:
        model: holds networks of this package, in any wrapper.
        target: what `criterion` takes; needed with `embed_loss_weight` only.
        criterion: from (logits, target) to a scalar, for the classifier on the embedding.
        loss: the loss before the terms are added, or several in a list or dictionary: takes only the terms of the
            passes that led to it. By default all passes since the last call.

    Returns:
        Scalars. Those whose name contains 'loss' (`loss_gate`, `loss_embed`) are weighted, to be added to the loss;
        others (`kept_experts`, the fraction of experts kept) have no gradient and are for the log. Empty if `model`
        holds no such network, in eval mode and without gradients.

    Raises:
        ValueError: the model trains, but none of its forward passes left terms that could be taken.
    """
    if not torch.is_grad_enabled():
        return {}
    sources = term_sources(model)
    found = _by_name([source.take_terms(target, criterion, loss) for source in sources])
    result = {}
    for name, values in found.items():
        result[name] = torch.stack(values).sum(0) if 'loss' in name else torch.stack(values).mean(0)
    if not result and any(source.expects_terms for source in sources):
        raise ValueError(
            f'No training forward pass of this {type(model).__name__} led to the loss and still has its terms: pass '
            f'the module that computed the loss, ask once after each forward pass and before its backward pass, and '
            f'checkpoint the activations of blocks (set_grad_checkpointing, with_cp=True in mmseg), not of the network.'
        )
    return result
