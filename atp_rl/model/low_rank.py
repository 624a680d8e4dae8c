"""Algebra of LoRA updates dW = up @ down, on the factors alone: no matrix of a layer's full size is ever formed.

All adapters here share their scaling (they come from one configuration), so it is left out. Everything is computed in
double precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_rl.types import InputError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""How the names of the two factors end in `Policy.state`."""

ILL_CONDITIONED = 1e3
"""Above this condition number a change of basis would blow up rounding; the factors are then balanced instead."""

NOTHING = 1e-10
"""Singular values below this share of the largest one are rounding."""


class Factors(NamedTuple):
    """A matrix `up @ down`."""

    down: Tensor
    """[r, in]"""
    up: Tensor
    """[out, r]"""

    def to(self, device: torch.device) -> Factors:
        return Factors(self.down.to(device), self.up.to(device))


def factors(state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The updates of a `Policy.state` by the name of their module, in the state's order; not copied.

    Raises:
        InputError: the adapter holds anything that is not the two factors of a linear layer.
    """
    modules = [key.removesuffix(DOWN) for key in state if key.endswith(DOWN)]
    known = {f"{module}{end}" for module in modules for end in (DOWN, UP)}
    odd = sorted((state.keys() ^ known) | {key for key in known & state.keys() if state[key].dim() != 2})
    if odd:
        raise InputError(f"the adapter is more than LoRA on linear layers ({odd[0]}); merging and projecting need that")
    return {module: Factors(state[f"{module}{DOWN}"], state[f"{module}{UP}"]) for module in modules}


def as_state(updates: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The reverse of `factors`."""
    return {f"{name}{end}": t for name, update in updates.items() for end, t in zip((DOWN, UP), update, strict=True)}


def combination(*terms: tuple[float, Factors]) -> Factors:
    """The weighted sum of updates, exactly: their factors side by side, so the rank adds up."""
    return Factors(
        torch.cat([update.down for _, update in terms]),
        torch.cat([weight * update.up for weight, update in terms], dim=1),
    )


def inner(a: Factors, b: Factors) -> float:
    """<A, B> = sum of the products of their entries: that of flattened matrices."""
    ups = a.up.double().T @ b.up.double()
    downs = a.down.double() @ b.down.double().T
    return float((ups * downs).sum())


def norm(update: Factors) -> float:
    """Frobenius norm. By way of singular values: a difference of two near updates cancels in `inner`."""
    return float(_svd(update)[1].norm())


def truncated(update: Factors, rank: int, *, like: Factors) -> tuple[Factors, float]:
    """The best approximation of that rank, and its error as a share of the update's norm (Frobenius).

    Of the many factors of one product those are taken that lie near `like`: `up` is `like.up` projected on the columns
    of the product. Where that is ill-conditioned they are balanced, up = U sqrt(S).

    Args:
        like: factors of that rank, whose types are taken over.
    """
    u, s, v = _svd(update)
    kept = min(rank, len(s))
    error = float(s[kept:].norm() / s.norm()) if s.any() else 0.0
    u, s, v = u[:, :kept], s[:kept], v[:kept]
    basis = u.T @ like.up.double()  # [kept, rank]
    if kept == rank and float(torch.linalg.cond(basis)) < ILL_CONDITIONED:
        up, down = u @ basis, torch.linalg.solve(basis, s.unsqueeze(1) * v)
    else:
        root = s.sqrt()
        up, down = torch.zeros_like(like.up, dtype=torch.double), torch.zeros_like(like.down, dtype=torch.double)
        up[:, :kept], down[:kept] = u * root, root.unsqueeze(1) * v
    return Factors(down.to(like.down.dtype), up.to(like.up.dtype)), error


def column_space(update: Factors) -> Tensor:
    """Orthonormal basis Q [out, k] of what the update can write; k = 0 for the zero update."""
    u, s, _ = _svd(update)
    return u[:, s > NOTHING * s[0]] if s.any() else u[:, :0]


def projected(update: Factors, basis: Tensor) -> Factors:
    """Q Q^T (up @ down): the part that writes into the span of `basis`; `down` stays what it is."""
    up = basis @ (basis.T @ update.up.double())
    return Factors(update.down, up.to(update.up.dtype))


def share_within(update: Factors, basis: Tensor) -> float:
    """Cosine of an update to its projection on the span of `basis`, which is |Q Q^T dW| / |dW|; 1 for no update.

    The criterion of Safe LoRA and SafeMERGE (arXiv 2405.16833, 2503.17239), with an exact projection.
    """
    whole = norm(update)
    within = Factors(update.down.double(), basis.T @ update.up.double())
    return norm(within) / whole if whole else 1.0


def depths(modules: Sequence[str]) -> list[float]:
    """Of each module, where its layer is between the first (0) and the last one (1); modules of no layer are last.

    A layer's number is the first number in the module's name. With a single layer everything is at 0.
    """
    numbers = [next((int(part) for part in module.split(".") if part.isdigit()), None) for module in modules]
    last = max((number for number in numbers if number is not None), default=0)
    return [1.0 if number is None else number / last if last else 0.0 for number in numbers]


def _svd(update: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k], V^T [k, in] of the product, by way of QR of both factors."""
    left, right = torch.linalg.qr(update.up.double()), torch.linalg.qr(update.down.double().T)
    u, s, v = torch.linalg.svd(left[1] @ right[1].T, full_matrices=False)
    return left[0] @ u, s, v @ right[0].T
