"""Runs in a Python that has stable-diffusion-cpp-python: `python sdcpp.py JOB.json`. Nothing of this project is imported.

Draws NAME.png with the base, with the base and the adapter, and with the baked checkpoint; answers.json holds what it said.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import stable_diffusion_cpp.stable_diffusion_cpp as library
from stable_diffusion_cpp import StableDiffusion

job, said = json.loads(Path(sys.argv[1]).read_text()), []


@library.sd_log_callback
def heard(level, text, data):
    said.append(text.decode("utf-8", "replace").strip())


def draw(checkpoint: str, name: str, prompt: str) -> None:
    model = StableDiffusion(model_path=checkpoint, rng_type="cpu", sampler_rng_type="cpu", n_threads=1, verbose=False)
    library.sd_set_log_callback(heard, None)
    drawn = model.generate_image(
        prompt=prompt,
        width=job["size"],
        height=job["size"],
        seed=job["seed"],
        cfg_scale=job["guidance"],
        sample_method="euler",
        sample_steps=len(job["sigmas"]) - 1,
        sigmas=",".join(map(str, job["sigmas"])),
    )
    drawn[0].save(Path(job["out"], f"{name}.png"))


draw(job["base"], "base", job["prompt"])
draw(job["base"], "adapter", f"{job['prompt']} <lora:{job['adapter']}:1>")
draw(job["baked"], "baked", job["prompt"])
answers = {"version": importlib.metadata.version("stable-diffusion-cpp-python"), "said": said}
Path(job["out"], "answers.json").write_text(json.dumps(answers))
