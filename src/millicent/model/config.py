"""The shapes of the networks, as diffusers' config.json files give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from millicent.errors import CheckpointError

# keys that every diffusers config carries and that say nothing about the network's shape
_BOOKKEEPING_PREFIX = "_"


def _pick(cls: type, config: Mapping[str, Any], ignored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `cls` found in `config`; raise CheckpointError for a key that would change the network unseen."""
    known = {f.name for f in fields(cls)}
    for key, value in config.items():
        if key.startswith(_BOOKKEEPING_PREFIX) or key in known:
            continue
        if key not in ignored:
            raise CheckpointError(
                f"{cls.__name__} does not know the config key {key!r} ({value!r}).",
                "Use a Qwen-Image-Edit, -2509 or -2511 folder as diffusers writes it.",
            )
        if ignored[key] is not ANY and value != ignored[key]:
            raise CheckpointError(
                f"The config says {key} = {value!r}; this network has {ignored[key]!r}.",
                "Use a Qwen-Image-Edit, -2509 or -2511 folder (Layered and 2.1 are other networks).",
            )
    return {key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in known}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Fetch the whole model again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", "Fetch the whole model again.")
    return value


ANY = object()


@dataclass(frozen=True, slots=True)
class MMDiTConfig:
    """QwenImageTransformer2DModel's shape; the defaults are the 20.4B network's.

    zero_cond_t: the 2511 variant, whose reference tokens are modulated as at timestep 0.
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers transformer/config.json. Raises CheckpointError for another architecture."""
        other_architectures = {
            "guidance_embeds": False,
            "use_additional_t_cond": False,
            "use_layer3d_rope": False,
            "pooled_projection_dim": ANY,  # in older configs; no weight depends on it
        }
        made = cls(**_pick(cls, config, other_architectures))
        if sum(made.axes_dims_rope) != made.attention_head_dim:
            raise CheckpointError(
                f"axes_dims_rope {made.axes_dims_rope} does not add up to the head's {made.attention_head_dim} channels.",
                "Fetch the model's config.json again.",
            )
        return made


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """AutoencoderKLQwenImage's shape; the defaults are Qwen-Image's (and Wan 2.1's) VAE."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    input_channels: int = 3
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    @property
    def scale_factor(self) -> int:
        """Pixels a side for one latent."""
        return 1 << (len(self.dim_mult) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers vae/config.json. Raises CheckpointError for another architecture."""
        # where time is halved matters to video alone: one frame never meets a temporal convolution
        made = cls(**_pick(cls, config, {"attn_scales": [], "temperal_downsample": ANY, "dropout": ANY}))
        if len(made.latents_mean) != made.z_dim or len(made.latents_std) != made.z_dim:
            raise CheckpointError(
                f"The VAE has {made.z_dim} latent channels, but its config.json gives {len(made.latents_mean)} means "
                f"and {len(made.latents_std)} deviations.",
                "Fetch the VAE's config.json again.",
            )
        return made
