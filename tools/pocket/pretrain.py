"""Pretrain the pocket from nothing: `python -m tools.pocket.pretrain --work DIR`. Run again, it goes on where it stopped.

Stages, each resumable: pool (pictures, captions), textures, vae (its decoder), clip, latents, conditions, unet, decoder (again,
on what the UNet draws), export.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from personalize.io import write_text
from personalize.models.clip import Clip

from . import WEIGHTS, autoencoder, clip, diffusion
from .autoencoder import save_picture
from .card import card
from .diffusion import DENSITIES, Teaching
from .pool import build_pool, build_tokenizer, draw_textures, open_pool, write_rows
from .running import Plan, team, work_in_team

GRID = (
    "a red cat on the beach",
    "a large blue house in the snow, ink drawing",
    "pixel art of a green car in the city",
    "a small yellow bird at night",
    "a watercolour of a purple flower in the forest",
    "an orange fish in a room, pastel drawing",
    "a pink umbrella in the desert",
    "a brown dog in a meadow on the left",
)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the CPU recipe."""
    shipped = Teaching()
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.pretrain", description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of pools, states and logs")
    add("--stage", default="all", choices=("all", *STAGES))
    add("--size", type=int, default=64, help="side of the pictures, in pixels")
    add("--pool", type=int, default=120_000, help="pictures drawn")
    add("--seed", type=int, default=1, help="of the pool: another seed draws other pictures")
    add("--start", type=Path, help="a finished base to train on from, e.g. the shipped weights")
    add("--workers", type=int, default=2, help="processes that draw")
    add("--textures", type=int, default=30_000, help="pictures of nothing, from which the decoder learns grain and edges")
    add("--vae-steps", type=int, default=12_000)
    add("--vae-lr", type=float, default=2e-3)
    add("--decoder-steps", type=int, default=1000, help="of the decoder, on what the UNet draws")
    add("--clip-steps", type=int, default=640)
    add("--clip-lr", type=float, default=2e-3)
    add("--unet-steps", type=int, default=5000)
    add("--unet-batch", type=int, default=64)
    add("--processes", type=int, default=1, help="that train, each on a part of a batch: on a CPU, faster than threads")
    add("--unet-lr", type=float, default=2e-3)
    add("--unet-prediction", default=shipped.prediction, choices=("v_prediction", "epsilon", "sample"))
    add(
        "--unet-zero-snr", default=shipped.zero_snr, action=argparse.BooleanOptionalAction, help="the last timestep is pure noise"
    )
    add("--unet-min-snr", type=float, default=shipped.min_snr, help="min-SNR gamma; 0 counts all timesteps alike")
    add("--unet-density", default=shipped.density, choices=tuple(DENSITIES), help="how often each timestep is trained")
    add("--unet-width", type=int, nargs=3, default=shipped.width, help="channels of its levels")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="compile the UNet (needs a C++ compiler)")
    add("--muon", default=True, action=argparse.BooleanOptionalAction, help="it computes in bf16: not for a CPU without")
    add("--bf16", default=None, action=argparse.BooleanOptionalAction, help="(default: where the device computes in it)")
    add("--minutes", type=float, default=0, help="after which a call ends; the same one goes on (0: none)")
    add("--to", type=Path, default=WEIGHTS, help="folder the finished base is written to")
    told = parser.parse_args(words)
    if told.unet_prediction == "epsilon" and told.unet_zero_snr:
        parser.error("epsilon cannot be learned with zero terminal SNR: add --no-unet-zero-snr")
    if told.unet_batch % told.processes:
        parser.error(f"--processes {told.processes} cannot share batches of {told.unet_batch}; try --unet-batch 64")
    fast = computes_bf16(told.device)
    told.bf16 = fast if told.bf16 is None else told.bf16
    if told.muon and not fast:
        print(
            "this CPU has no instructions for bf16, in which Muon computes: steps take many times longer; try --no-muon",
            flush=True,
        )
    return told


