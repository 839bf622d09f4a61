"""The doctor: illnesses planted and found, collisions of known size, and predictions that merging then keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from test_adapters import ROWS, make
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Decomposed, Delta, Dense, LowRank, Structured
from personalize.adapters.doctor.collisions import Meeting, collide
from personalize.adapters.doctor.exam import Checkup, examine
from personalize.adapters.doctor.prognosis import predict, suggest
from personalize.adapters.ops.merge import merge, merge_with_report
from personalize.adapters.strengths import grammar as weighting
from personalize.errors import AdapterError, FamilyMismatchError
from personalize.families.names import modules
from personalize.reports.adapter import doctor as checkup
from personalize.reports.adapter import heatmap
from personalize.reports.kit.tables import letter

POCKET = modules(ROWS["pocket"])
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FIRST = "unet.down_blocks.0.resnets.0.conv1"
UI = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def plane(up: Iterable[tuple[int, float]], down: Iterable[tuple[int, float]], path: str = MID) -> LowRank:
    """Rank 1: outputs and inputs as (axis, length) pairs."""
    out, inside = POCKET[path]
    column, row = torch.zeros(out, 1), torch.zeros(1, inside)
    for axis, length in up:
        column[axis, 0] = length
    for axis, length in down:
        row[0, axis] = length
    return LowRank(column, row, 1)


def met(a: Delta, b: Delta, weights: tuple[float, float] = (1, 1), path: str = MID) -> Meeting:
    found = collide([Adapter({path: a}), Adapter({path: b})], weights).at((0, 1))
    assert found
    return found


def codes(found: Checkup) -> dict[str, str]:
    return {finding.code: finding.level for finding in found.findings}


def rewritten(
    path: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None, metadata: dict[str, str] | None = None
) -> Path:
    """The file again with other tensors, or with other metadata."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        kept = metadata if metadata is not None else file.metadata()
    change(tensors)
    save_file(tensors, path, kept)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make(pick="attn1", rank=2, alpha=2).save(tmp_path / "a", metadata={"modelspec.trigger_phrase": "zwx cat"})


# --- one file -------------------------------------------------------------------------------------------------------


def test_a_sound_file(file: Path) -> None:
    found, adapter = examine(file), Adapter.load(file)
    assert found.findings == () and found.worst == "" and found.loads and found.trigger == "zwx cat"
    assert {module.path for module in found.modules} == adapter.deltas.keys()
    assert found.norm == pytest.approx(math.hypot(*(delta.norm() for delta in adapter.deltas.values())))
    row = ROWS["pocket"]
    inside = [delta.norm() for path, delta in adapter.deltas.items() if weighting.block_of(row, path) == "MID"]
    assert found.blocks["MID"] == pytest.approx(math.hypot(*inside))
    assert list(found.blocks) == [block for block in weighting.names(row) if block in found.blocks]


def test_spectra_are_those_of_dense_updates(tmp_path: Path) -> None:
    up, down = torch.eye(192)[:, :4] * torch.tensor([10.0, 1.0, 1.0, 1.0]), torch.eye(192)[:4]
    (module,) = examine(Adapter({MID: LowRank(up, down, 4)}).save(tmp_path / "a")).modules
    shares = torch.tensor([100.0, 1, 1, 1]) / 103
    assert module.effective == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
    assert module.needed == 3 and module.rank == 4 and module.exact  # 102 of 103 are 99.03 %
    assert module.norm == pytest.approx(math.sqrt(103))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_does_not_load_is_named(file: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UI}.lora_up.weight"][3, 1] = value

    with pytest.raises(AdapterError, match="NaN"):
        Adapter.load(rewritten(file, spoil))
    found = examine(file)
    (finding,) = [one for one in found.findings if one.code == "not-finite"]
    assert finding.level == "error" and finding.where == (f"{UI}.lora_up.weight",)
    assert not found.loads and found.worst == "error"
    assert len(found.modules) == sum(found.about.parts.values()) - 1 and math.isfinite(found.norm)


