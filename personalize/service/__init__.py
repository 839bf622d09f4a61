"""The service: jobs, datasets and adapters of a workspace over HTTP. It trains and draws nothing itself: workers of jobs do.

app.py        the FastAPI app of a workspace           serve.py      the process: uvicorn, the engine, an end without loss
options.py    what a service is started with           studio.py     what all routes share
security.py   Host, Origin, token, what browsers may   errors.py     one JSON shape for everything that goes wrong
paths.py      names and paths from strangers           archives.py   zip archives from strangers
uploads.py    files that are sent, looked at aside     files.py      files as they were sent: OpenAI's files and uploads
datasets.py   folders of pictures and their captions   library.py    adapters, told from their headers
requests.py   settings of jobs from requests           live.py       events as they happen, encoded once for everybody
records.py    jobs as JSON                             openapi.py    the document, with the schema of each kind of job
watch.py      what jobs have told, read once            hosts.py      image UIs on this machine, and their folders
votes.py      which of two pictures people like better
routes/       our own routes, under /api               openai/       OpenAI's, under /v1
prefix.py     the page below a prefix, inside of image UIs
page/         the page
"""
