"""Model families, one file each, and what they share. Names and shapes need no torch.

sd.py, sdxl.py, pocket.py, ...   the families: rows of the table "families" in registry.py
family.py                        what a family is made of, and every weight that follows from it
unet.py   clip.py                networks that several families share: layers, names, configs, forward
noise.py  cond.py                noise schedules and what predictions mean; conditioning
text.py   emphasis.py  tokens.py reading prompts: windows, weights in brackets, CLIP's tokenizer
names.py  recognition.py         what layers are called in files; which family a file or config is of
checkpoint.py                    a base's weights on disk, whichever family it is of
"""