def computes_bf16(device: str) -> bool:
    """Whether a device has instructions for bf16; a CPU without them is seventeen times slower in it."""
    if device != "cpu":
        return True
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def teaching_of(options: argparse.Namespace) -> Teaching:
    """What the command line says of the UNet."""
    return Teaching(
        options.unet_prediction, options.unet_zero_snr, options.unet_min_snr, options.unet_density, tuple(options.unet_width)
    )


def load_parts(work: Path) -> tuple[CLIPTokenizer, AutoencoderKL, CLIPModel]:
    """The finished tokenizer, autoencoder and CLIP of a work folder."""
    last = work / "decoder/done"
    return (
        CLIPTokenizer.from_pretrained(work / "tokenizer"),
        AutoencoderKL.from_pretrained(last if last.exists() else work / "vae/done").eval(),
        CLIPModel.from_pretrained(work / "clip/done").eval(),
    )


@torch.no_grad()
def embed(text: CLIPTextModel, ids: Tensor) -> Tensor:
    """Token states `[n, 77, d]` of token numbers `[n, 77]`."""
    return text(ids).last_hidden_state


def text_encoder(model: CLIPModel) -> CLIPTextModel:
    """The text tower of a CLIPModel as the CLIPTextModel that Stable Diffusion uses."""
    text = CLIPTextModel(model.config.text_config)
    have = model.text_model.state_dict()
    want = text.state_dict()
    text.load_state_dict({key: have[key.removeprefix("text_model.")] for key in want})
    return text.eval()


def stage_unpack(options: argparse.Namespace) -> None:
    """With --start: the parts of a finished base, from which the stages go on (with 0 steps, they keep them)."""
    if options.start is None or (options.work / "unet/start").exists():
        return
    vae = AutoencoderKL.from_pretrained(options.start / "vae")
    if same := not options.vae_steps or vae.config.latent_channels == autoencoder.LATENT:
        vae.save_pretrained(options.work / "vae/start")
    old, tokenizer = (CLIPTokenizer.from_pretrained(folder / "tokenizer") for folder in (options.start, options.work))
    whole = Clip.of(options.start)
    assert whole, f"{options.start} has no clip folder"
    clip.carry_over(whole.model, old, tokenizer).save_pretrained(options.work / "clip/start")
    unet = UNet2DConditionModel.from_pretrained(options.start / "unet")
    (unet if same else diffusion.deepen(unet)).save_pretrained(options.work / "unet/start")


def stage_pool(options: argparse.Namespace) -> None:
    build_pool(options.work / "pool", options.pool, options.size, options.seed, options.workers)
    if (tokenizer := options.work / "tokenizer").exists():
        return
    if options.start and not options.clip_steps:  # nobody would teach the text encoder other tokens
        shutil.copytree(options.start / "tokenizer", tokenizer)
    else:
        build_tokenizer(tokenizer, open_pool(options.work / "pool")[1])


def stage_textures(options: argparse.Namespace) -> None:
    if options.vae_steps or options.decoder_steps:
        build_pool(options.work / "textures", options.textures, options.size, options.seed, options.workers, draw_textures)


def stage_vae(options: argparse.Namespace) -> None:
    if not (options.work / "vae/done").exists():
        train_together(options, train_vae)


def train_vae(options: argparse.Namespace) -> None:
    """Train the decoder to its end, alone or as one of a team; with no steps, a finished autoencoder is kept as it is."""
    start = options.work / "vae/start"
    if start.exists() and not options.vae_steps:
        vae = AutoencoderKL.from_pretrained(start)
    else:
        pools = open_pool(options.work / "pool")[0], open_pool(options.work / "textures")[0]
        vae = AutoencoderKL.from_pretrained(start) if start.exists() else autoencoder.build(*pools)
        plan = Plan(options.vae_steps, batch=20, lr=options.vae_lr, ema=0.998, decay=0.5, muon=options.muon)
        vae = autoencoder.train(options.work / "vae", vae, pools, plan, options.device, options.bf16)
    if team()[0] == 0:
        vae.save_pretrained(options.work / "vae/done")