def test_dead_layers(file: Path) -> None:
    def kill(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UI}.lora_up.weight"] *= 0
        tensors[f"{UI.replace('to_q', 'to_k')}.lora_up.weight"] *= 1e-8

    (finding,) = [one for one in examine(rewritten(file, kill)).findings if one.code == "dead"]
    assert {path.rpartition(".")[2] for path in finding.where} == {"to_q", "to_k"}
    rewritten(file, lambda tensors: [tensors[key].zero_() for key in tensors if "lora_up" in key])
    assert codes(examine(file)) == {"empty": "error"}


def test_exploding_layers(file: Path) -> None:
    def burst(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UI}.lora_up.weight"] *= 400

    (finding,) = [one for one in examine(rewritten(file, burst)).findings if one.code == "exploding"]
    assert len(finding.where) == 1 and finding.where[0].endswith("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    assert "1 layer " in finding.what


def test_against_the_base(file: Path) -> None:
    found = examine(file, lambda path: torch.ones(POCKET[path]))
    for module in found.modules:
        assert module.ratio == pytest.approx(module.norm / math.sqrt(math.prod(module.shape)))
    assert "overwhelming" not in codes(found)
    assert codes(examine(file, lambda path: torch.full(POCKET[path], 1e-3)))["overwhelming"] == "warning"
    with pytest.raises(AdapterError, match="the base has no"):
        examine(file, {})


def test_rank_that_is_not_used(tmp_path: Path) -> None:
    thin = make(pick="attn1", rank=2)
    padded = {
        path: LowRank(torch.cat([d.up, torch.zeros(len(d.up), 14)], 1), torch.cat([d.down, d.down.repeat(7, 1)]), 1)
        for path, d in thin.deltas.items()
        if isinstance(d, LowRank)
    }
    found = examine(Adapter(padded).save(tmp_path / "a"))
    assert found.needed == 2 and codes(found) == {"rank-unused": "info"}
    assert codes(examine(make(pick="attn1", rank=16).save(tmp_path / "b"))) == {}


def test_what_metadata_says(tmp_path: Path) -> None:
    path = make("sd1", "attn2.to_k", rank=2, alpha=2).save(tmp_path / "a")
    assert codes(examine(path)) == {}
    said = {"ss_network_dim": "32", "ss_network_alpha": "16", "ss_base_model_version": "sdxl_base_v1-0"}
    found = examine(rewritten(path, metadata=said))
    assert codes(found) == {"metadata-family": "warning", "metadata-rank": "warning", "metadata-alpha": "warning"}
    assert any("A1111 takes it for SDXL" in finding.what for finding in found.findings)
    assert codes(examine(rewritten(path, metadata={}))) == {"metadata-missing": "info"}
    large = make("sdxl", "down_blocks.1.attentions.0.transformer_blocks.0.attn2", rank=1).save(tmp_path / "b")
    assert codes(examine(rewritten(large, metadata={"format": "pt"}))) == {"metadata-missing": "warning"}
    tags = {"ss_tag_frequency": json.dumps({"10_zwx cat": {"a photo": 1, "zwx cat": 5}})}
    assert examine(rewritten(path, metadata=tags)).trigger == "zwx cat"
    assert examine(rewritten(path, metadata={"ss_tag_frequency": "[" * 9})).trigger == ""


def test_alphas(file: Path, tmp_path: Path) -> None:
    rewritten(file, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(".alpha")])
    assert codes(examine(file))["alpha-missing"] == "info"
    peft = make(pick="attn1").save(tmp_path / "b", "peft")
    assert "alpha-missing" not in codes(examine(peft))
    assert codes(examine(rewritten(peft, metadata={}))) == {"alpha-missing": "warning", "dialect-unread": "warning"}
    zero = make(pick="attn1", alpha=2).save(tmp_path / "c")
    rewritten(zero, lambda tensors: tensors.update({f"{UI}.alpha": torch.tensor(0.0)}))
    assert codes(examine(zero))["alpha-zero"] == "warning"


def test_unmatched_keys_and_strange_widths(file: Path, tmp_path: Path) -> None:
    found = examine(rewritten(file, lambda tensors: tensors.update({"lora_unet_nonsense.lora_up.weight": torch.ones(2, 2)})))
    assert codes(found)["unmatched"] == "error" and not found.loads
    odd = Adapter({MID: LowRank(torch.ones(5, 1), torch.ones(1, 7), 1)}).save(tmp_path / "b", "diffusers")
    found = examine(odd)
    assert codes(found)["family-unknown"] == "warning" and list(found.blocks) == ["unet"]


