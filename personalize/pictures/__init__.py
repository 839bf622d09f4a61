"""What lies in a folder of pictures, by names alone: one answer for whoever counts, trains, draws or advises. No torch.

files.py      which files are pictures, masks, previews and captions, and what is left out; which names are the same
galleries.py  which folders of a folder are learned from: itself, `10_name class` in it, a project of kohya's
metadata.py   what metadata.jsonl, metadata.csv and captions.txt say of pictures
"""