def stage_clip(options: argparse.Namespace) -> None:
    if not (options.work / "clip/done").exists():
        pictures, captions = open_pool(options.work / "pool")
        tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
        start = options.work / "clip/start"
        fresh = CLIPModel.from_pretrained(start) if options.start else clip.build(tokenizer, pictures.shape[1])
        plan = Plan(options.clip_steps, batch=128, lr=options.clip_lr, ema=0.98, muon=options.muon)
        model = clip.train(
            options.work / "clip",
            fresh,
            pictures,
            clip.tokens(tokenizer, captions),
            tokenizer,
            plan,
            options.device,
            options.bf16,
        )
        model.save_pretrained(options.work / "clip/done")


def stage_latents(options: argparse.Namespace) -> None:
    """Encode all pictures, once."""
    vae = AutoencoderKL.from_pretrained(options.work / "vae/done").eval().to(options.device)
    autoencoder.encode_pool(vae, open_pool(options.work / "pool")[0], options.work / "latents.npy", options.device)


@torch.no_grad()
def stage_conditions(options: argparse.Namespace) -> None:
    """Embed all captions, once: fp16 `[n, 77, d]`."""
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    text = text_encoder(CLIPModel.from_pretrained(options.work / "clip/done")).to(options.device)
    ids = clip.tokens(tokenizer, open_pool(options.work / "pool")[1]).to(options.device)
    write_rows(options.work / "conditions.npy", len(ids), lambda rows: embed(text, ids[rows]).half().cpu().numpy())


