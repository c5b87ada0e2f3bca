"""millicent: edit product images with open models on rented GPUs, for tens of millicents an image.

    from millicent import Editor, EditRequest, open_image

    editor = Editor.open("demo")
    result = editor.edit(EditRequest(images=(open_image("shirt.png"),), prompt="make the shirt navy blue"))
    result.image.save("navy.png")

Names are imported when first used, so `import millicent` itself loads nothing; torch comes with `Editor.open`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millicent.edits import EditRequest, EditResult, OnProgress, Progress, SupportsEdit, Timings
    from millicent.engine.editor import Editor
    from millicent.errors import (
        CheckpointError,
        EmptyPromptError,
        ImageTooLargeError,
        IncompleteModelError,
        InputError,
        InputNotFoundError,
        MachineError,
        MillicentError,
        MissingExtraError,
        ModelNotFoundError,
        NotAnImageError,
        OutputError,
        PromptTooLongError,
        ScheduleError,
        SizeError,
        TruncatedImageError,
        WeightsMismatchError,
    )
    from millicent.images import open_image, read_metadata, save_image

__version__ = "0.1.0"

_HOMES = {
    "millicent.edits": ("EditRequest", "EditResult", "OnProgress", "Progress", "SupportsEdit", "Timings"),
    "millicent.engine.editor": ("Editor",),
    "millicent.errors": (
        "CheckpointError",
        "EmptyPromptError",
        "ImageTooLargeError",
        "IncompleteModelError",
        "InputError",
        "InputNotFoundError",
        "MachineError",
        "MillicentError",
        "MissingExtraError",
        "ModelNotFoundError",
        "NotAnImageError",
        "OutputError",
        "PromptTooLongError",
        "ScheduleError",
        "SizeError",
        "TruncatedImageError",
        "WeightsMismatchError",
    ),
    "millicent.images": ("open_image", "read_metadata", "save_image"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "EditRequest",
    "EditResult",
    "Editor",
    "EmptyPromptError",
    "ImageTooLargeError",
    "IncompleteModelError",
    "InputError",
    "InputNotFoundError",
    "MachineError",
    "MillicentError",
    "MissingExtraError",
    "ModelNotFoundError",
    "NotAnImageError",
    "OnProgress",
    "OutputError",
    "Progress",
    "PromptTooLongError",
    "ScheduleError",
    "SizeError",
    "SupportsEdit",
    "Timings",
    "TruncatedImageError",
    "WeightsMismatchError",
    "__version__",
    "open_image",
    "read_metadata",
    "save_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'millicent' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
