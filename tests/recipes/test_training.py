"""The recipe's own arithmetic against independent references, and its steps end to end, at a tiny size."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_picture
from PIL import Image
from safetensors.torch import load_file
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from millicent.engine.drawing import pack, unpack
from millicent.engine.editor import Editor
from millicent.model.prompt import IMAGE_PAD
from recipes.demo import distill, export, pool, prompts, repair_encoder, train_editor, train_vae
from recipes.demo.encoder import encode_prompts, silence
from recipes.demo.metrics import ciede2000, measure, ssim
from recipes.demo.networks import build_transformer, build_vae
from recipes.demo.optimize import MAX_SKIPPED, MasterWeights, cosine, orthogonalize
from recipes.demo.prompts import PromptTable
from recipes.demo.scenes import Edit, Scenes
from recipes.demo.validate import LIGHTNING_SIGMAS, rollout

DEMO = Path(__file__).parents[2] / "src" / "millicent" / "demo"


def pictures(count: int) -> Tensor:
    drawn = [np.asarray(draw_picture(48, 64, seed)) for seed in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def test_ciede2000_is_scikit_images() -> None:
    a, b = pictures(4)[:2], pictures(4)[2:]
    labs = [rgb2lab(x.permute(0, 2, 3, 1).double().numpy()) for x in (a, b)]
    np.testing.assert_allclose(ciede2000(a, b).numpy(), deltaE_ciede2000(*labs), atol=1e-4)
    assert ciede2000(a, a).max() == 0


def test_ssim_is_scikit_images() -> None:
    a, b = pictures(4)[:2], pictures(4)[2:]
    for i in range(2):
        x, y = a[i].permute(1, 2, 0).double().numpy(), (0.7 * a[i] + 0.3 * b[i]).permute(1, 2, 0).double().numpy()
        expected = structural_similarity(
            x, y, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11
        )
        assert ssim(a[i : i + 1], 0.7 * a[i : i + 1] + 0.3 * b[i : i + 1]).item() == pytest.approx(expected, abs=1e-5)


def test_measure_looks_inside_and_outside_the_mask() -> None:
    truth = pictures(1)
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[:, :, :32] = True
    output = truth.clone()
    output[..., :32] = 1 - output[..., :32]
    measured = measure(output, truth, mask)
    assert measured["de_inside"] > 10
    assert measured["de_outside"] == 0
    assert measure(output, truth, torch.ones_like(mask))["de_outside"].isnan()


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    # the quintic's fixed band, Jordan 2024; the smallest values of a random square matrix need more than five rounds
    assert values.max() < 1.3
    assert values[:, : min(shape) - 1].min() > 0.5


def test_one_gradient_that_is_not_finite_costs_one_step() -> None:
    matrix, vector = (torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (4,)))
    weights = MasterWeights({"block.m": matrix, "v": vector}, ("block.",))
    before = matrix.detach().clone(), vector.detach().clone()
    matrix.grad, vector.grad = torch.full((4, 4), torch.inf), torch.ones(4)
    weights.prepare(1.0)
    weights.step()
    assert weights.skipped == 1
    assert torch.equal(matrix, before[0])
    matrix.grad, vector.grad = torch.randn(4, 4), torch.ones(4)
    weights.prepare(1.0)
    weights.step()
    assert weights.skipped == 1
    assert matrix.isfinite().all()
    assert (matrix != before[0]).any()
    assert (vector < before[1]).all()


def test_a_run_that_only_skips_is_given_up_with_what_it_had() -> None:
    vector = torch.nn.Parameter(torch.ones(2))
    weights = MasterWeights({"v": vector})
    for skipped in range(MAX_SKIPPED + 1):
        assert not weights.lost(), skipped
        vector.grad = torch.full((2,), torch.nan)
        weights.prepare(1.0)
        weights.step()
    assert weights.lost()
    assert torch.equal(weights.averaged()["v"], torch.ones(2))


def test_the_learning_rate_rises_then_falls() -> None:
    assert cosine(0, 0.0, warmup=10) == pytest.approx(0.1)
    assert cosine(100, 0.0, warmup=10) == 1.0
    assert cosine(100, 0.5, warmup=10) == pytest.approx(0.51)
    assert cosine(100, 1.0, warmup=10) == pytest.approx(0.02)


def test_a_fresh_vae_shows_what_it_is_given_and_a_fresh_transformer_says_nothing() -> None:
    torch.manual_seed(0)
    x = pictures(2) * 2 - 1
    with torch.inference_mode():
        mean, log_variance = build_vae().moments(x)
        velocity = build_transformer()(torch.randn(1, 8, 64), torch.randn(1, 3, 128), torch.ones(1), [(2, 2), (2, 2)])
    assert 0.1 < mean.std() < 10
    assert (log_variance < -3).all()
    assert (velocity == 0).all()


def test_pairs_that_are_not_finite_never_enter_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae, scenes, generator = build_vae(), Scenes(torch.device("cpu")), torch.Generator().manual_seed(0)
    filled = pool.Pool(4, scenes, vae, 2.0)
    filled.refill(2, generator)
    held = filled.reference.clone()
    with monkeypatch.context() as patched:
        patched.setattr(type(vae), "encode", lambda self, x: torch.full((len(x), 16, 32, 32), torch.nan))
        filled.refill(2, generator)
    assert torch.equal(filled.reference, held)
    assert (filled.drawn, filled.dropped, int(filled.filled)) == (2, 2, 2)
    filled.refill(2, generator)
    assert (filled.drawn, filled.dropped, int(filled.filled)) == (4, 2, 4)


def test_packing_is_the_engines() -> None:
    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(pool.pack(latents), pack(latents))
    assert torch.equal(pool.unpack(pool.pack(latents), 4, 6), unpack(pack(latents), 4, 6))


def test_the_training_encoder_is_the_packages() -> None:
    """The batched forward over the demo's weights against the encoder that an edit uses."""
    editor = Editor.open("demo", device="cpu")
    ours = editor._model.text_encoder
    wordings = ["make the shirt navy blue", "Take this mug and add red stripes to it"]
    images = [draw_picture(112, 112, seed) for seed in range(2)]
    bpe = prompts.read_tokenizer(DEMO)
    rows = []
    for text in wordings:
        ids = bpe.encode(prompts.edit_plus_prompt(text, 1), add_special_tokens=False).ids
        at = ids.index(prompts.special_id(bpe, "<|image_pad|>"))
        rows.append(ids[:at] + [ids[at]] * 16 + ids[at + 1 :])
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    small = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        batched = encode_prompts(ours.network, padded, small, 64, at)
        hidden, mask = ours.encode(wordings, [(image,) for image in images])
    assert mask is not None
    assert mask.sum(1).tolist() == [len(row) - 64 for row in rows]
    for row in range(2):
        kept = len(rows[row]) - 64
        torch.testing.assert_close(batched[row, :kept], hidden[row, :kept], atol=2e-5, rtol=0)


