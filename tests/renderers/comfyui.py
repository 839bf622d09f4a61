"""Runs in ComfyUI's own Python: `python comfyui.py JOB.json`. Nothing of this project is imported; its answer is answers.json.

draw   base.png, adapter.png and baked.png, by ComfyUI's own loaders, patcher and sampler on the CPU in fp32; the weights that
       the second was drawn with are kept in patched.safetensors
map    which weights of a model of these shapes, built without memory, the adapter's keys are found for

What ComfyUI imports besides itself, and Stable Diffusion has no use for, is stood in for where it is not installed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import sys
from pathlib import Path
from unittest.mock import MagicMock

job = json.loads(Path(sys.argv[1]).read_text())
sys.argv = [sys.argv[0], "--cpu", "--force-fp32", "--fp32-text-enc", "--fp32-vae"]
sys.path.insert(0, job["checkout"])
UNUSED = ("torchvision", "torchvision.transforms", "torchaudio", "torchaudio.functional", "kornia", "spandrel", "av")
for name in [name for name in UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]:
    sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __version__="0")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

out, said = Path(job["out"]), []


class Heard(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


logging.getLogger().addHandler(Heard(logging.WARNING))


# ---------------------------------------------------------------- draw


def drawn() -> dict:
    model, clip, vae = loaded(job["base"])
    lora = comfy.utils.load_torch_file(job["adapter"], safe_load=True)
    own, own_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)  # as the node Load LoRA does
    picture(model, clip, vae).save(out / "base.png")
    picture(own, own_clip, vae).save(out / "adapter.png")
    patchers = (own, own_clip.patcher)
    save_file({key: weight(one, key) for one in patchers for key in one.patches}, out / "patched.safetensors")
    del model, clip, lora
    picture(*loaded(job["baked"])).save(out / "baked.png")
    return {"unet": sorted(own.patches), "clip": sorted(own_clip.patcher.patches)}


def loaded(path: str) -> tuple:
    return comfy.sd.load_checkpoint_guess_config(path)[:3]


def picture(model, clip, vae) -> Image.Image:
    side, sigmas = job["size"] // 8, torch.tensor(job["sigmas"])
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(job["seed"]))
    noise *= sigmas[0] / (1 + sigmas[0] ** 2).sqrt()  # at the strongest noise, ComfyUI multiplies by more than its level
    conds = [[[*clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)]] for text in (job["prompt"], "")]
    wanted, against = [[[tokens, {"pooled_output": pooled}]] for [[tokens, pooled]] in conds]
    euler = comfy.samplers.sampler_object("euler")
    options = {"latent_image": torch.zeros_like(noise), "disable_pbar": True, "seed": job["seed"]}
    latents = comfy.sample.sample_custom(model, noise, job["guidance"], euler, sigmas, wanted, against, **options)
    pixels = vae.decode(latents)[0].float()  # [h, w, 3] in [0, 1]
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())


def weight(patcher, key: str) -> torch.Tensor:
    """A weight as the last picture was drawn with it."""
    return comfy.utils.get_attr(patcher.model, key).detach().float().cpu().contiguous()


# ---------------------------------------------------------------- map


def mapped() -> dict:
    shapes = job["shapes"].items()
    meta = {key: "meta" if len(shape) > 1 else "cpu" for key, shape in shapes}  # the spread of a norm's biases tells SD 2's kind
    state = {key: torch.zeros(shape, dtype=torch.float16, device=meta[key]) for key, shape in shapes}
    config = comfy.model_detection.model_config_from_unet(state, "model.diffusion_model.")
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model(state, "model.diffusion_model.", device="meta")
    target = config.clip_target(state_dict=state)
    clip = target.clip(**target.params, dtype=torch.float16, device="meta", model_options={})
    names = comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(model, {}))
    lora = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(job["adapter"], safe_load=True))
    found = comfy.lora.load_lora(lora, names)
    own = {"unet": model.state_dict(), "clip": clip.state_dict()}
    there = {part: sorted(key for key in found if key in state) for part, state in own.items()}
    return there | {"config": type(config).__name__, "nowhere": sorted(set(found) - set(there["unet"]) - set(there["clip"]))}


with torch.inference_mode():
    answers = {"draw": drawn, "map": mapped}[job["task"]]()
(out / "answers.json").write_text(json.dumps(answers | {"version": comfyui_version.__version__, "said": said}))
