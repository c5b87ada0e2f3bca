"""What a plan says each phase has alive, against what is alive: true sizes on the meta device, every storage counted from when it
is made until it is let go. No kernel runs there, so what kernels need beside their results is not in it.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_placement import QWEN, WORK, components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from millicent.engine import fast_vae, reading, transformer
from millicent.engine.transformer import FastMMDiT
from millicent.kernels import Rows
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.mmdit import MMDiT
from millicent.model.sizes import SYSTEM_TOKENS
from millicent.model.text_encoder import build_network
from millicent.model.vae import VAE

META = torch.device("meta")


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations within make, as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata)
        self.most_bytes = max(self.most_bytes, sum(self._sizes.values()))
        return made


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def test_what_is_let_go_is_not_counted() -> None:
    with Alive() as alive:
        kept = meta(1000)
        for _ in range(3):
            passing = meta(3000)
            view = passing[:10]
            del passing, view
        assert meta(500).shape == (500,)
    assert (kept.nbytes, alive.most_bytes) == (2000, 8000)


@pytest.mark.parametrize(("direction", "shape"), [("encode", (1, 3, 1024, 1024)), ("decode", (1, 16, 128, 128))])
@torch.inference_mode()
def test_the_vae(monkeypatch: pytest.MonkeyPatch, direction: str, shape: tuple[int, ...]) -> None:
    with META:
        vae = VAE(VAEConfig()).to(torch.bfloat16)
    fast_vae.speed_up(vae)
    # a card's convolutions give channels-last, of which its kernel makes no copy
    monkeypatch.setattr(fast_vae.FusedNorm, "forward", lambda _, x: torch.empty_like(x))
    with Alive() as alive:
        getattr(vae, direction)(meta(*shape))
    # the pictures themselves are 1% of it
    assert alive.most_bytes / dict(components().phases.named)[f"VAE {direction}"] == pytest.approx(1, abs=0.02)


@torch.inference_mode()
def test_reading() -> None:
    """The opening, which is the longest. Its widest moment is before the packing, which a plan has in the same sum."""
    network: Any = build_network(QWEN).to(torch.bfloat16)
    tokens = SYSTEM_TOKENS + WORK.text_tokens
    with Alive() as alive:
        embeds, positions = meta(1, tokens, 3584), meta(3, tokens, dtype=torch.long)
        reading._run_opening(network.language_model, SYSTEM_TOKENS, embeds, positions)
    assert 0.9 < alive.most_bytes / components().phases.text <= 1


class Coded(nn.Module):
    """A product of codes that makes nothing."""

    code, group = "fp8", 1

    def __init__(self, linears: Any) -> None:
        super().__init__()
        self.out_features = sum(linear.out_features for linear in linears)

    def matmul(self, values: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        assert out.shape == (len(values), self.out_features)
        return out


def code(x: Tensor, *_: Any) -> Rows:
    return Rows(torch.empty_like(x, dtype=torch.float8_e4m3fn), meta(len(x), 1, dtype=torch.float32))


class Making:
    """The kernels' results, uncomputed."""

    quantize_rows = norm_modulate = add_gated_norm_modulate = gelu_rows = staticmethod(code)
    qk_norm_rope = staticmethod(lambda *_: None)


class Streaming:
    stays = False

    def at(self, _number: int) -> Any:
        return nullcontext()


class Table:
    blocks, final = meta(1, 4, 3, 6, 3072), meta(1, 2, 3072)


def draw_plainly(*asked: Any) -> Rows:
    """The last kernel gives plain numbers."""
    return Rows(torch.empty_like(asked[0]), None) if asked[-1] == "bf16" else code(asked[0])


@pytest.mark.parametrize("passes", [1, 2, 3])
@torch.inference_mode()
def test_denoising(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """A step of pictures drawn together. A few blocks are as full as all of them; modulation is smaller by the others."""
    monkeypatch.setattr(transformer, "attend", lambda q, *_: meta(q.shape[0], q.shape[1] * q.shape[2]))
    with META:
        mmdit = MMDiT(MMDiTConfig(num_layers=4)).to(torch.bfloat16).eval()
    kernels: Any = Making()
    monkeypatch.setattr(Making, "add_gated_norm_modulate", staticmethod(lambda *asked: draw_plainly(*asked[:7])))
    maker: Any = lambda _name, linears: Coded(linears)  # noqa: E731
    network = FastMMDiT(mmdit, maker, attention="math", kernels=kernels, overlaps_text=False)
    streaming: Any = Streaming()
    network.stack, network.abreast = streaming, passes
    table: Any = Table()
    text, references = meta(1, WORK.text_tokens, 3584), meta(1, 4096, 64)
    with Alive() as alive:
        drawings = [network.start(text, references, [(64, 64), (64, 64)], table, 2 * place) for place in range(passes)]
        network.step([(drawing, meta(1, 4096, 64), 0) for drawing in drawings])
    assert alive.most_bytes / components().phases.together(passes).denoise == pytest.approx(1, abs=0.03)
