"""What a node is, written once; as ComfyUI's V1 mappings and as its V3 extension. Imports nothing of the host by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PREFIX = "Personalize"
# Comfy's name of a type: its class in V3; others are the plugin's own
IN_V3 = {"STRING": "String", "INT": "Int", "FLOAT": "Float", "BOOLEAN": "Boolean", "COMBO": "Combo", "IMAGE": "Image",
         "MODEL": "Model", "CLIP": "Clip", "HOOKS": "Hooks"}  # fmt: skip
V3_NAMES = {"dynamicPrompts": "dynamic_prompts", "forceInput": "force_input"}  # options that V3 spells otherwise


@dataclass(frozen=True)
class In:
    """An input. A `choices` of a COMBO is asked whenever the page asks for nodes, so that new files are in it."""

    name: str
    type: str
    tooltip: str = ""
    choices: Callable[[], Sequence[str]] | None = None
    optional: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """What the page is told beside the type."""
        return {**self.options, **({"tooltip": self.tooltip} if self.tooltip else {})}


@dataclass(frozen=True)
class Out:
    """An output."""

    name: str
    type: str


@dataclass(frozen=True)
class Shown:
    """What a node returns where its own face shows something too."""

    values: tuple[Any, ...]
    ui: dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A row of the table. `run(node_id, **inputs)` returns a tuple of outputs, or Shown; `fingerprint(**inputs)` tells Comfy's
    cache whether what lies outside of the workflow is as it was. Inputs that are links are None there."""

    name: str
    title: str
    about: str
    inputs: tuple[In, ...]
    outputs: tuple[Out, ...]
    run: Callable[..., Any]
    fingerprint: Callable[..., str] | None = None
    is_output: bool = False
    category: str = "personalize"

    @property
    def id(self) -> str:
        return PREFIX + self.name


# ---------------------------------------------------------------- V1


def as_v1(nodes: Iterable[Node]) -> tuple[dict[str, type], dict[str, str]]:
    """NODE_CLASS_MAPPINGS and NODE_DISPLAY_NAME_MAPPINGS."""
    nodes = list(nodes)
    return {node.id: class_v1(node) for node in nodes}, {node.id: node.title for node in nodes}


def class_v1(node: Node) -> type:
    """A node as V1 has them."""

    def run(self: Any, unique_id: str = "", **inputs: Any) -> Any:
        found = node.run(unique_id, **inputs)
        return {"ui": found.ui, "result": found.values} if isinstance(found, Shown) else found

    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(lambda _: inputs_v1(node)),
        "RETURN_TYPES": tuple(one.type for one in node.outputs),
        "RETURN_NAMES": tuple(one.name for one in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": node.category,
        "DESCRIPTION": node.about,
        "OUTPUT_NODE": node.is_output,
        "run": run,
    }
    if node.fingerprint:
        members["IS_CHANGED"] = classmethod(lambda _, unique_id="", **inputs: node.fingerprint(**inputs))  # type: ignore[misc]
    return type(node.id, (), members)


def inputs_v1(node: Node) -> dict[str, Any]:
    """A node's inputs as V1 has them: a COMBO's type is the list of what it offers."""
    found: dict[str, Any] = {"required": {}, "optional": {}, "hidden": {"unique_id": "UNIQUE_ID"}}
    for one in node.inputs:
        kind: Any = list(one.choices()) if one.choices else one.type
        found["optional" if one.optional else "required"][one.name] = (kind, one.told())
    return found


# ---------------------------------------------------------------- V3


def as_v3(nodes: Iterable[Node], api: Any) -> Any:
    """The extension that `comfy_entrypoint` returns; `api` is `comfy_api.latest`."""
    classes = [class_v3(node, api.io) for node in nodes]

    async def get_node_list(_: Any) -> list[type]:
        return classes

    return type("PersonalizeExtension", (api.ComfyExtension,), {"get_node_list": get_node_list})()


def class_v3(node: Node, io: Any) -> type:
    """A node as V3 has them."""

    def execute(cls: Any, **inputs: Any) -> Any:
        found = node.run(str(cls.hidden.unique_id), **inputs)
        return io.NodeOutput(*found.values, ui=found.ui) if isinstance(found, Shown) else io.NodeOutput(*found)

    members: dict[str, Any] = {"define_schema": classmethod(lambda _: schema_v3(node, io)), "execute": classmethod(execute)}
    if node.fingerprint:
        members["fingerprint_inputs"] = classmethod(lambda _, **inputs: node.fingerprint(**inputs))  # type: ignore[misc]
    return type(node.id, (io.ComfyNode,), members)


def schema_v3(node: Node, io: Any) -> Any:
    """A node's schema."""
    return io.Schema(
        node_id=node.id,
        display_name=node.title,
        category=node.category,
        description=node.about,
        inputs=[input_v3(one, io) for one in node.inputs],
        outputs=[type_v3(one.type, io).Output(id=f"out_{one.name}", display_name=one.name) for one in node.outputs],
        hidden=[io.Hidden.unique_id],
        is_output_node=node.is_output,
    )


def input_v3(one: In, io: Any) -> Any:
    """An input as V3 has it."""
    told = {V3_NAMES.get(name, name): value for name, value in one.told().items()}
    if one.choices:
        told["options"] = list(one.choices())
    return type_v3(one.type, io).Input(one.name, optional=one.optional, **told)


def type_v3(name: str, io: Any) -> Any:
    """A type's class."""
    return getattr(io, IN_V3[name]) if name in IN_V3 else io.Custom(name)