def assemble(options: argparse.Namespace, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The ordinary pipeline around a UNet."""
    tokenizer, vae, model = load_parts(options.work)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(model),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=teaching_of(options).scheduler(),
        safety_checker=None,
        feature_extractor=None,
    ).to(options.device)


def stage_unet(options: argparse.Namespace) -> None:
    train_together(options, train_unet)


def train_together(options: argparse.Namespace, train: Callable[[argparse.Namespace], None]) -> None:
    """Train a part in as many processes as were asked for, each on its part of every batch."""
    if options.processes == 1:
        return train(options)
    with TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(work_in_team, (options.processes, Path(meeting) / "team", train, options), options.processes)


def train_unet(options: argparse.Namespace) -> None:
    """Train the UNet to its end, alone or as one of a team."""
    tokenizer, vae, model = load_parts(options.work)
    latents, conditions = (np.load(options.work / f"{name}.npy", mmap_mode="r") for name in ("latents", "conditions"))
    empty = embed(text_encoder(model), clip.tokens(tokenizer, [""]))[0]

    def picture(unet: UNet2DConditionModel, step: int) -> None:
        if step % 1000:
            return
        pipe = assemble(options, unet)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(len(GRID))]
        drawn = pipe(list(GRID), num_inference_steps=20, guidance_scale=3.0, generator=generators, output_type="pt").images
        save_picture(
            torch.cat([torch.cat(list(drawn[:4]), -1), torch.cat(list(drawn[4:]), -1)], -2) * 2 - 1,
            options.work / f"unet/sample-{step:06d}.png",
            3,
        )

    plan = Plan(options.unet_steps, options.unet_batch, options.unet_lr, warmup=300, ema=0.9995, muon=options.muon)
    teaching = teaching_of(options)
    unet = diffusion.train(
        options.work / "unet",
        fresh_unet(options),
        teaching,
        latents,
        conditions,
        empty,
        plan,
        options.device,
        options.bf16,
        options.compile,
        autoencoder.visibility(vae, torch.from_numpy(np.array(latents[:16], np.float32))).to(options.device),
        picture,
    )
    if team()[0] == 0:
        unet.save_pretrained(options.work / "unet/done")


def stage_decoder(options: argparse.Namespace) -> None:
    if options.decoder_steps and not (options.work / "decoder/done").exists():
        train_together(options, train_decoder)


def train_decoder(options: argparse.Namespace) -> None:
    """Train the decoder on to make clean pictures of what the UNet draws, alone or as one of a team."""
    tokenizer, vae, model = load_parts(options.work)
    empty = embed(text_encoder(model), clip.tokens(tokenizer, [""]))
    redraw = diffusion.redraw(finished_unet(options), teaching_of(options), empty, options.device)
    pools = open_pool(options.work / "pool")[0], open_pool(options.work / "textures")[0]
    plan = Plan(options.decoder_steps, batch=20, lr=options.vae_lr / 2, ema=0.995, decay=0.6, muon=options.muon)
    vae = autoencoder.train(options.work / "decoder", vae, pools, plan, options.device, options.bf16, redraw)
    if team()[0] == 0:
        vae.save_pretrained(options.work / "decoder/done")


def stage_export(options: argparse.Namespace) -> None:
    """Write the diffusers folder, fp16, in files of at most 12 MB, with the CLIP and a model card beside it."""
    assemble(options, finished_unet(options)).to("cpu", torch.float16).save_pretrained(
        options.to, safe_serialization=True, max_shard_size="12MB"
    )
    whole = CLIPModel.from_pretrained(options.work / "clip/done").half()
    own = {key: t for key, t in whole.state_dict().items() if not key.startswith("text_model.")}  # that is text_encoder/
    whole.save_pretrained(options.to / "clip", state_dict=own)
    for file in options.to.glob("*/config.json"):  # where a part was read from is nobody's business
        told = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        write_text(file, json.dumps(told, indent=2, sort_keys=True) + "\n")
    (options.to / "README.md").write_text(card(options, teaching_of(options).describe()))


def fresh_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    """The UNet before its first step: that of --start, or one with random weights for the latents that there are."""
    if options.start:
        return UNet2DConditionModel.from_pretrained(options.work / "unet/start")
    return teaching_of(options).build(*np.load(options.work / "latents.npy", mmap_mode="r").shape[2:0:-1])


def finished_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    """The trained UNet; of an unfinished run, the average so far."""
    if (done := options.work / "unet/done").exists():
        return UNet2DConditionModel.from_pretrained(done)
    unet = fresh_unet(options)
    tensors = load_file(options.work / "unet/state.safetensors")
    unet.load_state_dict({key.removeprefix("ema/"): t for key, t in tensors.items() if key.startswith("ema/")})
    return unet


STAGES = {
    "pool": stage_pool,
    "textures": stage_textures,
    "unpack": stage_unpack,
    "vae": stage_vae,
    "clip": stage_clip,
    "latents": stage_latents,
    "conditions": stage_conditions,
    "unet": stage_unet,
    "decoder": stage_decoder,
    "export": stage_export,
}


def run(options: argparse.Namespace, stages: Iterable[str] = STAGES) -> None:
    """Some stages, in their order; what is done already is kept."""
    for name in stages:
        STAGES[name](options)


class TimeOver(KeyboardInterrupt):
    """The minutes of a call are over."""


def end_after(minutes: float) -> None:
    """Raise TimeOver in so many minutes, wherever the work is then: every stage goes on from its last state."""

    def ring(*_: object) -> None:
        raise TimeOver

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def main() -> int:
    """Run what the command line asks for; exit code 130 after Ctrl-C, 0 when the time is over."""
    chosen = arguments()
    end_after(chosen.minutes)
    try:
        run(chosen, STAGES if chosen.stage == "all" else [chosen.stage])
    except KeyboardInterrupt as end:
        print("stopped; the same command goes on", flush=True)
        return 0 if isinstance(end, TimeOver) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
