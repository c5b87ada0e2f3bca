"""A model folder, read into memory: every part checked, cast, moved, and named by one hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from millicent.checkpoint.fingerprint import weights_sha256
from millicent.checkpoint.folder import find_weight_files, open_folder, read_json
from millicent.checkpoint.lora import fuse_loras, lightning_steps
from millicent.checkpoint.weights import load_weights, read_weights
from millicent.engine.sampler import BaseSchedule
from millicent.errors import CheckpointError, IncompleteModelError, InputError, InputNotFoundError, MachineError
from millicent.facts.models import ModelCard
from millicent.model import text_encoder, vae
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.mmdit import MMDiT
from millicent.model.text_encoder import TextEncoder
from millicent.model.vae import VAE

# not FP16: the transformer's activations reach 1e7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Model:
    """Everything that an edit runs on. schedule: how the folder's scheduler shifts the base schedule."""

    card: ModelCard
    mmdit: MMDiT
    vae: VAE
    text_encoder: TextEncoder
    schedule: BaseSchedule
    device: torch.device
    dtype: torch.dtype
    weights_sha256: str

    @property
    def pixels_per_token(self) -> int:
        """A side of one token of the transformer, in pixels."""
        return self.vae.config.scale_factor * self.mmdit.config.patch_size


def load_model(
    path: Path, card: ModelCard, device: torch.device, dtype: torch.dtype, loras: Sequence[tuple[Path, float]] = ()
) -> Model:
    """Load every part of a diffusers-layout folder; fuse the card's LoRA and `loras`, each with its strength.

    A Lightning LoRA among `loras` changes the card: it brings its steps and its schedule, and guidance is off.
    Raises CheckpointError and its kinds, InputNotFoundError for a LoRA that is not there.
    """
    folder = open_folder(path)
    if folder.pipeline != card.pipeline:
        raise CheckpointError(
            f"{path} is a folder for {folder.pipeline}; the card {card.name} is for {card.pipeline}.",
            "Correct the card.",
        )
    files = {part: find_weight_files(path / part) for part in ("transformer", "vae", "text_encoder")}
    own = [] if card.lora is None else [_find_lora(path, card.lora)]
    card = _with_lightning(card, own, loras)
    mmdit = _load_mmdit(path / "transformer", files["transformer"], dtype)
    if own or loras:
        fuse_loras(mmdit, [*((lora, 1.0) for lora in own), *loras])
    return Model(
        card=card,
        mmdit=mmdit.to(device),
        vae=_load_vae(path / "vae", files["vae"], dtype).to(device),
        text_encoder=_load_text_encoder(path, files["text_encoder"], card, device, dtype),
        schedule=BaseSchedule.from_dict(read_json(path / "scheduler" / "scheduler_config.json")),
        device=device,
        dtype=dtype,
        weights_sha256=weights_sha256(path, [*(f for part in files.values() for f in part), *own], loras),
    )


def _with_lightning(card: ModelCard, own: Sequence[Path], loras: Sequence[tuple[Path, float]]) -> ModelCard:
    """The card, as a Lightning LoRA among `loras` wants the model to be used."""
    for lora, _ in loras:
        if not lora.is_file():
            raise InputNotFoundError(f"There is no LoRA {lora}.", "Check the path.")
    brought = [(lora, steps) for lora, _ in loras if (steps := lightning_steps(lora))]
    distilled = [*(lora for lora in own if lightning_steps(lora)), *(lora for lora, _ in brought)]
    if len(distilled) > 1:
        names = " and ".join(lora.name for lora in distilled)
        raise CheckpointError(
            f"{names} are both Lightning LoRAs; one alone makes a model draw in few steps, two ruin it.",
            "Leave one out; the demo without its own is demo-base.",
        )
    if not brought:
        return card
    return dataclasses.replace(card, steps=brought[0][1], schedule="lightning", true_cfg=1.0)


def _find_lora(path: Path, name: str) -> Path:
    if Path(name).name != name:
        raise CheckpointError(f"The card names the LoRA {name!r} outside its folder.", "Give the name of a file in it.")
    if not (path / name).is_file():
        raise IncompleteModelError(f"The LoRA {path / name} is missing.", "Fetch the whole model again.")
    return path / name


def _load_mmdit(part: Path, files: list[Path], dtype: torch.dtype) -> MMDiT:
    config = MMDiTConfig.from_dict(read_json(part / "config.json"))
    with torch.device("meta"):
        mmdit = MMDiT(config)
    load_weights(mmdit, read_weights(files, dtype), part)
    return mmdit.eval()


def _load_vae(part: Path, files: list[Path], dtype: torch.dtype) -> VAE:
    config = VAEConfig.from_dict(read_json(part / "config.json"))
    with torch.device("meta"):
        network = VAE(config)
    load_weights(network, vae.convert_state(read_weights(files, dtype)), part)
    return network.eval()


def _load_text_encoder(path: Path, files: list[Path], card: ModelCard, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    part = path / "text_encoder"
    tokenizer = text_encoder.read_tokenizer(path / "tokenizer")
    image_processor = text_encoder.read_image_processor(path / "processor")
    network: nn.Module = text_encoder.build_network(read_json(part / "config.json"))
    load_weights(network, text_encoder.convert_state(read_weights(files, dtype)), part)
    return TextEncoder(
        network.to(device),
        tokenizer,
        image_processor,
        template=card.pipeline,
        max_prompt_tokens=card.max_prompt_tokens,
    )


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises InputError for no device at all, MachineError for an absent one."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"The device is {name!r}.", "Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device is {name!r}.", "Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise MachineError(f"This machine has no device {name}.", "Use cpu, or a machine with an NVIDIA GPU.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is BF16 on a GPU and FP32 on a CPU. Raises InputError."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"The dtype is {name!r}.", "Use auto, bf16 or fp32 (FP16 overflows in this model).")
    return DTYPES[name]