def test_kinds_that_uis_do_not_read(tmp_path: Path) -> None:
    def dora(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UI}.dora_scale"] = torch.ones(96, 1)

    found = examine(rewritten(make(pick="attn1").save(tmp_path / "a"), dora))
    assert codes(found) == {"dora-axis": "error", "needs-base": "info"}
    flags = {"weight": torch.ones(192), "on_input": torch.tensor(0.0)}
    found = examine(Adapter({MID: Structured("IA3", flags, None, (192, 192))}).save(tmp_path / "b"))
    assert codes(found) == {"kind-unread": "warning", "needs-base": "info"} and not found.modules[0].exact
    based = examine(tmp_path / "b.safetensors", {MID: torch.ones(192, 192)})
    assert based.norm == pytest.approx(192) and based.modules[0].ratio == pytest.approx(1) and "needs-base" not in codes(based)
    assert codes(examine(make(pick="conv_in").save(tmp_path / "c"))) == {"outer-layers": "info"}
    large = make("sd1", "attn1.to_q", rank=16).for_family("sd1").save(tmp_path / "e")
    assert codes(examine(large)) == {"fp32": "info"}


def test_names_of_blocks(tmp_path: Path) -> None:
    def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], object]:
        def change(tensors: dict[str, Tensor]) -> None:
            for key, (old, new) in [(key, pair) for key in list(tensors) for pair in pairs if pair[0] in key]:
                tensors[key.replace(old, new)] = tensors.pop(key)

        return change

    sd = make("sd1", "mid_block.attentions", rank=1).save(tmp_path / "sd")
    attention = "mid_block_attentions_0_transformer_blocks_0_attn"
    rewritten(sd, renamed((f"{attention}2", f"{attention}2".replace("mid_block_attentions_0", "middle_block_1"))))
    assert codes(examine(sd)) == {"names-mixed": "warning"}
    rewritten(sd, renamed(("mid_block_attentions_0", "middle_block_1")))
    assert codes(examine(sd)) == {"names-ldm": "warning"}
    large = make("sdxl", "up_blocks.1.resnets.0.conv1", rank=1).save(tmp_path / "xl")
    assert codes(examine(large)) == {}
    rewritten(large, renamed(("output_blocks_3_0_in_layers_2", "up_blocks_1_resnets_0_conv1")))
    assert codes(examine(large)) == {"names-convolution": "warning"}


# --- two adapters ---------------------------------------------------------------------------------------------------


def test_the_same_and_its_opposite() -> None:
    a = make(rank=3) + Adapter({"unet.conv_norm_out": Dense(torch.arange(96.0)), "unet.conv_in.bias": Dense(torch.ones(96))})
    for other, sign in ((a, 1), (-a, -1), (a * 0.1, 1)):
        for one in collide([a, other]).meetings:
            assert (one.cosine, one.inputs, one.outputs, one.overlap) == pytest.approx((sign, 1, 1, 1), abs=1e-6)
        plain, turned = collide([a, other]), collide([a, other], [2, -3])
        whole, reverse = plain.at((0, 1)), turned.at((0, 1))
        assert whole and reverse and reverse.cosine == pytest.approx(-sign, abs=1e-6)
        assert reverse.norms == pytest.approx((2 * whole.norms[0], 3 * whole.norms[1]))


def test_orthogonal_adapters_do_not_collide() -> None:
    one = met(plane([(0, 1)], [(0, 1)]), plane([(1, 1)], [(1, 1)]))
    assert (one.cosine, one.inputs, one.outputs, one.overlap, *one.invaded) == pytest.approx((0,) * 6)
    reading = met(plane([(0, 1)], [(0, 1)]), plane([(1, 1)], [(0, 1)]))
    assert (reading.inputs, reading.outputs, reading.overlap, reading.cosine) == pytest.approx((1, 0, 0, 0))
    assert reading.invaded == pytest.approx((1, 1))
    writing = met(plane([(0, 1)], [(0, 1)]), plane([(0, 1)], [(1, 1)]))
    assert (writing.inputs, writing.outputs, writing.overlap, writing.cosine) == pytest.approx((0, 1, 0, 0))


