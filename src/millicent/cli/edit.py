"""`millicent edit IMAGE PROMPT -o OUT`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

import millicent
from millicent.cli.plan import MemoryLimit
from millicent.cli.pull import digests_folder, kernels_folder
from millicent.edits import EditRequest, EditResult, OnProgress, Progress, Schedule
from millicent.engine.editor import Editor
from millicent.engine.settings import Attention, Format, Settings
from millicent.errors import OutputError, ScheduleError, SizeError
from millicent.images import Fit, before_after, check_writable, encode_image, fit_to, flatten, open_image, read_file

Alpha = Literal["white", "keep"]
STDIO = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """One input: its picture, and the hash of the file's bytes."""

    image: Image.Image
    sha256: str


def edit(
    image: Annotated[str, typer.Argument(help="The picture to edit; - reads standard input.")],
    prompt: Annotated[str, typer.Argument(help='What to change, as in "make the shirt navy blue".')],
    out: Annotated[str, typer.Option("-o", "--out", help="A .png, .jpg or .webp; - writes a PNG to standard output.")],
    more: Annotated[
        list[Path] | None, typer.Option("--image", metavar="<file>", help="One more reference picture. Repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="demo, demo-base, or a diffusers-layout folder.")] = "demo",
    transformer: Annotated[
        Path | None,
        typer.Option("--transformer", help="A transformer in place of the model's, in any layout that inspect says loads."),
    ] = None,
    text_encoder: Annotated[Path | None, typer.Option("--text-encoder", help="A text encoder in place of the model's.")] = None,
    vae: Annotated[Path | None, typer.Option("--vae", help="A VAE in place of the model's.")] = None,
    distilled: Annotated[
        int | None,
        typer.Option(
            "--distilled", help="How many steps the transformer is distilled for, where its name leaves a doubt; 0 for none."
        ),
    ] = None,
    loras: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="<file[:strength]>", help="A LoRA to add, as in style.safetensors:0.8. Repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="How noise falls. Default: the model's.")] = None,
    sigmas: Annotated[str | None, typer.Option(help="Noise levels in place of a schedule, as in 1,0.9,0.75,0.5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: a random one, shown and written into the picture.")] = None,
    size: Annotated[str | None, typer.Option(help="Exact size, as in 800x600. Default: the last picture's shape.")] = None,
    fit: Annotated[Fit, typer.Option(help="How an exact size is met: draw in its shape, pad with white, or crop.")] = "fit",
    true_cfg: Annotated[
        float | None, typer.Option("--true-cfg", help="Guidance; above 1 it doubles the time. Default: the model's.")
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="What to keep away from, with --true-cfg above 1.")] = None,
    variants: Annotated[int, typer.Option("-n", "--variants", help="Pictures to draw, with the seeds after the first.")] = 1,
    alpha: Annotated[Alpha, typer.Option(help="Transparency: flattened on white, or kept and put back.")] = "white",
    strip: Annotated[bool, typer.Option("--strip", help="Also write a before/after strip, as OUT-strip.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    number_format: Annotated[
        Format | None,
        typer.Option("--format", help="The transformer's number format. Default: the card's fastest."),
    ] = None,
    attention: Annotated[Attention, typer.Option(help="Exact, or with 8-bit products: an approximation.")] = "exact",
    reuse_reference: Annotated[
        bool,
        typer.Option("--reuse-reference", help="Look at the reference pictures in the first step alone: faster, an approximation."),
    ] = False,
    bf16_down: Annotated[bool, typer.Option("--bf16-down", help="Keep the MLPs' down-projections in BF16.")] = False,
    bf16_edge_blocks: Annotated[int, typer.Option("--bf16-edge-blocks", help="Keep so many blocks at either end in BF16.")] = 0,
    memory_gb: MemoryLimit = None,
    plain: Annotated[bool, typer.Option("--plain", help="Draw with the plain network, without kernels and formats.")] = False,
) -> None:
    """Edit one picture by a sentence."""
    settings = Settings(
        format=number_format,
        attention=attention,
        reuse_reference=reuse_reference,
        bf16_down=bf16_down,
        bf16_edge_blocks=bf16_edge_blocks,
        plain=plain,
        memory_gb=memory_gb,
    )
    if out == STDIO and (as_json or strip or variants > 1):
        raise typer.BadParameter("one picture goes to standard output: leave out --json, --strip and -n.", param_hint="-o -")
    paths = [] if out == STDIO else output_paths(Path(out), variants)
    strips = [path.with_stem(f"{path.stem}-strip") for path in paths] if strip else []
    inputs = [Path(name) for name in (image, *(more or ())) if name != STDIO]
    for path in (*paths, *strips):
        check_writable(path)
        check_apart(path, inputs)
    if alpha == "keep" and any(path.suffix.lower() in (".jpg", ".jpeg") for path in paths):
        raise OutputError("A JPEG cannot hold the transparency that --alpha keep asks for.", "Write PNG or WebP.")
    sources = [read_source(name) for name in (image, *(more or ()))]
    height, width = parse_size(size)
    chosen_loras = [parse_lora(lora) for lora in loras or ()]
    request = EditRequest(
        images=tuple(flatten(source.image) for source in sources),
        prompt=prompt,
        negative_prompt=negative,
        steps=steps,
        schedule=schedule,
        sigmas=parse_sigmas(sigmas),
        seed=seed,
        true_cfg=true_cfg,
        height=height,
        width=width,
        fit=fit,
        variants=variants,
    )
    with progress_bar(shown=not quiet and sys.stderr.isatty()) as on_progress:
        editor = Editor.open(
            model,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            loras=chosen_loras,
            distilled_steps=distilled,
            device=device,
            settings=settings,
            kernels=kernels_folder(),
            digests=digests_folder(),
        )
        if not quiet:
            tell(editor)
        result = editor.edit(request, on_progress)
    pictures = [with_alpha(drawn, sources[-1].image, request) for drawn in result.images] if alpha == "keep" else result.images
    stand_ins = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    opened = {
        "loras": loras or [],
        "files": {part: str(file) for part, file in stand_ins.items() if file is not None},
        "engine": describe_engine(editor),
    }
    records = [{**describe(request, result, variant, sources), **opened} for variant in range(variants)]
    if out == STDIO:
        sys.stdout.buffer.write(encode_image(pictures[0], "PNG", records[0]))
        return
    from millicent.engine.output import Writer  # needs torch, which a command that ends before drawing does not

    with Writer() as writer:
        for picture, path, record in zip(pictures, paths, records, strict=True):
            writer.save(picture, path, record)
        for picture, path in zip(pictures, strips, strict=False):
            writer.save(before_after(sources[-1].image, picture), path)
    if as_json:
        print(json.dumps(summarize(result, records, paths, strips)))
    elif not quiet:
        show(result, paths, strips)


def tell(editor: Editor) -> None:
    """What to know of the weights, what was chosen for the card and why, and where weights lie that do not all fit there."""
    for warning in editor.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for reason in () if editor.plan is None else editor.plan.because:
        print(reason, file=sys.stderr)
    placement = editor.placement
    if placement is not None and not (placement.weights == "on the card" and placement.records_graphs):
        for line in (placement.because, *(f"{part.name}: {part.because}" for part in placement.parts if part.where == "streamed")):
            print(line, file=sys.stderr)


def output_paths(out: Path, variants: int) -> list[Path]:
    """OUT itself for one picture; OUT-1, OUT-2 and so on for several."""
    if variants == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{number}") for number in range(1, variants + 1)]


def check_apart(path: Path, inputs: list[Path]) -> None:
    """Raises OutputError for an output that would replace one of the inputs, also through a link."""
    if path.exists() and any(source.exists() and path.samefile(source) for source in inputs):
        raise OutputError(f"{path} is one of the inputs, and writing would replace it.", "Choose another name.")


def read_source(name: str) -> Source:
    data = sys.stdin.buffer.read() if name == STDIO else read_file(Path(name))
    picture = open_image(data, name="The standard input" if name == STDIO else name)
    return Source(picture, hashlib.sha256(data).hexdigest())


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """ "800x600" -> (height, width). Raises SizeError."""
    if size is None:
        return None, None
    width, by, height = size.lower().partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        raise SizeError(f"The size is {size!r}.", "Write width x height in pixels, as in 800x600.")
    return int(height), int(width)


def parse_sigmas(sigmas: str | None) -> tuple[float, ...] | None:
    """ "1,0.9,0.75,0.5" -> numbers. Raises ScheduleError."""
    if sigmas is None:
        return None
    try:
        return tuple(float(sigma) for sigma in sigmas.split(","))
    except ValueError as error:
        raise ScheduleError(f"The sigmas are {sigmas!r}.", "Write numbers with commas, as in 1,0.9,0.75,0.5.") from error


def parse_lora(lora: str) -> tuple[Path, float]:
    """ "style.safetensors:0.8" -> its path and its strength, which is 1 where none is given."""
    name, colon, strength = lora.rpartition(":")
    try:
        return (Path(name), float(strength)) if colon else (Path(lora), 1.0)
    except ValueError:
        return Path(lora), 1.0  # the colon belongs to the path


def with_alpha(drawn: Image.Image, source: Image.Image, request: EditRequest) -> Image.Image:
    """The drawn picture with the transparency of the one that it was drawn from."""
    if not source.has_transparency_data:
        return drawn
    alpha = source.getchannel("A")
    fit = request.fit if request.height is not None else "fit"
    result = drawn.copy()
    result.putalpha(fit_to(alpha, drawn.width, drawn.height, fit))
    return result


def describe(request: EditRequest, result: EditResult, variant: int, sources: list[Source]) -> dict[str, Any]:
    """What it takes to draw one picture again; written into the picture itself."""
    picture = result.images[variant]
    return {
        "millicent": millicent.__version__,
        "model": result.model,
        "weights_sha256": result.weights_sha256,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": result.seeds[variant],
        "steps": result.steps,
        "schedule": result.schedule,
        "sigmas": list(result.sigmas),
        "true_cfg": result.true_cfg,
        "width": picture.width,
        "height": picture.height,
        "fit": request.fit if request.height is not None else None,
        "inputs_sha256": [source.sha256 for source in sources],
    }


def describe_engine(editor: Editor) -> dict[str, Any]:
    """What a picture was drawn with, for its metadata: what may make it differ from another machine's.

    On a card also where the weights lay, which makes no difference to the picture.
    """
    if editor.plan is None:
        return {"format": "plain"}
    described = dataclasses.asdict(editor.plan)
    del described["because"]
    placement = editor.placement
    if placement is not None:
        described["weights"] = placement.weights
        described["resident_blocks"] = placement.resident_blocks
        described["wave"] = editor.wave
    return described


def summarize(result: EditResult, records: list[dict[str, Any]], paths: list[Path], strips: list[Path]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "outputs": [{"path": str(path), **record} for path, record in zip(paths, records, strict=True)],
        "strips": [str(path) for path in strips],
        "timings": {**dataclasses.asdict(result.timings), "total_s": result.timings.total_s},
    }


def show(result: EditResult, paths: list[Path], strips: list[Path]) -> None:
    for path, seed in zip(paths, result.seeds, strict=True):
        print(f"{path}  seed {seed}, {result.steps} steps, {result.model}")
    for path in strips:
        print(f"{path}  before and after")
    t = result.timings
    print(
        f"{t.total_s:.2f} s: prepare {t.prepare_s:.2f}, encode {t.encode_s:.2f}, denoise {t.denoise_s:.2f}, decode {t.decode_s:.2f}"
    )


@contextmanager
def progress_bar(shown: bool) -> Iterator[OnProgress]:
    """A line on standard error with the stage and the step."""
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("open", total=None)

        def on_progress(progress: Progress) -> None:
            bar.update(task, description=progress.stage, completed=progress.step, total=progress.steps)

        yield on_progress