def test_the_rollout_is_the_engines_euler() -> None:
    """With a velocity that points at one picture from everywhere, each step predicts it and the last one is there."""

    class Straight:
        def encode(self, *args: object) -> Tensor:
            raise NotImplementedError

        def velocity(self, noisy: Tensor, reference: Tensor, txt: Tensor, mask: Tensor, t: Tensor) -> Tensor:
            return (noisy - reference) / t[:, None, None]

    noise, picture = torch.randn(2, 4, 64), torch.randn(2, 4, 64)
    predicted = rollout(Straight(), noise, picture, noise, noise, LIGHTNING_SIGMAS)
    assert len(predicted) == 4
    for x in predicted:
        torch.testing.assert_close(x, picture, atol=1e-5, rtol=1e-5)


def run(monkeypatch: pytest.MonkeyPatch, module: object, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *options])
    module.main()  # type: ignore[attr-defined]


def test_the_whole_recipe_from_data_to_a_folder_that_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of everything: no quality, but every file is there, and diffusers' classes wrote what we open."""
    monkeypatch.setattr(prompts, "TRAINING_WORDINGS", 1)
    monkeypatch.setattr(prompts, "HELD_OUT_WORDINGS", 1)
    monkeypatch.setattr(prompts, "CHOOSING_WORDINGS", 1)
    monkeypatch.setattr(train_vae, "STATISTICS_PICTURES", 4)
    monkeypatch.setattr(train_vae, "STATISTICS_BATCH", 4)
    work = ("--work", str(tmp_path / "work"))
    small = ("--batch", "2", "--device", "cpu")
    filled = ("--pool", "4", "--prefill", "4", "--refill-pairs", "2", "--refill-every", "1", "--validate", "0")
    run(monkeypatch, prompts, *work)
    run(monkeypatch, train_vae, *work, "--steps", "2", *small)
    run(monkeypatch, train_editor, *work, "--steps", "2", *small, *filled)
    run(monkeypatch, train_editor, *work, "--steps", "3", *small, *filled, "--resume")
    unmet = PromptTable(tmp_path / "work", torch.device("cpu")).unmet(repair_encoder.core_ids(tmp_path / "work"))
    trained = load_file(tmp_path / "work" / "editor.safetensors")
    run(monkeypatch, repair_encoder, *work)
    repaired = load_file(tmp_path / "work" / "editor.safetensors")
    words = "encoder.language_model.embed_tokens.weight"
    assert [name for name in trained if not torch.equal(repaired[name], trained[name])] == [words]
    assert (repaired[words][unmet] == 0).all()
    assert torch.equal(repaired[words][~unmet], trained[words][~unmet])
    run(monkeypatch, distill, *work, "--steps", "2", *small, *filled)
    run(monkeypatch, export, *work, "--out", str(tmp_path / "model"))
    lora = load_file(tmp_path / "model" / export.LORA_FILE)
    assert {key.split(".", 2)[2].rsplit(".", 2 if "weight" in key else 1)[0] for key in lora} == set(distill.TARGETS)
    editor = Editor.open(tmp_path / "model", device="cpu")
    from millicent.edits import EditRequest

    result = editor.edit(EditRequest(images=(draw_picture(256, 256),), prompt="make the shirt navy blue", seed=1))
    assert result.image.size == (256, 256)
    assert (result.steps, result.schedule) == (4, "lightning")
    assert isinstance(result.image, Image.Image)