@pytest.mark.parametrize("angle", [0.2, 0.7, 1.3])
def test_a_known_angle(angle: float) -> None:
    one = met(plane([(0, 3)], [(0, 1)]), plane([(0, 0.2)], [(0, math.cos(angle)), (1, math.sin(angle))]), (1, 2))
    assert one.cosine == pytest.approx(math.cos(angle), abs=1e-6)
    assert (one.inputs, one.outputs) == pytest.approx((math.cos(angle) ** 2, 1), abs=1e-6)
    assert one.norms == pytest.approx((3, 0.4)) and one.invaded == pytest.approx((math.cos(angle) ** 2,) * 2, abs=1e-6)


def test_noise_does_not_count() -> None:
    big, noise = torch.eye(192)[:, :1], 0.01 * torch.eye(192)[:, 2:3]
    a = LowRank(torch.cat([big, noise], 1), torch.cat([torch.eye(192)[:1], torch.eye(192)[2:3]]), 2)
    b = LowRank(torch.cat([torch.eye(192)[:, 1:2], noise], 1), torch.cat([torch.eye(192)[1:2], torch.eye(192)[2:3]]), 2)
    one = met(a, b)
    assert one.overlap < 1e-7 and one.invaded[0] < 1e-3


@pytest.mark.parametrize("path", [MID, FIRST])
def test_measures_are_those_of_dense_updates(path: str) -> None:
    a, b = (make(pick=path.partition(".")[2], rank=r, seed=s).deltas[path] for r, s in ((3, 0), (5, 1)))
    b = b + a * 0.4
    x, y = (delta.delta().flatten(1).double() for delta in (a, b))
    alike = lambda p, q: float((p * q).sum() / (p.norm() * q.norm()))  # noqa: E731
    one = met(a, b, path=path)
    assert one.cosine == pytest.approx(alike(x, y), abs=1e-6)
    assert (one.inputs, one.outputs) == pytest.approx((alike(x.T @ x, y.T @ y), alike(x @ x.T, y @ y.T)), abs=1e-6)
    full = met(Dense(a.delta()), Dense(b.delta()), path=path)
    assert (full.cosine, full.overlap) == pytest.approx((one.cosine, one.overlap), abs=1e-5)


def test_random_adapters_overlap_by_chance() -> None:
    one = collide([make(rank=8, pick="attn", seed=1), make(rank=8, pick="attn", seed=5000)]).at((0, 1))
    assert one and one.overlap == pytest.approx(one.chance, rel=0.02) and abs(one.cosine) < 0.01


def test_layers_that_one_lacks_are_no_collision() -> None:
    a = make(pick="attn1", rank=2)
    half = Adapter({path: delta for path, delta in a.deltas.items() if path.endswith("to_q")})
    one = collide([a, half]).at((0, 1))
    assert one and one.cosine == pytest.approx(one.norms[1] / one.norms[0], abs=1e-6)
    apart = collide([make(pick="attn1.to_q"), make(pick="attn1.to_k")])
    assert apart.meetings == () and suggest(apart)[1][0].before == 0
    assert collide([a, a], [1, 0]).at((0, 1)).overlap == 0  # type: ignore[union-attr]


def test_adapters_that_do_not_go_together() -> None:
    with pytest.raises(FamilyMismatchError, match=r"for pocket, .* for sd1"):
        collide([make(pick="attn1"), make("sd1", "attn2.to_q")])
    with pytest.raises(AdapterError, match="weights"):
        collide([make(pick="attn1")], [1, 2])
    odd = [Adapter({MID: LowRank(torch.ones(n, 1), torch.ones(1, 4), 1)}) for n in (3, 5)]
    with pytest.raises(AdapterError, match="shapes"):
        collide(odd)


