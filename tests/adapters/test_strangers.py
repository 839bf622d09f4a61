"""Files of other people's code mean to us what they mean to it: every dW, none missing, none extra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import strangers
import torch
from safetensors.torch import save_file
from slow import all_but
from strangers import DTYPES, Stranger

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.adapters.embedding import Embedding
from personalize.errors import AdapterError

pytest.importorskip("lycoris")
DIFFUSERS_READS = [kind for kind in strangers.BY_HAND if kind.startswith("diffusers") and "alphas" not in kind]
dtypes = pytest.mark.parametrize("dtype", all_but({"fp32"}, DTYPES))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strangers")


def assert_understood(stranger: Stranger, path: Path | None = None) -> None:
    """The same dW of the same weights, each to 1e-5 of its norm, and nothing else in the file."""
    adapter, seen = Adapter.load(path or stranger.path), describe(path or stranger.path)
    assert adapter.deltas.keys() == stranger.deltas.keys()
    ours = {name: adapter.deltas[name].delta(weight) for name, weight in stranger.weights.items()}
    assert {name: (dw.shape, dw.dtype) for name, dw in ours.items()} == {
        name: (weight.shape, torch.float32) for name, weight in stranger.weights.items()
    }
    apart = {name: float((ours[name] - dw).double().norm() / dw.double().norm()) for name, dw in stranger.deltas.items()}
    assert {name: distance for name, distance in apart.items() if not distance <= 1e-5} == {}
    assert (seen.unmatched, seen.family) == ((), adapter.family)


def rewritten(stranger: Stranger, path: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """The stranger's file with each tensor changed, or left out."""
    tensors, metadata = strangers.read(stranger.path)
    save_file({key: new for key, tensor in tensors.items() if (new := change(key, tensor)) is not None}, path, metadata)
    return path


# ---------------------------------------------------------------- LyCORIS


@dtypes
@pytest.mark.parametrize("kind", strangers.LYCORIS)
def test_lycoris(folder: Path, kind: str, dtype: str) -> None:
    assert_understood(strangers.lycoris(kind, folder, dtype))


@pytest.mark.parametrize("kind", strangers.LYCORIS)
def test_numbers_may_be_integers_or_have_a_dimension(folder: Path, tmp_path: Path, kind: str) -> None:
    stranger = strangers.lycoris(kind, folder, "fp32")

    def whole(key: str, value: torch.Tensor) -> torch.Tensor:
        return value.long() if value.ndim == 0 and value == value.round() else value

    assert_understood(stranger, rewritten(stranger, tmp_path / "integers.safetensors", whole))
    flat = rewritten(stranger, tmp_path / "flat.safetensors", lambda key, value: value.reshape(1) if value.ndim == 0 else value)
    assert_understood(stranger, flat)


def test_lokr_of_two_whole_halves_has_no_scale(folder: Path, tmp_path: Path) -> None:
    """LyCORIS takes the rank for alpha then; before, it stored the alpha that was asked for, and ignored it as well."""
    stranger = strangers.lycoris("lokr full", folder, "fp32")
    seven = rewritten(stranger, tmp_path / "7.safetensors", lambda key, value: torch.tensor(7.0) if "alpha" in key else value)
    assert_understood(stranger, seven)
    none = rewritten(stranger, tmp_path / "none.safetensors", lambda key, value: None if "alpha" in key else value)
    assert_understood(stranger, none)


@pytest.mark.parametrize("kind", ["locon", "locon tucker", "loha", "loha tucker", "lokr", "lokr both tucker", "glora"])
def test_without_an_alpha_it_is_the_rank(folder: Path, tmp_path: Path, kind: str) -> None:
    stranger = strangers.lycoris(kind, folder, "fp32")
    tensors, _ = strangers.read(stranger.path)
    deltas = {}
    for name, path in strangers.lycoris_names(stranger.deltas).items():
        inner = (f"{name}.{role}" for role in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "b2.weight"))
        rank = next(len(tensors[key]) for key in inner if key in tensors)
        deltas[path] = stranger.deltas[path] * rank / float(tensors[f"{name}.alpha"])
    bare = rewritten(stranger, tmp_path / "bare.safetensors", lambda key, value: None if key.endswith("alpha") else value)
    assert_understood(Stranger(bare, deltas, stranger.weights))


# ---------------------------------------------------------------- peft, diffusers, old tools


@dtypes
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("kind", strangers.PEFT)
def test_peft(folder: Path, kind: str, part: str, dtype: str) -> None:
    assert_understood(strangers.peft(kind, part, folder, dtype))


@pytest.mark.parametrize("kind", strangers.RESIDUAL)
def test_peft_of_a_base_that_it_changed_is_refused(folder: Path, kind: str) -> None:
    """The file alone does not tell dW: that is up @ down less the start, which peft moved into its copy of the base."""
    with pytest.raises(AdapterError, match=kind):
        Adapter.load(strangers.peft(kind, "unet", folder, "fp32").path)


@dtypes
@pytest.mark.parametrize("kind", strangers.DIFFUSERS)
def test_diffusers(folder: Path, kind: str, dtype: str) -> None:
    assert_understood(strangers.diffusers(kind, folder, dtype))


@dtypes
@pytest.mark.parametrize("kind", strangers.BY_HAND)
def test_old_tools(folder: Path, kind: str, dtype: str) -> None:
    assert_understood(strangers.by_hand(kind, folder, dtype))


@pytest.mark.parametrize("kind", ["plain", "metadata", "script", *DIFFUSERS_READS])
def test_diffusers_takes_these_files_for_the_same(folder: Path, kind: str) -> None:
    """The old spellings are not our invention; only `.alpha` behind one is nothing to diffusers, but something to ComfyUI."""
    stranger = strangers.by_hand(kind, folder, "fp32") if kind in strangers.BY_HAND else strangers.diffusers(kind, folder, "fp32")
    theirs = strangers.as_diffusers_reads(stranger.path, tuple(stranger.deltas))
    for path, expected in stranger.deltas.items():
        torch.testing.assert_close(theirs[path], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- words


@dtypes
@pytest.mark.parametrize("kind", strangers.EMBEDDINGS)
def test_words(folder: Path, kind: str, dtype: str) -> None:
    path, tensors = strangers.embedding(kind, folder, dtype)
    vectors = Embedding.load(path).vectors
    parts = {"clip_g": "text_encoder_2"}
    assert vectors.keys() == {parts.get(key, "text_encoder") for key in tensors}
    for key, expected in tensors.items():
        assert torch.equal(vectors[parts.get(key, "text_encoder")], expected.float())
