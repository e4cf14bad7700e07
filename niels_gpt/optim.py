"""Optimizers: AdamW alone, or Muon for block matrices with AdamW for everything else.

Muon is Keller Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"): momentum whose update is
replaced by the nearest (semi-)orthogonal matrix. Fused q/k/v rows are orthogonalised apart, and matrices of one shape
are orthogonalised in one batched product. A schedule gives one number, AdamW's rate: Muon's peak is scaled by the same
factor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niels_gpt.model.gpt import GPT
from niels_gpt.settings import PhaseSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al.: slope-maximal at 0, settles near 1
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(G: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U V^T of each G = U S V^T in a batch (N, rows, cols); singular values end in about [0.7, 1.2]."""
    a, b, c = NEWTON_SCHULZ
    X = G.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if _gram_is_cheaper(X):
        X = _newton_schulz_of_gram(X)
    else:
        for _ in range(NEWTON_SCHULZ_STEPS):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def _gram_is_cheaper(X: Tensor) -> bool:
    """Twice as wide as high, in full float32: with less, what rounding adds to the products grows twelvefold a step."""
    exact = X.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return exact and X.shape[-1] >= 2 * X.shape[-2]


def _newton_schulz_of_gram(X: Tensor) -> Tensor:
    """The same polynomial of wide X, from square products alone: 2/3 of the arithmetic at 1:3.

    Each step multiplies X by P = a I + b A + c A^2 with A = X X^T, which becomes P A P; so the P are gathered in Q.
    """
    a, b, c = NEWTON_SCHULZ
    A = X @ X.mT
    Q: Tensor | None = None
    for step in range(NEWTON_SCHULZ_STEPS):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        if step < NEWTON_SCHULZ_STEPS - 1:
            A = P @ A @ P
    assert Q is not None
    return Q @ X


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (FSDP) gathered from all processes; any other as it is."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def sharded_like(p: Tensor, tensor: Tensor) -> Tensor:
    """Of a `tensor` that all processes hold, this one's share, laid out as `p`; all of it if p is not sharded."""
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor  # not in every build of PyTorch

    assert isinstance(p, DTensor)
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, orthogonalised per matrix; step size lr * sqrt(max(1, rows / cols)).

    params: 2-D parameters, each optionally with an attribute `muon_parts` (how many stacked matrices its rows hold).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        ns_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ns_dtype = ns_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not called."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            ortho: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = whole(p.grad.lerp(buffer, group["momentum"]))  # Nesterov
                for matrix in update.chunk(getattr(p, "muon_parts", 1)):
                    by_shape[matrix.shape[0], matrix.shape[1]].append((p, matrix))
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            for entries in by_shape.values():
                found = orthogonalize(torch.stack([m for _, m in entries]), dtype=self.ns_dtype)
                for (p, _), matrix in zip(entries, found, strict=True):
                    ortho[p].append(matrix)
            for p, parts in ortho.items():
                rows, cols = parts[0].shape
                size = group["lr"] * max(1.0, rows / cols) ** 0.5
                p.add_(sharded_like(p, torch.cat(parts) if len(parts) > 1 else parts[0]), alpha=-size)


class OptimizerGroup:
    """Several optimizers behind the face of one: step, zero_grad, param_groups, state_dict."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.optimizers = dict(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in their order."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state was saved by other optimizers."""
        if set(state) != set(self.optimizers):
            raise ValueError(f"optimizer state holds {sorted(state)}, this run uses {sorted(self.optimizers)}")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


Optimizer = torch.optim.Optimizer | OptimizerGroup


def build_optimizer(model: GPT, options: PhaseSettings, *, ns_dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimizer a phase asks for; `ns_dtype` is what Newton-Schulz multiplies in (bf16 where it is native)."""
    if options.optimizer == "adamw":
        return _adamw(list(model.named_parameters()), options)
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = {id(p) for _, p in matrices}
    for name, p in matrices:
        p.muon_parts = 3 if name.endswith("attn.qkv.weight") else 1  # type: ignore[attr-defined]
    muon = Muon(
        [p for _, p in matrices],
        lr=options.muon_lr,
        momentum=options.muon_momentum,
        weight_decay=options.muon_weight_decay,
        ns_dtype=ns_dtype,
    )
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in chosen]
    return OptimizerGroup({"muon": muon, "adamw": _adamw(rest, options)})


def _adamw(named: list[tuple[str, nn.Parameter]], options: PhaseSettings) -> torch.optim.AdamW:
    """One group, or two when norms and biases (1-D) or the embedding are spared the weight decay."""

    def decays(name: str, p: nn.Parameter) -> bool:
        if p.ndim < 2:
            return options.decay_norm_and_bias
        return options.decay_embeddings or not name.startswith("tok_emb")

    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": options.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.base_lr,
        betas=options.betas,
        eps=options.eps,
        fused=named[0][1].device.type != "mps",
    )


def set_learning_rate(optimizer: Optimizer, lr: float, options: PhaseSettings) -> None:
    """Give AdamW `lr`, and Muon its own peak scaled by the same factor."""
    if not isinstance(optimizer, OptimizerGroup):
        for group in optimizer.param_groups:
            group["lr"] = lr
        return
    for name, part in optimizer.optimizers.items():
        for group in part.param_groups:
            group["lr"] = lr if name == "adamw" else options.muon_lr * lr / options.base_lr
