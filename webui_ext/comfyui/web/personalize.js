// The studio in ComfyUI's sidebar; and what it tells: an adapter was sent, use it in the workflow.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const ROOT = "/personalize/";
const WIDTH = 420;  // pixels that the sidebar has at least when the studio is opened
let frame = null;

// The studio starts when the tab is opened for the first time, and stays where one was when it is closed.
function render(place) {
  place.style.height = "100%";
  if (!frame) {
    frame = document.createElement("iframe");
    frame.id = "personalize_frame";
    frame.title = "personalize";
    followTheme();
    frame.src = api.fileURL(`${ROOT}-/`);
    Object.assign(frame.style, { width: "100%", height: "100%", border: "0", display: "block" });
  }
  place.replaceChildren(frame);
  requestAnimationFrame(() => widen(place.closest(".p-splitterpanel")));  // it is in the page only then
}

// As ComfyUI's own colours are, which may change at any time.
function followTheme() {
  const places = [document.documentElement, document.body];  // of today's page, and of 2025's
  const tell = () => { frame.dataset.theme = places.some((one) => one.classList.contains("dark-theme")) ? "dark" : "light"; };
  for (const place of places) new MutationObserver(tell).observe(place, { attributeFilter: ["class"] });
  tell();
}

// Where the panel is narrower than the studio can be read in; it can be dragged to any width afterwards.
function widen(panel) {
  if (panel && panel.offsetWidth < WIDTH) Object.assign(panel.style, { flexBasis: `min(${WIDTH}px, 80vw)`, flexShrink: "0", minWidth: "0" });
}

function toast(severity, detail) {
  app.extensionManager.toast?.add({ severity, summary: "personalize", detail, life: 6000 });
}

// A node that loads the adapter, in the middle of what is seen.
function addLoader({ name, trigger, weight }) {
  const node = window.LiteGraph.createNode("PersonalizeLoad");
  const area = app.canvas.visible_area;
  node.pos = [area[0] + area[2] / 2 - 150, area[1] + area[3] / 2 - 100];
  app.graph.add(node);
  const widget = (title) => node.widgets.find((one) => one.name === title);
  const files = widget("file").options.values;
  const file = files.find((one) => one.split(/[\\/]/).pop() === `${name}.safetensors`);
  if (!file) throw new Error(`${name} is not among ComfyUI's LoRAs: send it there first`);
  widget("file").value = file;
  widget("strength").value = String(weight);
  app.graph.setDirtyCanvas(true, true);
  toast("success", trigger ? `A node loads ${name}. Its trigger is ${trigger}: write it into the prompt.` : `A node loads ${name}.`);
}

async function listen(event) {
  if (event.origin !== window.location.origin || !frame || event.source !== frame.contentWindow) return;
  const told = event.data || {};
  try {
    if (told.personalize) await app.refreshComboInNodes();
    if (told.personalize === "prompt") addLoader(told);
  } catch (error) {
    toast("error", error.message);
  }
}

// What the doctor says, on its node.
function showText(node, text) {
  let widget = node.widgets?.find((one) => one.name === "personalize_text");
  if (!widget) {
    const area = document.createElement("textarea");
    area.readOnly = true;
    area.className = "comfy-multiline-input";
    Object.assign(area.style, { fontFamily: "monospace", whiteSpace: "pre" });
    widget = node.addDOMWidget("personalize_text", "text", area, { serialize: false, getValue: () => area.value, setValue: (value) => { area.value = value; } });
    widget.serialize = false;
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 260)]);
  }
  widget.value = text;
}

app.registerExtension({
  name: "personalize.studio",
  setup() {
    window.addEventListener("message", listen);
    app.extensionManager.registerSidebarTab({
      id: "personalize",
      icon: "pi pi-graduation-cap",
      title: "personalize",
      tooltip: "personalize: train, compare, mix and keep adapters",
      type: "custom",
      render,
    });
  },
  beforeRegisterNodeDef(type, data) {
    if (data.name !== "PersonalizeDoctor") return;
    const before = type.prototype.onExecuted;
    type.prototype.onExecuted = function (told) {
      before?.apply(this, arguments);
      if (told?.text) showText(this, told.text.join("\n"));
    };
  },
});
