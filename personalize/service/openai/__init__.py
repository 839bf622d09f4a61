"""OpenAI's API, as far as it is about training and drawing: the unmodified `openai` client drives this service.

shapes.py   a job, its events and checkpoints as OpenAI's objects: pure functions
names.py    names of models and ids of files, and what they mean here
request.py  what a client sends -> settings of a job
files.py, uploads.py, jobs.py, models.py, images.py   the routes
"""
