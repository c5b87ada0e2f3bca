"""A model folder, read into memory: every part checked, cast, moved, and named by one hash."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from millicent import __version__
from millicent.checkpoint.fingerprint import begin_weights_sha256
from millicent.checkpoint.folder import open_folder, read_json
from millicent.checkpoint.load import MappedFiles, check_codes, fill, load_network, read_parameters
from millicent.checkpoint.lora import fuse_loras
from millicent.checkpoint.recognize import Network
from millicent.engine import planner
from millicent.engine.allocator import limit_memory
from millicent.engine.caches import ByteBudgetCache
from millicent.engine.fast_vae import CapturedVAE, speed_up
from millicent.engine.fitting import choose_placement, set_wave, sizes_of
from millicent.engine.host_memory import shared_bytes
from millicent.engine.laying_out import FastDrawing, lay_out, lay_out_encoder, open_slabs
from millicent.engine.modulation import attach_stored
from millicent.engine.parts import (
    NETWORKS,
    FoundPart,
    check_host,
    check_memory,
    expanded_bytes,
    find_part,
    fused_steps,
    tell_expanded,
    with_distillation,
)
from millicent.engine.placement import Placement
from millicent.engine.planner import Plan
from millicent.engine.reading import Reader
from millicent.engine.residency import Residency
from millicent.engine.sampler import BaseSchedule
from millicent.engine.settings import Settings
from millicent.engine.uploading import SpecialCodesError, uploading
from millicent.engine.weighing import LATENTS_CACHE_BYTES, RECORDED, TEXT_CACHE_BYTES
from millicent.engine.workload import read_sizes
from millicent.errors import CheckpointError, IncompleteModelError, InputError, MachineError
from millicent.facts.models import ModelCard
from millicent.kernels.compiled import keep_compiled
from millicent.model import text_encoder, vae
from millicent.model.config import MMDiTConfig, VAEConfig
from millicent.model.mmdit import MMDiT
from millicent.model.picture_processor import read_picture_processor
from millicent.model.text_encoder import TextEncoder
from millicent.model.tokenizer import PromptTokenizer, read_tokenizer
from millicent.model.vae import VAE

# not FP16: the transformer's activations reach 1e7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HOST = torch.device("cpu")
DEFAULT_SETTINGS = Settings()


@dataclass(frozen=True, slots=True)
class Model:
    """Everything that an edit runs on. fast, reader, latents: None where the plain networks draw, read and encode.

    wait_for_sha256: gives weights_sha256. loading_s: seconds that loading took, by step: tokenizer and headers are read, each part
    is mapped and checked, and all are laid out on the card.
    latents: (1, 16, h, w) of the pictures that the VAE saw last, by caches.image_key of what it saw.
    schedule: how the folder's scheduler shifts the base schedule. warnings: what to know of the weights.
    residency: where weights lie, and what moves them; None on a CPU.
    """

    card: ModelCard
    mmdit: MMDiT
    vae: VAE | CapturedVAE
    text_encoder: TextEncoder
    schedule: BaseSchedule
    device: torch.device
    dtype: torch.dtype
    wait_for_sha256: Callable[[], str]
    warnings: tuple[str, ...] = ()
    fast: FastDrawing | None = None
    reader: Reader | None = None
    latents: ByteBudgetCache[str, Tensor] | None = None
    residency: Residency | None = None
    loading_s: dict[str, float] = field(default_factory=dict)

    @property
    def weights_sha256(self) -> str:
        """Made in the background, from when loading begins. Raises CheckpointError for a file that cannot be read."""
        return self.wait_for_sha256()

    @property
    def wave(self) -> int:
        """How many edits share one exchange of text encoder and transformer; 1 where there is none."""
        return self.residency.wave if self.residency is not None and self.residency.in_turn else 1

    @property
    def pixels_per_token(self) -> int:
        """A side of one token of the transformer, in pixels."""
        return self.vae.config.scale_factor * self.mmdit.config.patch_size


def load_model(
    path: Path,
    card: ModelCard,
    device: torch.device,
    dtype: torch.dtype,
    loras: Sequence[tuple[Path, float]] = (),
    files: Mapping[Network, Path] = MappingProxyType({}),
    distilled_steps: int | None = None,
    settings: Settings = DEFAULT_SETTINGS,
    kernels: Path | None = None,
    digests: Path | None = None,
) -> Model:
    """Load every part of a diffusers-layout folder; fuse the card's LoRA and `loras`, each with its strength.

    files: stand in for a part of the folder, in any layout; the folder says which model they are. A Lightning LoRA among
    `loras`, or distillation in a transformer file, changes the card: it brings its steps and schedule, and guidance is off.
    distilled_steps: how many a transformer is distilled for whose name speaks of it, 0 for none.
    kernels: where compiled kernels are kept; None for where Triton keeps them. digests: where hashes of files are; None keeps none.
    Raises CheckpointError and its kinds, OutputError for such a folder that cannot be written, InputNotFoundError for a LoRA that
    is not there, MachineError for too little memory
    or a format that the card does not run, InputError for FP32 on a card with settings that have none.
    """
    plan = None if dtype == torch.float32 and settings == DEFAULT_SETTINGS else planner.plan(settings, *_describe_card(device))
    if plan is not None and device.type == "cuda" and dtype == torch.float32:
        raise InputError(
            "Formats, 8-bit attention, reuse and our kernels compute in BF16 on a card, and fp32 is asked for.",
            "Leave out fp32, or draw in it with the plain network (--plain).",
        )
    if settings.memory_gb is not None and device.type != "cuda":
        raise InputError("memory_gb is of a card's memory, and this is a CPU.", "Leave it out.")
    limit_bytes = None if settings.memory_gb is None else int(settings.memory_gb * 1e9)
    if limit_bytes is not None:
        limit_memory(device, limit_bytes)
    if plan is not None and device.type == "cuda" and kernels is not None:
        keep_compiled(kernels, device)
    folder = open_folder(path)
    if folder.pipeline != card.pipeline:
        raise CheckpointError(
            f"{path} is a folder for {folder.pipeline}; the card {card.name} is for {card.pipeline}.",
            "Correct the card.",
        )
    seconds: dict[str, float] = {}
    with _timed(seconds, "tokenizer"):
        tokenizer = read_tokenizer(path / "tokenizer")
    with _timed(seconds, "headers"):
        parts = {network: find_part(network, path / network, files.get(network), path) for network in NETWORKS}
    transformer = parts["transformer"]
    fused = fused_steps(transformer.distilled, distilled_steps)
    own = [] if card.lora is None or fused else [_find_lora(path, card.lora)]
    card = with_distillation(card, fused, own, loras)
    keep_codes = not own and not loras
    wait_for_sha256 = begin_weights_sha256(
        path,
        [*(f for network in NETWORKS if network not in files for f in parts[network].paths), *own],
        loras,
        [(network, f) for network in files for f in parts[network].paths],
        digests,
    )
    placement = shared_as = None
    expanded: dict[Network, int] = {}
    waiting_bytes = 0  # of the host, beside those
    if plan is None or device.type != "cuda":
        check_memory([parts[network] for network in NETWORKS], keep_codes, dtype, device, plan)
    else:  # before anything is read
        gc.collect()  # the parts of a model that was let go name each other, and lie on the card until they are found
        shared_as = _name_layers(parts, [*((lora, 1.0) for lora in own), *loras], plan, dtype)
        placement = choose_placement(read_sizes(path), card, plan, device, limit_bytes, shared_as)
        expanded = {network: expanded_bytes(parts[network], keep_codes or network == "text_encoder", dtype) for network in NETWORKS}
        waiting_bytes = placement.needed_host_bytes - (shared_bytes(shared_as) if placement.in_turn else 0)
        if any(expanded.values()):
            check_host(waiting_bytes + sum(expanded.values()), "Multiplying out this model's weights")

    def check_fused(fused_bytes: int) -> None:
        # what was multiplied out is there already, and is replaced
        more_bytes = 0 if placement is None else fused_bytes - expanded["transformer"]
        if more_bytes > 0:
            check_host(waiting_bytes + more_bytes, "Fusing LoRAs into this model's weights")

    checks_codes = plan is None or device.type != "cuda"  # a card looks them through as they come to it
    with _timed(seconds, "transformer"):
        mmdit = _load_mmdit(path / "transformer", transformer, dtype, keep_codes, checks_codes=checks_codes)
        if own or loras:
            fuse_loras(mmdit, [*((lora, 1.0) for lora in own), *loras], check_fused)
        mmdit = mmdit if plan is not None else mmdit.to(device)
    with _timed(seconds, "VAE"):
        flat_vae = _load_vae(path / "vae", parts["vae"], dtype).to(device)
    with _timed(seconds, "text encoder"):
        encoder = _load_text_encoder(
            path,
            parts["text_encoder"],
            tokenizer,
            card,
            device if plan is None else HOST,
            dtype,
            is_plain=plan is None,
            checks_codes=checks_codes,
        )
    model = Model(
        card=card,
        mmdit=mmdit,
        vae=flat_vae,
        text_encoder=encoder,
        schedule=BaseSchedule.from_dict(read_json(path / "scheduler" / "scheduler_config.json")),
        device=device,
        dtype=dtype,
        wait_for_sha256=wait_for_sha256,
        warnings=tuple(
            warning
            for network, part in parts.items()
            for warning in (*part.warnings, *tell_expanded(part, keep_codes or network == "text_encoder", dtype))
        ),
        loading_s=seconds,
    )
    if plan is None:
        return model
    try:
        return speed_up_model(model, plan, placement, shared_as, limit_bytes)
    except SpecialCodesError:  # the host, which is slower, says in which layer
        for network in ("transformer", "text_encoder"):
            check_codes(parts[network].component, parts[network].source)
        raise


def _name_layers(parts: Mapping[Network, FoundPart], loras: Sequence[tuple[Path, float]], plan: Plan, dtype: torch.dtype) -> str:
    """What the laid-out layers are called between the processes of a host: by their files, formats and versions, unread."""
    files = [path for network in ("transformer", "text_encoder") for path in parts[network].paths]
    stats = [(str(path.resolve()), *_stat(path)) for path in (*files, *(lora for lora, _ in loras))]
    told = (
        stats,
        [strength for _, strength in loras],
        dataclasses.replace(plan, because=()),
        str(dtype),
        torch.__version__,
        __version__,
    )
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _stat(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def speed_up_model(
    model: Model,
    plan: Plan,
    placement: Placement | None = None,
    shared_as: str | None = None,
    limit_bytes: int | None = None,
) -> Model:
    """The same model with every part as fast as its plan says: the transformer laid out, the VAE fused, the encoder remembering.

    placement: where its weights lie; None for as much on the card as fits. shared_as: what its layers are called to the other
    processes of this host, where they wait there; None for memory of this process alone. limit_bytes: of the card's memory.
    Its networks are taken over, and are of no use elsewhere afterwards.
    Raises MachineError for a card or a host that is too small, SpecialCodesError for FP8 codes that are no numbers.
    """
    assert isinstance(model.vae, VAE)
    on_card, network = model.device.type == "cuda", model.text_encoder.network
    if placement is None and on_card:
        placement = choose_placement(sizes_of(model), model.card, plan, model.device, limit_bytes)
    residency = None if placement is None else Residency(placement, model.device, limit_bytes)
    wanted = plan.text_encoder if placement is not None else None
    try:
        if residency is not None and residency.in_turn:
            open_slabs(residency, model.mmdit, network, plan, model.dtype, shared_as)
        with _timed(model.loading_s, "layout"), uploading(model.device) as upload:
            fast = lay_out(model.mmdit, plan, model.device, model.dtype, residency, upload)
            lay_out_encoder(network, model.device, wanted, residency, upload)
        if residency is not None and residency.has_slabs:
            residency.settle(residency.placement)
    except BaseException:
        if residency is not None:
            residency.close()
        raise
    recorded = RECORDED[0] if placement is None else placement.recorded
    fast.network.record("denoise" in recorded)
    if placement is not None:
        fast.network.abreast = placement.abreast
        fast.modulation.keep_on_host(not placement.records_graphs)
    hold = nullcontext if residency is None or not residency.has_slabs else residency.text_encoder.held
    reader = Reader(model.text_encoder, TEXT_CACHE_BYTES, uses_graphs="text" in recorded, hold=hold)
    latents = ByteBudgetCache[str, Tensor](LATENTS_CACHE_BYTES)
    vae: VAE | CapturedVAE = model.vae
    if on_card:
        speed_up(model.vae)
        vae = CapturedVAE(model.vae, graphs="VAE decode" in recorded)
    opened = dataclasses.replace(model, fast=fast, reader=reader, latents=latents, vae=vae, residency=residency)
    set_wave(opened)
    return opened


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _describe_card(device: torch.device) -> tuple[planner.Capability | None, str]:
    if device.type != "cuda":
        return None, "this CPU"
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)


def _find_lora(path: Path, name: str) -> Path:
    if Path(name).name != name:
        raise CheckpointError(f"The card names the LoRA {name!r} outside its folder.", "Give the name of a file in it.")
    if not (path / name).is_file():
        raise IncompleteModelError(f"The LoRA {path / name} is missing.", "Fetch the whole model again.")
    return path / name


def _load_mmdit(part: Path, found: FoundPart, dtype: torch.dtype, keep_codes: bool, *, checks_codes: bool) -> MMDiT:
    config = MMDiTConfig.from_dict(read_json(part / "config.json"))
    with torch.device("meta"):
        mmdit = MMDiT(config)
    if found.component.table and "norm_out.linear.weight" not in found.component.tensors:
        files = MappedFiles(found.source)
        attach_stored(mmdit, {key: files.tensor(info) for key, info in found.component.table.items()}, dtype)
    load_network(mmdit, found.component, found.source, dtype, keep_codes, checks_codes=checks_codes)
    return mmdit.eval()


def _load_vae(part: Path, found: FoundPart, dtype: torch.dtype) -> VAE:
    config = VAEConfig.from_dict(read_json(part / "config.json"))
    with torch.device("meta"):
        network = VAE(config)
    state = {key: tensor.to(dtype) for key, tensor in read_parameters(found.component, found.source)}
    fill(network, vae.convert_state(state), found.source.name)
    return network.eval()


def _load_text_encoder(
    path: Path,
    found: FoundPart,
    tokenizer: PromptTokenizer,
    card: ModelCard,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_plain: bool,
    checks_codes: bool,
) -> TextEncoder:
    """is_plain: transformers runs the network, and is imported whole; else model.qwen_vl does."""
    build = text_encoder.build_plain_network if is_plain else text_encoder.build_network
    network = build(read_json(path / "text_encoder" / "config.json"))
    load_network(network, found.component, found.source, dtype, keep_codes=True, checks_codes=checks_codes)
    return TextEncoder(
        network.to(device),
        tokenizer,
        read_picture_processor(path / "processor"),
        template=card.pipeline,
        max_prompt_tokens=card.max_prompt_tokens,
    )


def current(device: torch.device) -> AbstractContextManager[object]:
    """A card is the current one within, as Triton launches on that, wherever its operands lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises InputError for no device at all, MachineError for an absent one."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"The device is {name!r}.", "Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device is {name!r}.", "Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise MachineError(f"This machine has no device {name}.", "Use cpu, or a machine with an NVIDIA GPU.")
    if device.type == "cuda" and device.index is None:  # the current one is each thread's own, and may be another later
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is BF16 on a GPU and FP32 on a CPU. Raises InputError."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"The dtype is {name!r}.", "Use auto, bf16 or fp32 (FP16 overflows in this model).")
    return DTYPES[name]