def test_updates_that_depend_on_the_base() -> None:
    inner = make(pick="attn1").deltas[MID]
    dora = Adapter({MID: Decomposed(inner, torch.ones(1, 192))})
    assert met(dora.deltas[MID], inner).cosine == pytest.approx(1, abs=1e-6)
    flags = {"weight": torch.ones(192), "on_input": torch.tensor(0.0)}
    ia3 = Adapter({MID: Structured("IA3", flags, None, (192, 192))})
    found = collide([ia3, dora])
    assert found.unknown == 1 and found.meetings == () and predict([ia3, dora], [1, 1]) == ()
    base = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
    known = collide([ia3, dora], base={MID: base})
    one = known.at((0, 1))
    x, y = (adapter.deltas[MID].delta(base).double() for adapter in (ia3, dora))
    assert one and one.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-5)


def test_suggestions_lower_the_collision() -> None:
    a, b = make(pick="unet", rank=2, seed=1), make(pick="unet", rank=2, seed=5000)
    row = ROWS["pocket"]
    planted = {path: a.deltas[path] * 0.3 if weighting.block_of(row, path) == "MID" else d for path, d in b.deltas.items()}
    pair = [a, Adapter(planted)]
    found = collide(pair)
    suggestions, (relief,) = suggest(found)
    assert dict(suggestions[0].factors) == {} and suggestions[0].lbw == "" and suggestions[0].kept == 1
    assert set(suggestions[1].factors) == {"MID"} and suggestions[1].factors["MID"] < 0.01  # it has less of itself there
    assert relief.after < relief.before
    weights = weighting.Weighting(dict.fromkeys(weighting.PARTS.values(), 1.0), suggestions[1].lbw).of(planted, row)
    eased = Adapter({path: delta * weights[path] for path, delta in planted.items()})
    after = collide([a, eased])
    norms = [math.hypot(*one.norms[1].values()) for one in (after, found)]
    assert norms[0] / norms[1] == pytest.approx(suggestions[1].kept)
    met_after = after.at((0, 1))
    assert met_after and met_after.overlap * norms[0] / norms[1] == pytest.approx(relief.after, abs=1e-6)
    assert suggest(collide([a, -a]))[0][1].kept == 0  # opposites: one of them must go
    assert collide([a, a]).twins == ((0, 1),) and suggest(collide([a, a]))[0][1].kept == 1


@pytest.mark.parametrize("pick", ["attentions", "resnets"])
def test_lbw_lists_are_short_where_they_can_be(pick: str) -> None:
    row, a = ROWS["sd1"], make("sd1", pick, rank=1)
    text = suggest(collide([a, -a]))[0][1].lbw
    assert len(text.split(",")) == len(weighting.names(row, attention=pick == "attentions"))
    assert {block for block, weight in weighting.blocks(text, row).items() if not weight} >= set(collide([a]).norms[0])


# --- merges, foreseen -----------------------------------------------------------------------------------------------


def test_predictions_are_what_merging_does() -> None:
    pair, weights = [make(rank=3, seed=1), make(rank=4, seed=5000)], [0.8, -0.5]
    exact = [delta.delta().double() for delta in merge(pair, weights).deltas.values()]
    whole = math.hypot(*(float(dW.norm()) for dW in exact))
    found = {one.rank: one for one in predict(pair, weights, ranks=(1, 2, 4, 6, 7, 64), methods=()) if one.method == "svd"}
    assert set(found) == {1, 2, 4, 6}
    for rank, one in found.items():
        merged, report = merge_with_report(pair, weights, "svd", rank)
        lost = [float((a - b.delta().double()).norm()) for a, b in zip(exact, merged.deltas.values(), strict=True)]
        assert one.exact and rank
        assert one.error == pytest.approx(report.error, abs=1e-6)
        assert one.error == pytest.approx(math.hypot(*lost) / whole, abs=1e-6)


def test_predictions_of_full_updates_and_norms() -> None:
    a = Adapter(
        {
            MID: Dense(torch.randn(192, 192, generator=torch.Generator().manual_seed(0))),
            "unet.conv_norm_out": Dense(torch.ones(96)),
        }
    )
    (_, one, *_) = predict([a, a], [1, 0.5], ranks=(8,), methods=())
    assert one.rank == 8 and one.error == pytest.approx(merge_with_report([a, a], [1, 0.5], "svd", 8)[1].error, abs=1e-6)