def test_prompts_of_training_end_where_the_mask_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TRAINING_WORDINGS", 1)
    monkeypatch.setattr(prompts, "HELD_OUT_WORDINGS", 1)
    monkeypatch.setattr(prompts, "CHOOSING_WORDINGS", 1)
    prompts.write(tmp_path)
    table = PromptTable(tmp_path, torch.device("cpu"))
    edit = Edit(*(torch.arange(16) % n for n in (7, 25, 3, 8)))
    generator = torch.Generator().manual_seed(0)
    for ids, mask in (
        table.training(edit, generator),
        *(table.of(s, edit, generator) for s in ("training", "choosing", "held_out")),
    ):
        after, end = ids[:, table.prefix_tokens :], table.special["<|endoftext|>"]
        assert after.shape == mask.shape
        assert mask.shape[1] % 8 == 0
        assert torch.equal(after != end, mask)
        assert (after == table.special[IMAGE_PAD]).sum(1).tolist() == [16] * 16
    assert table.prefix_tokens == 64


def test_words_that_training_never_shows_start_and_stay_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a silent word leaves the words after it finite, where a random one of full length would be as loud as they are."""
    monkeypatch.setattr(prompts, "TRAINING_WORDINGS", 4)
    monkeypatch.setattr(prompts, "HELD_OUT_WORDINGS", 1)
    monkeypatch.setattr(prompts, "CHOOSING_WORDINGS", 1)
    prompts.write(tmp_path)
    table, bpe = PromptTable(tmp_path, torch.device("cpu")), prompts.read_tokenizer(tmp_path)
    needs, the, red = (bpe.encode(word).ids[0] for word in (" needs", " the", " red"))
    core = table.unmet(repair_encoder.core_ids(tmp_path))
    assert core[needs]
    assert not core[[the, red, *table.head.tolist(), *table.tail.tolist()]].any()
    trained = table.unmet(table.training_ids())
    assert not trained[[needs, the, red]].any()  # noise shows every word, in no frame
    editor = train_editor.build_editor(table, torch.device("cpu"), torch.float32)
    words = editor.encoder.get_input_embeddings().weight
    silence(editor.encoder, core)
    assert (words[core] == 0).all()
    assert (words[~core].norm(dim=1) > 0).sum() >= (~core).sum() - 1  # transformers zeroes the padding's
    ids = torch.cat([table.head, torch.tensor([red, needs, the]), table.tail])[None]
    hidden = editor.encode(table, ids, torch.zeros(1, 3, 112, 112, dtype=torch.uint8))
    hidden.square().mean().backward()
    assert hidden.isfinite().all()
    assert words.grad is not None
    assert words.grad.isfinite().all()
