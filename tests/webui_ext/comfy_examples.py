"""The example workflows of the ComfyUI pack, described once and written in both of ComfyUI's formats.

python tests/webui_ext/comfy_examples.py      # writes webui_ext/comfyui/examples
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy_stub

FOLDER = comfy_stub.PACK / "examples"
SHORT = "sample_every = 30\nsample_steps = 10\nsample_seeds = [0]\ncheckpoint_every = 30"
# Nodes of ComfyUI's own: the names and types of their sockets
OWN = {"PreviewImage": ({"images": "IMAGE"}, {}), "PreviewAny": ({"source": "*"}, {})}


@dataclass(frozen=True)
class Box:
    """A node of a workflow: its column and row, what is written into it, and where its links come from, as (box, output)."""

    kind: str
    at: tuple[int, int]
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, str]] = field(default_factory=dict)


def training(name: str, row: int, sample: str, seed: int, **more: Any) -> dict[str, Box]:
    """Pictures and a short training of them."""
    return {
        f"{name} pictures": Box("PersonalizeDataset", (0, row), {"name": name, "samples": sample}),
        name: Box("PersonalizeTrain", (1, row), {"steps": 60, "rank": 4, "seed": seed, "settings": SHORT, **more},
                  {"dataset": (f"{name} pictures", "dataset")}),
    }  # fmt: skip


EXAMPLES: dict[str, dict[str, Box]] = {
    "train": {
        **training("cat", 0, "subject", 1),
        "samples": Box("PreviewImage", (2, 0), {}, {"images": ("cat", "samples")}),
        "doctor": Box("PersonalizeDoctor", (2, 1), {}, {"adapter": ("cat", "adapter")}),
        "heat map": Box("PreviewImage", (3, 1), {}, {"images": ("doctor", "picture")}),
        "save": Box("PersonalizeSave", (2, 2), {"name": "example-cat", "replace": True}, {"adapter": ("cat", "adapter")}),
    },
    "merge": {
        **training("cat", 0, "subject", 1),
        **training("glass", 1, "style", 2),
        "first": Box("PersonalizeStack", (2, 0), {"strength": "0.8"}, {"adapter": ("cat", "adapter")}),
        "both": Box(
            "PersonalizeStack", (2, 1), {"strength": "0.6"}, {"adapter": ("glass", "adapter"), "stack": ("first", "stack")}
        ),
        "collisions": Box("PersonalizeDoctor", (3, 0), {}, {"adapter": ("both", "stack")}),
        "heat map": Box("PreviewImage", (4, 0), {}, {"images": ("collisions", "picture")}),
        "one": Box("PersonalizeMerge", (3, 1), {"name": "example-glass-cat"}, {"adapter": ("both", "stack")}),
        "small": Box("PersonalizeResize", (4, 1), {"name": "example-glass-cat-4", "rank": 4}, {"adapter": ("one", "adapter")}),
        "what it is": Box("PreviewAny", (5, 1), {}, {"source": ("small", "text")}),
        "save": Box("PersonalizeSave", (5, 2), {"replace": True}, {"adapter": ("small", "adapter")}),
    },
    "schedule": {
        **training("cat", 0, "subject", 1),
        "load": Box("PersonalizeLoad", (2, 0), {"strength": "unet=0@0,1@0.5:te=1", "steps": 20}, {"adapter": ("cat", "adapter")}),
        "what it is": Box("PreviewAny", (3, 0), {}, {"source": ("load", "text")}),
    },
}


def as_api(boxes: dict[str, Box], nodes: dict[str, Any]) -> dict[str, Any]:
    """The format that `POST /prompt` takes."""
    ids, found = {name: str(number) for number, name in enumerate(boxes, 1)}, {}
    for name, box in boxes.items():
        links = {socket: [ids[source], outputs_of(boxes[source].kind, nodes).index(output)] for socket, (source, output) in
                 box.links.items()}  # fmt: skip
        found[ids[name]] = {"class_type": box.kind, "inputs": {**values_of(box, nodes), **links}, "_meta": {"title": name}}
    return found


def values_of(box: Box, nodes: dict[str, Any]) -> dict[str, Any]:
    """What is written into a node, defaults too."""
    inputs = nodes[box.kind].inputs if box.kind in nodes else ()
    return {one.name: box.values.get(one.name, one.options["default"]) for one in inputs if "default" in one.options}


def outputs_of(kind: str, nodes: dict[str, Any]) -> list[str]:
    return [one.name for one in nodes[kind].outputs] if kind in nodes else list(OWN[kind][1])


def as_workflow(boxes: dict[str, Box], nodes: dict[str, Any]) -> dict[str, Any]:
    """The format that the page opens and saves."""
    ids = {name: number for number, name in enumerate(boxes, 1)}
    links = list(links_of(boxes, nodes))
    found = []
    for name, box in boxes.items():
        sockets = sockets_in(box.kind, nodes)
        own = [link for link in links if link[1] == ids[name]]
        into = {link[4]: link[0] for link in links if link[3] == ids[name]}
        outputs = [(one.name, one.type) for one in nodes[box.kind].outputs] if box.kind in nodes else []
        written: list[Any] = []
        for key, value in values_of(box, nodes).items():
            written += [value, "fixed"] if key == "seed" else [value]  # the page has a widget of its own behind a seed
        found.append({
            "id": ids[name], "type": box.kind, "title": name, "pos": [box.at[0] * 460, box.at[1] * 560], "size": [400, 480],
            "flags": {}, "order": ids[name] - 1, "mode": 0,
            "inputs": [{"name": socket, "type": kind, "link": into.get(slot)}
                       for slot, (socket, kind) in enumerate(sockets.items())],
            "outputs": [{"name": socket, "type": kind, "links": [link[0] for link in own if link[2] == slot]}
                        for slot, (socket, kind) in enumerate(outputs)],
            "properties": {"Node name for S&R": box.kind}, "widgets_values": written,
        })  # fmt: skip
    return {"last_node_id": len(boxes), "last_link_id": len(links), "nodes": found, "links": links, "groups": [], "config": {},
            "extra": {}, "version": 0.4}  # fmt: skip


def sockets_in(kind: str, nodes: dict[str, Any]) -> dict[str, str]:
    """The inputs that are no widgets, needed ones first, as the page has them."""
    if kind not in nodes:
        return dict(OWN[kind][0])
    inputs = sorted((one for one in nodes[kind].inputs if "default" not in one.options), key=lambda one: one.optional)
    return {one.name: one.type for one in inputs}


def links_of(boxes: dict[str, Box], nodes: dict[str, Any]) -> Iterator[list[Any]]:
    """[number, from, its output, to, its input, type] of each link."""
    ids, number = {name: number for number, name in enumerate(boxes, 1)}, 0
    for name, box in boxes.items():
        for socket, (source, output) in box.links.items():
            number += 1
            slot = outputs_of(boxes[source].kind, nodes).index(output)
            kind = nodes[boxes[source].kind].outputs[slot].type
            yield [number, ids[source], slot, ids[name], list(sockets_in(box.kind, nodes)).index(socket), kind]


def files(nodes: dict[str, Any]) -> dict[str, str]:
    """File name => what is in it."""
    found = {}
    for name, boxes in EXAMPLES.items():
        found[f"{name}.json"] = json.dumps(as_workflow(boxes, nodes), indent=1) + "\n"
        found[f"{name}.api.json"] = json.dumps(as_api(boxes, nodes), indent=1) + "\n"
    return found


def main() -> None:
    """Write them."""
    with tempfile.TemporaryDirectory() as root, comfy_stub.loaded(Path(root)) as (pack, _):
        FOLDER.mkdir(exist_ok=True)
        for name, text in files({node.id: node for node in pack.NODES}).items():
            (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