@pytest.mark.parametrize("method", ["slerp", "orthogonal", "tsv", "knots", "ties", "dare"])
def test_other_methods_are_tried(method: str) -> None:
    pair, weights = [make(pick="attn1.to_q", rank=2, seed=1), make(pick="attn1.to_q", rank=2, seed=5000)], [1.0, 0.5]
    (one,) = [one for one in predict(pair, weights, methods=(method,), sample=99) if one.method == method]
    plain, merged = merge(pair, weights), merge(pair, weights, method)
    lost = [float((plain.deltas[path].delta() - merged.deltas[path].delta()).norm()) for path in plain.deltas]
    whole = math.hypot(*(delta.norm() for delta in plain.deltas.values()))
    assert one.exact and one.error == pytest.approx(math.hypot(*lost) / whole, abs=1e-5)
    (some,) = [one for one in predict(pair, weights, methods=(method,), sample=3) if one.method == method]
    assert not some.exact and some.layers == 3 and some.error == pytest.approx(one.error, rel=0.5)


def test_what_must_be_made_is_named() -> None:
    three = [make(pick="attn1.to_q", rank=2, seed=seed) for seed in (1, 500, 900)]
    found = {one.method: one for one in predict(three, [1, 1, 1])}
    assert found["ties"].error is None and found["concat"].error == 0 and found["concat"].exact
    assert "slerp" not in found  # takes two
    assert predict([make(pick="attn1")], [0.0]) == ()


# --- shown ----------------------------------------------------------------------------------------------------------


def shown(folder: Path, count: int = 2) -> tuple[list[Checkup], list[Adapter]]:
    said = {"modelspec.trigger_phrase": "zwx \x1b[31mcat"}
    files = [make(pick="attn", rank=2, seed=900 * (i % 2)).save(folder / f"file {i}", metadata=said) for i in range(count)]
    return [examine(path) for path in files], [Adapter.load(path) for path in files]


def test_the_table(tmp_path: Path) -> None:
    checkups, adapters = shown(tmp_path, 3)
    weights = [1, 0.5, -1]
    text = checkup.table(checkups, collide(adapters, weights), predict(adapters, weights))
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    rows = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, rows)) <= 100
    assert "A and C: overlap" in text and "lbw=" in text and "B x 0.5" in text and "svd at rank 4" in text
    assert "-1.000" in text  # the first and the third are the same, and one is taken away
    alone = checkup.table(checkups[:1])
    assert "overlap" not in alone and "MID" in alone and "sound" in alone
    assert [letter(i) for i in (0, 25, 26)] == ["A", "Z", "A1"]


def test_the_table_names_findings(file: Path) -> None:
    text = checkup.table([examine(rewritten(file, lambda tensors: tensors[f"{UI}.lora_up.weight"].fill_(math.nan)))])
    assert "[not-finite]" in text and "1 error" in text and f"{UI}.lora_up.weight" in text.replace("\n" + " " * 15, " ")


def test_json(tmp_path: Path) -> None:
    checkups, adapters = shown(tmp_path)
    told = json.loads(checkup.as_json(checkups, collide(adapters), predict(adapters, [1, 1])))
    assert told.keys() == {"files", "collision", "twins", "suggestions", "relief", "predictions"}
    assert told["files"][0]["blocks"]["MID"] == pytest.approx(checkups[0].blocks["MID"])
    assert told["collision"]["meetings"][-1]["block"] == "all"
    assert json.loads(checkup.as_json(checkups)).keys() == {"files", "predictions"}


def test_the_picture(tmp_path: Path) -> None:
    checkups, adapters = shown(tmp_path)
    opposite = heatmap.heat_map(checkups, collide([adapters[0], -adapters[0]]))
    same = heatmap.heat_map(checkups, collide([adapters[0], adapters[0]]))
    assert opposite.size == same.size and opposite.width < 1600
    blue, red = heatmap.POLES[0], heatmap.POLES[-1]
    count = lambda picture, colour: sum(n for n, c in picture.getcolors(1 << 20) if c == colour)  # noqa: E731
    assert count(opposite, blue) > 5000 > count(opposite, red) and count(same, red) > 5000 > count(same, blue)
    assert heatmap.heat_map(checkups[:1]).height < same.height
