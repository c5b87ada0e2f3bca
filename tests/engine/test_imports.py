"""What a cold start imports: a card is paid for meanwhile, and it grows unseen."""

import json
import subprocess
import sys

# what transformers' modeling code brings along; torch may hold some of them itself
HEAVY = (
    "transformers.modeling_utils",
    "torch._dynamo",
    "torch.distributed.tensor",
    "scipy",
    "sympy",
    "sklearn",
    "torchao",
    "accelerate",
)


def imported(*lines: str) -> list[str]:
    """Of HEAVY and transformers, what these lines bring into a fresh interpreter that has torch already."""
    script = (
        "import json, sys, torch",
        f"names = [name for name in {(*HEAVY, 'transformers')!r} if name not in sys.modules]",
        *lines,
        "print(json.dumps([name for name in names if name in sys.modules]))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_engine_is_imported_without_transformers() -> None:
    assert imported("import millicent.engine.loading") == []


def test_a_fast_model_is_loaded_and_edits_without_transformers() -> None:
    found = imported(
        "from PIL import Image",
        "from millicent.edits import EditRequest",
        "from millicent.engine.editor import Editor",
        "from millicent.engine.settings import Settings",
        "editor = Editor.open('demo', device='cpu', settings=Settings(format='bf16'))",
        "assert editor.plan is not None",
        "editor.edit(EditRequest(images=(Image.new('RGB', (64, 64), 'red'),), prompt='make it navy', steps=1))",
    )
    assert found == []


def test_these_tests_can_see_it() -> None:
    lines = (
        "from millicent import demo",
        "from millicent.checkpoint.folder import read_json",
        "from millicent.model import text_encoder",
    )
    config = "read_json(demo.folder() / 'text_encoder' / 'config.json')"
    assert "transformers.modeling_utils" in imported(*lines, f"text_encoder.build_plain_network({config})")
