"""The nodes and routes of personalize in ComfyUI. Standard library and what the host has; nothing is installed there.

table.py    what a node is, and a table of nodes as ComfyUI's V1 mappings or V3 extension
nodes.py    the table: inputs, outputs, and thin functions
values.py   what runs between nodes: adapters with strengths, datasets
client.py   the studio's service, as the nodes use it          training.py  jobs: queued or found again, waited for, cancelled
pictures.py IMAGE <-> files                                    apply.py     adapters onto MODEL and CLIP
core.py     personalize's light core, read from where it lies  host.py      settings and folders of ComfyUI
routes.py   the studio below ComfyUI's own address             studio.py    the one bridge of this process
"""
