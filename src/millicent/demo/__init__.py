"""The embedded model: Qwen-Image-Edit's architecture, tiny, trained by recipes/demo. The weights lie here too."""

from pathlib import Path


def folder() -> Path:
    """The diffusers-layout folder of the demo model."""
    return Path(__file__).parent
