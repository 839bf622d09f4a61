"""A small host for one pin of gradio: `python host_main.py EXTENSION ROOT PORT`. It loads the extension's scripts as A1111 does.

Its page has the elements that the extension's script looks for; it runs in an environment of its own, without personalize.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

extension, root, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gradio as gr  # noqa: E402
from host_stub import installed  # noqa: E402

SCRIPT = """
window.gradioApp = () => document;
const loaded = [], updated = [], changed = [];
window.onUiLoaded = (one) => loaded.push(one);
window.onAfterUiUpdate = (one) => updated.push(one);
window.onUiTabChange = (one) => changed.push(one);
window.updateInput = (area) => area.dispatchEvent(new Event("input", {bubbles: true}));
setInterval(() => updated.forEach((one) => one()), 200);
setTimeout(() => loaded.forEach((one) => one()), 2000);
"""


def page_with(template: object, head: str) -> object:
    """Gradio's page with scripts and styles of extensions in its head, as A1111 puts them there."""

    def respond(*args: object, **kwargs: object) -> object:
        answer = template(*args, **kwargs)  # type: ignore[operator]
        answer.body = answer.body.replace(b"</head>", head.encode() + b"</head>")
        answer.init_headers()
        return answer

    return respond


with installed(root) as host:
    spec = importlib.util.spec_from_file_location("personalize_studio.py", extension / "scripts" / "personalize_studio.py")
    assert spec and spec.loader
    sys.path.insert(0, str(extension))
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    heard = host["modules.script_callbacks"].heard  # type: ignore[attr-defined]
    for callback in heard["on_ui_settings"]:
        callback()
    tabs = [one for callback in heard["on_ui_tabs"] for one in callback()]
    with gr.Blocks(analytics_enabled=False, title="host") as demo, gr.Tabs(elem_id="tabs"):
        with gr.TabItem("txt2img", elem_id="tab_txt2img"):
            gr.Textbox(elem_id="txt2img_prompt", label="Prompt")
        for tab, title, name in tabs:
            with gr.TabItem(title, id=name, elem_id=f"tab_{name}"):
                tab.render()
    head = (
        f"<script>{SCRIPT}</script><script>{(extension / 'javascript' / 'personalize.js').read_text(encoding='utf-8')}</script>"
    )
    head += f"<style>{(extension / 'style.css').read_text(encoding='utf-8')}</style>"
    gr.routes.templates.TemplateResponse = page_with(gr.routes.templates.TemplateResponse, head)
    app, address, _ = demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    host["modules.shared"].demo = demo  # type: ignore[attr-defined]
    for callback in heard["on_app_started"]:
        callback(demo, app)
    print(f"ready {address} gradio {gr.__version__}", flush=True)
    while True:
        time.sleep(1)
