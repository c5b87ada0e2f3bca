"""The VAE as a card likes it: channels-last, fused norms, and whole passes recorded as CUDA graphs, one for each shape."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from millicent.errors import MachineError
from millicent.model.config import VAEConfig
from millicent.model.vae import VAE, ChannelNorm, NormSiLU, SelfAttention

Norm = Callable[[Tensor, Tensor, bool], Tensor]
Pass = Callable[[Tensor], Tensor]
Attention = Literal["sdpa", "chunked"]

SHAPES_KEPT = 4  # of each direction: a batch meets few shapes, and each keeps its input and output on the card
WARM_UPS = 2  # the first compiles kernels and chooses algorithms, the second finds all of that done
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
    if q.device.type != "cuda":  # the memory-efficient kernel is for cards
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


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


@dataclass(frozen=True, slots=True)
class Captured:
    """One recorded pass: what it reads from and what it leaves its result in."""

    graph: torch.cuda.CUDAGraph
    fed: Tensor
    drawn: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        self.fed.copy_(x)
        self.graph.replay()
        return self.drawn.clone()


Record = Callable[[Pass, Tensor], Pass]


class PassesByShape:
    """One direction of the VAE: a recorded pass for each shape and dtype, the least recently used forgotten first."""

    def __init__(self, function: Pass, record: Record, kept: int = SHAPES_KEPT) -> None:
        self._function = function
        self._record = record
        self._kept = kept
        self._passes: OrderedDict[tuple[torch.Size, torch.dtype], Pass] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.dtype
        if key in self._passes:
            self._passes.move_to_end(key)
        else:
            if len(self._passes) == self._kept:  # before recording, so that its memory is taken again
                self._passes.popitem(last=False)
            self._passes[key] = self._record(self._function, x)
        return self._passes[key](x)


class CapturedVAE:
    """A VAE on a CUDA device whose passes are replayed from CUDA graphs, one for each shape, the last four of each direction.

    The first picture of a shape is drawn twice before it is recorded. All graphs share one pool of memory, which is sound
    since each leaves only a result that is copied out before another runs: call it from one thread, on one stream.
    graphs: False runs every pass as it is. tune: let cuDNN time its algorithms for each new shape; what wins, and with it the
    last bits, may differ between runs.
    """

    def __init__(self, vae: VAE, *, graphs: bool = True, tune: bool = False) -> None:
        self.vae = vae
        self.encode_pass: Pass = vae.encode
        self.decode_pass: Pass = vae.decode
        if graphs:
            recorder = Recorder(next(vae.parameters()).device, tune)
            self.encode_pass = PassesByShape(vae.encode, recorder.record)
            self.decode_pass = PassesByShape(vae.decode, recorder.record)

    @property
    def config(self) -> VAEConfig:
        return self.vae.config

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """As VAE.encode: (B, 3, H, W) -> (B, 16, H/8, W/8). Raises MachineError where a new shape does not fit into memory."""
        return self.encode_pass(pixels)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """As VAE.decode: (B, 16, h, w) -> (B, 3, 8 h, 8 w). Raises MachineError where a new shape does not fit into memory."""
        return self.decode_pass(latents)


class Recorder:
    """Records passes on one CUDA device, on a stream of its own, into one pool of memory."""

    def __init__(self, device: torch.device, tune: bool) -> None:
        assert device.type == "cuda"
        self._tune = tune
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # warmed up where it is recorded, or cuBLAS's workspace would be in the pool

    def record(self, function: Pass, example: Tensor) -> Captured:
        """Raises MachineError, with all undone, where it does not fit into memory."""
        tuned, outside = torch.backends.cudnn.benchmark, torch.cuda.current_stream(self._device)
        torch.backends.cudnn.benchmark = self._tune
        try:
            with torch.cuda.device(self._device):
                return self._record(function, example.clone())
        except RuntimeError as error:
            torch.cuda.set_stream(outside)  # a recording that cannot even be ended leaves its own behind
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # or the error would hold every tensor of the pass
            torch.cuda.empty_cache()
            raise MachineError(
                f"The card's memory is too small for the VAE at shape {tuple(example.shape)}, beside what else is in it.",
                "Draw smaller pictures, or give the transformer fewer bits.",
            ) from error
        finally:
            torch.backends.cudnn.benchmark = tuned

    def _record(self, function: Pass, fed: Tensor) -> Captured:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function(fed)
        self._stream.synchronize()
        torch.cuda.empty_cache()  # what the warm-up left is of no use to the recording, which allocates in its pool
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the card meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            drawn = function(fed)
        torch.cuda.current_stream().wait_stream(self._stream)
        return Captured(graph, fed, drawn)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it came up while handling, is: ending a recording that has failed raises an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
