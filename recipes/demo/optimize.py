"""Optimization in BF16 with FP32 masters: Muon for the matrices inside blocks, AdamW for everything else.

Muon (Jordan, 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found with five Newton-Schulz
iterations. Matrices of one shape are stepped as one batch, since at this size the launches would cost more than the
arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_MOMENTUM = 0.95
MAX_GRAD_NORM = 1.0
MAX_SKIPPED = 50
MAX_SKIPPED_SHARE = 0.02


def cosine(step: int, progress: float, warmup: int, floor: float = 0.02) -> float:
    """The factor on every learning rate: a linear warm-up over steps, then half a cosine of progress down to `floor`."""
    down = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / warmup) * down


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) -> about the nearest orthogonal ones, in BF16 on a GPU."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.transpose(1, 2)


def captured(step: Callable[[], Tensor], weights: MasterWeights, generator: torch.Generator) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: at this size launching the kernels takes far longer than running them.

    The returned function replays the step and returns a copy of its loss. `generator` is the one that `step` draws
    from. Warming up takes three real steps, with the learning rates that `weights.prepare` last set.
    """
    if generator.device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()

    weights.steps += 2
    return replay


class MasterWeights:
    """The FP32 truth of a module's parameters, their optimizer and their running average.

    The module itself holds the same values in its compute dtype. Matrices whose name starts with one of
    `muon_prefixes` go to Muon, the rest to AdamW.
    """

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        muon_prefixes: tuple[str, ...] = (),
        muon_lr: float = 0.02,
        adam_lr: float = 1.5e-3,
        betas: tuple[float, float] = (0.9, 0.96),
        ema_decay: float = 0.999,
    ) -> None:
        self.names = list(named)
        self.params: list[Tensor] = list(named.values())
        self.masters = [p.detach().float().clone() for p in self.params]
        self.ema = [m.clone() for m in self.masters]
        self.ema_decay, self.muon_lr, self.adam_lr, self.steps = ema_decay, muon_lr, adam_lr, 0
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        others = []
        for i, name in enumerate(self.names):
            is_matrix = self.masters[i].ndim == 2 and name.startswith(muon_prefixes) if muon_prefixes else False
            if is_matrix:
                groups[self.masters[i].shape].append(i)
            else:
                others.append(i)
        self.muon_groups = list(groups.values())
        self.momenta = [torch.stack([torch.zeros_like(self.masters[i]) for i in g]) for g in self.muon_groups]
        self.adam_params = [self.masters[i] for i in others]
        self.adam_indices = others
        device, on_gpu = self.masters[0].device, self.masters[0].is_cuda
        # what changes from step to step lives on the device, so that a captured step can be replayed
        self.rate, self.ema_step, rate = (torch.zeros((), device=device) for _ in range(3))
        self.skipped = torch.zeros((), device=device, dtype=torch.int64)  # steps whose gradient was not finite
        self.adam = torch.optim.AdamW(
            self.adam_params, lr=rate, betas=betas, weight_decay=0.0, fused=on_gpu, foreach=False, capturable=on_gpu
        )

    def prepare(self, lr_factor: float) -> None:
        """Set the next step's learning rates and the weight of its result in the running average."""
        self.steps += 1
        self.rate.fill_(lr_factor)
        self.ema_step.fill_(1 - min(self.ema_decay, (1 + self.steps) / (20 + self.steps)))

    @torch.no_grad()
    def step(self) -> None:
        """One step from the parameters' gradients, which are cleared; `prepare` must have been called."""
        # the last block's text stream ends nowhere, so its parameters get no gradient
        grads = [torch.zeros_like(m) if p.grad is None else p.grad.float() for p, m in zip(self.params, self.masters, strict=True)]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        finite = norm.isfinite()
        self.skipped += ~finite
        for grad in grads:  # one bad batch must cost one step, not the run
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, torch.where(finite, MAX_GRAD_NORM / (norm + 1e-6), 0.0).clamp(max=1.0))
        for i, master in zip(self.adam_indices, self.adam_params, strict=True):
            master.grad = grads[i]
        rate = self.rate * finite
        for group in self.adam.param_groups:
            group["lr"].copy_(rate * self.adam_lr)
        self.adam.step()
        for indices, momentum in zip(self.muon_groups, self.momenta, strict=True):
            grad = torch.stack([grads[i] for i in indices])
            momentum.mul_(MUON_MOMENTUM).add_(grad)
            update = orthogonalize(grad + MUON_MOMENTUM * momentum).float()  # as long without a gradient as with one
            update *= rate * (self.muon_lr * max(1.0, grad.shape[1] / grad.shape[2]) ** 0.5)
            torch._foreach_sub_([self.masters[i] for i in indices], list(update.unbind(0)))
        torch._foreach_copy_(self.params, self.masters)
        change = torch._foreach_sub(self.masters, self.ema)
        torch._foreach_mul_(change, self.ema_step)
        torch._foreach_add_(self.ema, change)
        for p in self.params:
            p.grad = None

    def lost(self) -> bool:
        """Whether so many steps were skipped that going on would only cost time; what was reached is still good."""
        return int(self.skipped) > max(MAX_SKIPPED, MAX_SKIPPED_SHARE * self.steps)

    def averaged(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.ema, strict=True))

    @torch.no_grad()
    def use_averaged(self) -> None:
        """Put the running average into the module."""
        torch._foreach_copy_(self.params, self.ema)

    def state(self) -> dict[str, object]:
        return {
            "masters": self.masters,
            "ema": self.ema,
            "momenta": self.momenta,
            "adam": self.adam.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def resume(self, state: dict[str, object]) -> None:
        for mine, theirs in ((self.masters, state["masters"]), (self.ema, state["ema"]), (self.momenta, state["momenta"])):
            for a, b in zip(mine, theirs, strict=True):  # type: ignore[call-overload]
                a.copy_(b)
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        torch._foreach_copy_(self.params, self.masters)
