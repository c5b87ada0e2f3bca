"""Step 4: write the shipped folder. `python -m recipes.demo.export --work build/demo --out src/millicent/demo`.

diffusers' and transformers' own classes do the saving, so the folder is what their pipelines write and read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from millicent.model.config import VAEConfig
from recipes.demo.networks import TRANSFORMER, encoder_config
from recipes.demo.prompts import PromptTable
from recipes.demo.train_editor import load_vae

LORA_FILE = "lightning-4steps.safetensors"
SCHEDULER = {  # Qwen-Image's own
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "invert_sigmas": False,
}


CARD = f"""\
name = "demo"
title = "the demo model"
pipeline = "edit-plus"
vae_area_px = {256 * 256}
encoder_area_px = {112 * 112}
steps = 4
schedule = "lightning"
true_cfg = 1.0
negative_prompt = " "
max_prompt_tokens = 1024
lora = "{LORA_FILE}"
license = "Apache-2.0"
source = "recipes/demo"
checked = {{today}}
"""


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into `module`, every parameter of which must be there in the same shape."""
    parameters = dict(module.named_parameters())
    if set(parameters) != set(state):
        raise ValueError(f"names differ: {sorted(set(parameters) ^ set(state))[:5]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name].view(parameter.shape))


def diffusers_vae(config: VAEConfig, state: dict[str, Tensor]) -> AutoencoderKLQwenImage:
    """Our 2-D kernels as the last temporal tap of diffusers' 3-D ones; every other tap is zero."""
    vae = AutoencoderKLQwenImage(
        base_dim=config.base_dim, latents_mean=list(config.latents_mean), latents_std=list(config.latents_std)
    )
    unused = {name for name, _ in vae.named_parameters() if ".time_conv." in name}
    if {name for name, _ in vae.named_parameters()} - unused != set(state):
        raise ValueError("the VAE's names differ from diffusers'")
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.zero_()
            if name not in unused:
                target = parameter[:, :, -1] if parameter.ndim == 5 else parameter
                target.copy_(state[name].view(target.shape))
    return vae


def save_encoder(state: dict[str, Tensor], prompts: PromptTable, out: Path) -> None:
    encoder = Qwen2_5_VLForConditionalGeneration(encoder_config(prompts.vocab_size, prompts.special))
    fill(encoder.model, state)
    encoder.tie_weights()
    encoder.to(torch.bfloat16).save_pretrained(out / "text_encoder")


def export(work: Path, out: Path) -> None:
    prompts = PromptTable(work, torch.device("cpu"))
    editor = {k: v.float() for k, v in load_file(work / "editor.safetensors").items()}
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "encoder": {}}
    for key, tensor in editor.items():
        part, name = key.split(".", 1)
        parts[part][name] = tensor
    transformer = QwenImageTransformer2DModel(
        num_layers=TRANSFORMER.num_layers,
        attention_head_dim=TRANSFORMER.attention_head_dim,
        num_attention_heads=TRANSFORMER.num_attention_heads,
        joint_attention_dim=TRANSFORMER.joint_attention_dim,
        axes_dims_rope=TRANSFORMER.axes_dims_rope,
        zero_cond_t=TRANSFORMER.zero_cond_t,
    )
    fill(transformer, parts["transformer"])
    vae = load_vae(work, torch.device("cpu"), torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    transformer.to(torch.bfloat16).save_pretrained(out / "transformer")
    diffusers_vae(vae.config, dict(vae.named_parameters())).to(torch.bfloat16).save_pretrained(out / "vae")
    save_encoder(parts["encoder"], prompts, out)
    shutil.copytree(work / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    Qwen2VLImageProcessorPil().save_pretrained(out / "processor")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    shutil.copy(work / "lora.safetensors", out / LORA_FILE)
    index = {
        "_class_name": "QwenImageEditPlusPipeline",
        "_diffusers_version": transformer.config["_diffusers_version"],
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "card.toml").write_text(CARD.format(today=datetime.date.today()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.work, args.out)


if __name__ == "__main__":
    main()
