"""The VAE as a card likes it: channels-last, fused norms, and whole passes recorded as CUDA graphs, one for each shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millicent.engine.capture import GraphRecorder, Replays
from millicent.errors import MachineError
from millicent.model.config import VAEConfig
from millicent.model.vae import VAE, ChannelNorm, NormSiLU, SelfAttention

Norm = Callable[[Tensor, Tensor, bool], Tensor]
Attention = Literal["sdpa", "chunked"]

PASSES_KEPT = 8  # four shapes in two directions: a batch meets few, and each keeps its input and output on the card
CHUNK_ROWS = 4096  # of scores against 16384 pixels: 256 MiB in FP32


def speed_up(vae: VAE, *, kernel: bool = True, attention: Attention = "sdpa") -> None:
    """Turn a VAE, in place, into one that runs fast where it is; the weights and their names stay.

    kernel: each norm (and the SiLU after it) is one pass over memory: in Triton on a CUDA device, elsewhere by the reference.
    attention: of the middle blocks, one head of 384 channels over all latent pixels, too wide for flash attention and for
    cuDNN. "sdpa" is PyTorch's memory-efficient kernel, which takes it and keeps no scores; "chunked" is plain matrix products
    with the FP32 scores of 4096 rows at a time.
    Raises MachineError for a card without Triton.
    """
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs want a tensor before it
    device = next(vae.parameters()).device
    norm = _choose_norm(device) if kernel else None
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ChannelNorm) and norm is not None:
                setattr(parent, name, FusedNorm(child, norm))
            elif isinstance(child, SelfAttention):
                setattr(parent, name, FastSelfAttention(child, attention))
                if norm is not None:
                    getattr(parent, name).norm = FusedNorm(child.norm, norm)


def _choose_norm(device: torch.device) -> Norm:
    if device.type != "cuda":
        from millicent.kernels import channel_norm_reference

        return channel_norm_reference.channel_norm_silu
    try:
        from millicent.kernels import channel_norm
    except ModuleNotFoundError as error:
        raise MachineError(
            f"The VAE's fast kernel needs Triton, and {error.name} is not installed.",
            "Install torch's CUDA build, which brings Triton along, or draw without the kernel.",
        ) from error
    return channel_norm.channel_norm_silu


class FusedNorm(nn.Module):
    """ChannelNorm or NormSiLU in one pass over memory, FP32 inside."""

    def __init__(self, norm: ChannelNorm, function: Norm) -> None:
        super().__init__()
        self.gamma = norm.gamma
        self.silu = isinstance(norm, NormSiLU)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        # convolutions give channels-last already, and this then costs nothing
        return self.function(x.contiguous(memory_format=torch.channels_last), self.gamma, self.silu)


class FastSelfAttention(nn.Module):
    """SelfAttention with its kernel said rather than left to PyTorch, which may choose the one that keeps all scores."""

    def __init__(self, block: SelfAttention, attention: Attention) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = block.norm, block.to_qkv, block.proj
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        q, k, v = (t.contiguous() for t in qkv.chunk(3, -1))
        attend = chunked_attention if self.attention == "chunked" else _sdpa
        return x + self.proj(attend(q, k, v).transpose(1, 2).reshape(x.shape))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[:, None], k[:, None], v[:, None]
    if q.device.type != "cuda":  # the memory-efficient kernel is for cards
        return F.scaled_dot_product_attention(q, k, v)[:, 0]
    # by its own name, as in transformer.py
    attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    return attended[:, 0]


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, rows: int = CHUNK_ROWS) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, each (B, N, C), exact: scores stay in FP32, of `rows` rows at a time.

    The weights are rounded to v's dtype before they meet v, as in flash attention.
    """
    scale = q.shape[-1] ** -0.5
    out = torch.empty_like(q)
    for b in range(len(q)):
        for start in range(0, q.shape[1], rows):
            chunk = slice(start, start + rows)
            scores = _scores(q[b, chunk], k[b]).mul_(scale)
            torch.mm(scores.softmax(-1).to(v.dtype), v[b], out=out[b, chunk])
    return out


def _scores(q: Tensor, k: Tensor) -> Tensor:
    if q.device.type == "cuda" and q.dtype != torch.float32:
        return torch.mm(q, k.T, out_dtype=torch.float32)  # the sums are FP32 inside: take them before they are rounded
    return torch.mm(q.float(), k.float().T)


class CapturedVAE:
    """A VAE on a CUDA device whose passes are replayed from CUDA graphs from the second time on that a shape comes.

    Call it from one thread, on one stream. graphs: False runs every pass as it is.
    """

    def __init__(self, vae: VAE, *, graphs: bool = True) -> None:
        self.vae = vae
        self._replays: Replays | None = None
        self._recorder: GraphRecorder | None = None
        self.record(graphs)

    @property
    def config(self) -> VAEConfig:
        return self.vae.config

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """As VAE.encode: (B, 3, H, W) -> (B, 16, H/8, W/8)."""
        return self._run("encode", self.vae.encode, pixels)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """As VAE.decode: (B, 16, h, w) -> (B, 3, 8 h, 8 w)."""
        return self._run("decode", self.vae.decode, latents)

    def record(self, records: bool) -> None:
        """Whether passes are recorded from now on."""
        self._replays = None
        if records:
            self._recorder = self._recorder or GraphRecorder(next(self.vae.parameters()).device)
            self._recorder.open_pool()
            self._replays = Replays(self._recorder.record, PASSES_KEPT)

    def clear(self) -> None:
        """Forget all recordings: their memory is needed."""
        self.record(self._replays is not None)

    def _run(self, direction: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._replays is None:
            return function(x)
        return self._replays.run(direction, lambda fed: (function(fed),), x)[0]
