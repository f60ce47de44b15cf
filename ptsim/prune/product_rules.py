"""The rules of products of activations with each other: matrix products, einsum, attention.

A product sums over the axes that its result does not have. Channels along such an axis are combined and stay; those
along the other axes pass, so that the values of an attention can be pruned while its queries and keys stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptsim.prune.function_rules import meet
from ptsim.prune.labels import Facets, Label
from ptsim.prune.rules import Call, rule

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@rule("matmul bmm mm")
def matrix_product(call: Call) -> Label:
    """(…, rows, inner) by (…, inner, columns)."""
    ranks = [source.meta["value"].ndim for source in call.sources]
    if min(ranks) < 2 or len(ranks) != 2:
        call.refuse(f"{call.op} mixes channels in a way that has no rule")
    batch = _LETTERS[: max(ranks) - 2]
    terms = [batch[len(batch) + 2 - rank :] + last for rank, last in zip(ranks, ("xy", "yz"), strict=True)]
    return _product(call, terms, batch + "xz")


@rule("einsum")
def einsum(call: Call) -> Label:
    """As the equation says."""
    equation = call.source(0, "equation")
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    operands = terms.split(",")
    if not isinstance(equation, str) or "." in terms or len(operands) != len(call.sources):
        call.refuse(f"{call.op} mixes channels in a way that has no rule")
    if not arrow:
        result = "".join(sorted(letter for letter in set(terms) - {","} if terms.count(letter) == 1))
    return _product(call, operands, result)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Label:
    """Queries and keys are multiplied over all their channels and stay; the values' channels pass."""
    query, key, value = (call.source(place, name) for place, name in enumerate(("query", "key", "value")))
    for part in (query, key, call.source(3, "attn_mask")):
        label = call.label_of(part)
        if isinstance(label, Tensor):
            call.state.freeze(label, f"{call.op} combines these channels, so that removing one would change the others")
    label = call.label_of(value)
    shape = list(value.meta["value"].shape)
    if not isinstance(label, Tensor) or list(call.value.shape[:-2]) != shape[:-2]:
        call.refuse(f"{call.op} mixes channels in a way that has no rule")
    weights = torch.empty((*shape[:-2], call.value.shape[-2], 1), device="meta")
    stays = call.state.stays(weights, f"{call.op} weighs with queries and keys")
    return _passed(call, [stays, _summed(call, label, [-2])], [weights, value.meta["value"][..., :1, :]])


def _product(call: Call, terms: Sequence[str], result: str) -> Label:
    """The product of activations whose axes are named by letters."""
    labels: list[Tensor] = []
    if any(isinstance(label, Facets) for label in call.labels):
        call.refuse(f"{call.op} multiplies with a parameter that no layer holds")
    for label, term in zip(call.labels, terms, strict=True):
        if not isinstance(label, Tensor) or len(set(term)) < len(term) or len(term) != label.ndim:
            call.refuse(f"{call.op} mixes channels in a way that has no rule")
        labels.append(_summed(call, label, [dim for dim, letter in enumerate(term) if letter not in result]))
    for a, b in itertools.combinations(range(len(terms)), 2):  # of an outer product the narrower side stays
        if _varies(labels[a], terms[a], terms[b]) and _varies(labels[b], terms[b], terms[a]):
            place = a if labels[a].numel() <= labels[b].numel() else b
            reason = f"{call.op} multiplies every one of these channels with every one of others"
            labels[place] = call.state.opaque(labels[place], labels[place], reason)
    values: list[Any] = []
    aligned: list[Tensor] = []
    for source, label, term in zip(call.sources, labels, terms, strict=True):
        kept = [letter for letter in result if letter in term]
        sizes = dict(zip(term, source.meta["value"].shape, strict=True))
        values.append(torch.empty([sizes.get(letter, 1) for letter in result], device="meta"))
        lengths = dict(zip(term, label.shape, strict=True))
        order = [term.index(letter) for letter in kept] + [d for d, letter in enumerate(term) if letter not in kept]
        aligned.append(label.permute(order).reshape([lengths.get(letter, 1) for letter in result]))
    return _passed(call, aligned, values)


def _varies(label: Tensor, term: str, other: str) -> bool:
    """True if channels lie along an axis that the other operand does not have."""
    return any(length > 1 and letter not in other for letter, length in zip(term, label.shape, strict=True))


def _summed(call: Call, label: Tensor, dims: Sequence[int]) -> Tensor:
    """The label of an operand that is summed up along `dims`: channels along one of them are combined and stay."""
    if all(label.shape[dim] == 1 for dim in dims):
        return label
    return call.state.opaque(
        label, label, f"{call.op} combines these channels, so that removing one would change the others"
    )


def _passed(call: Call, labels: Sequence[Tensor], values: Sequence[Any]) -> Label:
    """Operands broadcast against each other over the axes of the result.

    In a smaller network one channel of every head may be left: what stays whole then says nothing about the heads.
    """
    operands = list(zip(labels, values, strict=True))
    if call.state.seed is not None:
        telling = [(label, value) for label, value in operands if label.numel() != 1 or bool((label >= 0).any())]
        operands = telling or operands
    return meet(call, [(label, value) for label, value in operands], call.value)
