"""Cross-entropy in chunks of tokens: never all logits of a batch at once, and none where nothing is trained.

With a vocabulary of 49,152, fp32 logits and their gradient are 400 KB a token, the largest thing in a step of a small
model. The gradient of a chunk's hidden states is taken while its logits are at hand, so what stays of a chunk is as
wide as the model. Where the head is trained as well, a chunk's logits are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 << 20
"""Of fp32 logits held at once; with few tokens a chunk the products with the head get slower."""

Head = Callable[[Tensor], Tensor]
_plain: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@contextmanager
def without_head(model: Any) -> Iterator[Head]:
    """Inside, the model's logits are the hidden states that its head would get; yields that head."""
    module = model.get_output_embeddings()
    head, own = module.forward, vars(module).get("forward")
    module.forward = lambda hidden: hidden
    try:
        yield head
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def head_is_plain(model: Any) -> bool:
    """Whether logits are what the head makes of the hidden states, no more: some models cap them behind it.

    Found out by trying, once a model.
    """
    if model not in _plain:
        was_training = model.training
        model.eval()  # dropout would make two passes differ
        try:
            _plain[model] = _tried(model)
        finally:
            model.train(was_training)
    return _plain[model]


def _tried(model: Any) -> bool:
    module = model.get_output_embeddings()
    if module is None:
        return False
    ids = torch.arange(4, device=module.weight.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with without_head(model) as head:
            hidden = model(input_ids=ids).logits
        return bool(hidden.shape[-1] == module.weight.shape[-1] and torch.equal(head(hidden), expected))


def chunked_loss(model: Any, head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum over the tokens; hidden [tokens, width], targets [tokens]."""
    module = model.get_output_embeddings()
    tokens = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
    if not torch.is_grad_enabled():
        return _sum([_chunk_loss(head, h, t) for h, t in _chunks(hidden, targets, tokens)])
    if any(parameter.requires_grad for parameter in module.parameters()):
        chunks = _chunks(hidden, targets, tokens)
        return _sum([checkpoint(_chunk_loss, head, h, t, use_reentrant=False) for h, t in chunks])
    loss: Tensor = _ChunkedLoss.apply(hidden, targets, head, tokens)
    return loss


def _chunks(hidden: Tensor, targets: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(tokens), targets.split(tokens), strict=True)


def _chunk_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def _sum(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()


class _ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    """Keeps the gradient of `hidden`, nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, tokens: int) -> Tensor:
        gradients, losses = [], []
        for part, wanted in _chunks(hidden, targets, tokens):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = _chunk_loss(head, leaf, wanted)
            gradients += torch.autograd.grad(loss, leaf)
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return _sum(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None
