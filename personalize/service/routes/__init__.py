"""The service's own routes, under /api.

common.py    what routes share: the studio of a request, bodies and answers
jobs.py      the queue, events as they happen, files of a job, samples, checkpoints
datasets.py  pictures and captions, sent, checked and edited
library.py   adapters: listed, described, sent, copied into the folder of an image UI
recipes.py   presets, schemas of the forms, a recipe resolved
"""
