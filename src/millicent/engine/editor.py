"""The editor: one model, opened once, and the edits that it makes.

torch and transformers are imported when a model is opened, so that this module can be imported, and a wrong name told,
without them.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from millicent import demo
from millicent.checkpoint.folder import open_folder, read_json
from millicent.edits import EditRequest, EditResult, OnProgress, Timings
from millicent.engine.placement import Placement
from millicent.engine.planner import Plan
from millicent.engine.settings import Settings
from millicent.errors import IncompleteModelError, InputError, MachineError, MillicentError, MissingExtraError, ModelNotFoundError
from millicent.facts.models import ModelCard, find_card, read_card

if TYPE_CHECKING:
    from PIL import Image

    from millicent.checkpoint.recognize import Network
    from millicent.engine.loading import Model
    from millicent.engine.pipeline import Course

DEMO_NAMES = ("demo", "demo-base")
DEMO_BASE_STEPS = 20
DEFAULT_SETTINGS = Settings()


class Editor:
    """A model in memory. `open` makes one; `edit` draws."""

    def __init__(self, name: str, model: Model) -> None:
        self.name = name
        self.card: ModelCard = model.card
        self.warnings: tuple[str, ...] = model.warnings  # of the weights' quality
        self.plan: Plan | None = None if model.fast is None else model.fast.plan
        self.loading_s: dict[str, float] = model.loading_s  # by step
        self._model = model

    @property
    def wave(self) -> int:
        """How many requests edit_many takes before the first is drawn; 1 where weights do not change places."""
        return self._model.wave

    @property
    def placement(self) -> Placement | None:
        """Where the weights lie now; None on a CPU."""
        return None if self._model.residency is None else self._model.residency.placement

    @property
    def weights_sha256(self) -> str:
        """It is waited for: a large file takes seconds. Raises CheckpointError for a file that cannot be read."""
        return self._model.weights_sha256

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        distilled_steps: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        settings: Settings = DEFAULT_SETTINGS,
        kernels: Path | None = None,
        digests: Path | None = None,
    ) -> Self:
        """Load a model whole.

        model: "demo", "demo-base" (the demo without its 4-step LoRA) or a diffusers-layout folder.
        transformer, text_encoder, vae: files or folders, in any layout that `millicent inspect` says is loaded, that stand in for
        the model's own; the folder still says which model it is.
        loras: LoRA files, each with its strength, 1.0 being the whole of it. A Lightning LoRA brings its schedule along.
        distilled_steps: for a transformer whose name speaks of Lightning or of steps, how many it draws in; 0 if it is none.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (BF16 on a GPU, FP32 on a CPU), "bf16" or "fp32".
        settings: the number format of the transformer, and what may be approximated (engine/settings.py).
        kernels: a folder in which compiled kernels are kept from one process to the next; None for where Triton keeps them.
        digests: one in which hashes of weight files are kept; None keeps none, and each process makes them anew, in the background.
        Raises ModelNotFoundError, IncompleteModelError, WeightsMismatchError, CheckpointError, MissingExtraError, MachineError for
        too little memory, InputNotFoundError for a file that is not there.
        """
        name, folder, card = find_model(model)
        stand_ins: dict[Network, str | Path | None] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        handled = sys.exception()  # whoever opens may be handling another failure
        try:
            from millicent.engine import loading

            place = loading.choose_device(device)
            with loading.current(place):
                loaded = loading.load_model(
                    folder,
                    card,
                    place,
                    loading.choose_dtype(dtype, place),
                    [(Path(lora), strength) for lora, strength in loras],
                    {network: Path(file) for network, file in stand_ins.items() if file is not None},
                    distilled_steps,
                    settings,
                    kernels,
                    digests,
                )
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("millicent"):
                raise
            raise MissingExtraError(
                f"The package {error.name} is not installed, and drawing needs it.",
                'Run: pip install "millicent[engine]"',
            ) from error
        except RuntimeError as error:
            from millicent.engine import failures

            if not failures.is_out_of_memory(error, handled):
                raise
            raise MachineError(
                f"The memory of {place} ran out while the model was opened; another program may have taken some meanwhile.",
                "Free what others hold there, or give the GB that may be used in memory_gb (--memory).",
            ) from error
        return cls(name, loaded)

    def edit(self, request: EditRequest, on_progress: OnProgress | None = None) -> EditResult:
        """Draw every variant of a request.

        Where the card's memory runs out it is drawn again: without what earlier edits left there, and where that is not enough once
        more with less of the model there, and the log says so.
        Raises InputError and its kinds for what this model cannot draw; MachineError where memory or a kernel fails, after which
        the editor can be used again.
        """
        from millicent.engine import failures, pressure

        def draw() -> EditResult:
            return self._draw(request, on_progress)

        handled = sys.exception()  # whoever asks may be handling another edit's failure
        kept = failures.keeps_something(self._model)
        try:
            return draw()
        except MillicentError as error:
            if not failures.is_out_of_memory(error, handled):
                raise
            if kept:  # of earlier edits; it has gone now
                return pressure.once_more(self._model, request, draw)
            return pressure.once_more_with_less(self._model, request, error, draw)

    def _draw(self, request: EditRequest, on_progress: OnProgress | None) -> EditResult:
        import torch

        from millicent.engine import drawing, failures, pipeline
        from millicent.engine.watch import Watch

        model = self._model
        watch = Watch(on_progress, model.device)
        with failures.guarded(model), failures.alone(model), torch.inference_mode():
            with watch.stage("prepare"):
                prepared = pipeline.prepare(request, model)
                course = pipeline.settle(request, model, prepared.height, prepared.width)
                pipeline.check_sigmas(course, model)
            with watch.stage("encode"):
                conditioning = pipeline.encode(prepared, model, request.prompt, course.negative_prompt)
            with watch.stage("denoise", course.steps) as on_step:
                latents = drawing.draw(conditioning, model, course.sigmas, course.seeds, course.true_cfg, on_step)
            with watch.stage("decode", len(course.seeds)) as on_step:
                images = pipeline.decode(latents, request, model, on_step)
        return self._make_result(course, images, watch.timings())

    def edit_many(
        self, requests: Iterable[EditRequest], ahead: int = 1, cancelled: threading.Event | None = None
    ) -> Iterator[EditResult | MillicentError]:
        """Draw requests one after another, in order, with the work around each picture done while another is drawn.

        The pictures are those of `edit`, to the bit. What `edit` would raise for a request comes in its place as a value, and the
        others go on. A result comes once the request after it has been taken from `requests`. Where text encoder and transformer
        lie on the card in turn, as many requests as share an exchange are taken and encoded first, and each result comes as soon
        as it is drawn. To stop early, close the iterator; `edit` may be called between two results, from the same thread.
        ahead: how many requests are taken and prepared in a thread before their turn to be encoded, 1 or more.
        cancelled: once set, no request is taken, the edit that is being drawn stops before its next step, and the iterator ends
        after what was finished: fewer results than requests taken. In turn that is the card's next step, as the host is held
        one step ahead of it; elsewhere the host's, which has the whole edit given to the card long before the card has drawn it.
        Raises InputError for ahead below 1; what is neither of MillicentError's kinds nor of its making ends the run.
        """
        from millicent.engine.stream import Stages
        from millicent.engine.waves import draw_many

        if ahead < 1:
            raise InputError(f"ahead is {ahead}.", "Use 1 or more, or edit().")
        return draw_many(Stages(self._model, self._make_result, cancelled), requests, ahead)

    def _make_result(self, course: Course, images: Sequence[Image.Image], timings: Timings) -> EditResult:
        return EditResult(
            images=tuple(images),
            seeds=course.seeds,
            sigmas=course.sigmas,
            schedule=course.schedule,
            true_cfg=course.true_cfg,
            model=self.name,
            weights_sha256=self.weights_sha256,
            timings=timings,
        )


def find_model(model: str | Path) -> tuple[str, Path, ModelCard]:
    """The name, folder and card of a model. Raises ModelNotFoundError, IncompleteModelError."""
    if model in DEMO_NAMES:
        return str(model), demo.folder(), _demo_card(str(model))
    path = Path(model)
    if not path.is_dir():
        names = " or ".join(DEMO_NAMES)
        raise ModelNotFoundError(f"There is no model {str(model)!r}.", f"Give {names}, or a folder that holds model_index.json.")
    if not (path / "model_index.json").is_file():
        raise IncompleteModelError(f"{path} holds no model_index.json.", "Give the folder of a whole diffusers-layout model.")
    card = read_card(path / "card.toml") if (path / "card.toml").is_file() else _published_card(path)
    return path.resolve().name, path, card


def _demo_card(name: str) -> ModelCard:
    path = demo.folder() / "card.toml"
    if not path.is_file():
        raise IncompleteModelError("The demo model is not in this package.", "Install millicent again.")
    card = read_card(path)
    if name == "demo":
        return card
    return dataclasses.replace(card, name=name, lora=None, schedule="base", steps=DEMO_BASE_STEPS)


def _published_card(path: Path) -> ModelCard:
    """The card that the folder's own configs point to. 2509 and 2511 differ in `zero_cond_t` alone."""
    if open_folder(path).pipeline == "edit":
        return find_card("qwen-image-edit")
    zero_cond_t = read_json(path / "transformer" / "config.json").get("zero_cond_t", False)
    return find_card("qwen-image-edit-2511" if zero_cond_t else "qwen-image-edit-2509")
