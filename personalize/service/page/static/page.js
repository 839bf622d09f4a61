// What htmx has no words for: pictures dropped, pictures looked at, and what a swap would make a person lose.
"use strict";

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

// ---------------------------------------------------------------- messages

function say(what, hint = "") {
  const note = document.createElement("div");
  note.className = "note bad";
  note.setAttribute("role", "alert");
  for (const [tag, text] of [["b", what], ["span", hint]]) {
    if (text) note.append(Object.assign(document.createElement(tag), { textContent: text }));
  }
  note.append(Object.assign(document.createElement("button"), { className: "close", textContent: "×" }));
  note.lastChild.dataset.close = "";
  note.lastChild.setAttribute("aria-label", "Close");
  $("#toast").replaceChildren(note);
}

function sayError(status, text) {
  try {
    const error = JSON.parse(text).error;
    say(error.hint ? error.message.replace(` (${error.hint})`, "") : error.message, error.hint);
  } catch {
    say(`The studio answered with an error (${status}).`, "Its log says more.");
  }
}

document.addEventListener("htmx:beforeSwap", (event) => {
  const answer = event.detail.xhr;
  if (answer.status >= 400 && !(answer.getResponseHeader("content-type") || "").includes("html")) {
    event.detail.shouldSwap = false;
    sayError(answer.status, answer.responseText);
  }
});
document.addEventListener("htmx:sendError", () => say("The studio does not answer.", "Is it still running? Start it again with: personalize ui"));
document.addEventListener("click", (event) => {
  if (event.target.closest("[data-close]")) event.target.closest(".note").remove();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("#toast").replaceChildren();
});

// ---------------------------------------------------------------- what an update must not undo: opened details, crisp pictures

Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) =>
  !(name === "open" && node.tagName === "DETAILS") && !(name === "class" && node.tagName === "IMG");

// ---------------------------------------------------------------- pictures: small ones keep their pixels; a press shows them large

document.addEventListener("load", (event) => {
  const image = event.target;
  if (image.tagName === "IMG") image.classList.toggle("crisp", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
}, true);
document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.images) if (image.complete && image.naturalWidth && image.naturalWidth <= 128) image.classList.add("crisp");
});

let looking = null;
function look(image) {
  looking = image;
  const viewer = $("#viewer");
  $("img", viewer).src = image.dataset.view;
  $("img", viewer).alt = $("p", viewer).textContent = image.alt;
  if (!viewer.open) viewer.showModal();
}
document.addEventListener("click", (event) => {
  const image = event.target.closest("[data-view]");
  if (image) look(image);
  else if (event.target.closest("#viewer .close") || event.target.id === "viewer") $("#viewer").close();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("[data-view]")) look(event.target);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && $("#viewer").open) {
    const all = $$("[data-view]");
    const next = all[all.findIndex((one) => one === looking || one.dataset.view === looking.dataset.view) + step];
    if (next) look(next);
  }
});

// ---------------------------------------------------------------- pictures, dropped or chosen, also whole folders

async function filesOf(entry, path = "") {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [[path + file.name, file]];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    for (const one of some) found.push(...await filesOf(one, `${path}${entry.name}/`));
  }
  return found;
}

function send(form, files) {
  if (!files.length) return;
  const data = new FormData();
  for (const [name, file] of files) data.append("files", file, name);
  const request = new XMLHttpRequest();
  const box = $(".sending", form);
  const bar = $("progress", box);
  const text = $("span", box);
  box.hidden = false;
  request.upload.onprogress = (event) => {
    if (!event.lengthComputable) return;
    bar.max = event.total;
    bar.value = event.loaded;
    text.textContent = event.loaded < event.total ? `${Math.round((100 * event.loaded) / event.total)} %` : "looking at them …";
  };
  request.onload = () => {
    box.hidden = true;
    const next = request.getResponseHeader("HX-Redirect");
    if (next) window.location.assign(next);
    else if (request.status === 204) htmx.trigger(document.body, "changed");
    else $("#toast").innerHTML = request.responseText;
  };
  request.onerror = () => { box.hidden = true; say("The pictures could not be sent.", "Is the studio still running?"); };
  request.onabort = () => { box.hidden = true; };
  $("button", box).onclick = () => request.abort();
  request.open("POST", form.action);
  request.setRequestHeader("HX-Request", "true");
  request.send(data);
}

document.addEventListener("change", (event) => {
  const form = event.target.closest("[data-drop]");
  if (form && event.target.type === "file") {
    send(form, [...event.target.files].map((file) => [file.webkitRelativePath || file.name, file]));
    event.target.value = "";
  }
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, async (event) => {
    const form = $("[data-drop]");
    if (!form || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    form.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind !== "drop") return;
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
    const lists = entries.length ? await Promise.all(entries.map((one) => filesOf(one))) : [[...event.dataTransfer.files].map((file) => [file.name, file])];
    send(form, lists.flat());
  });
}

// ---------------------------------------------------------------- keys that press what they stand for

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea, select") || $("#viewer").open) return;
  const button = $(`[data-key="${event.key}"]`);
  if (button) {
    event.preventDefault();
    button.click();
  }
});

// ---------------------------------------------------------------- the brush: white is learned, black is not

const brush = { erase: false, at: null, name: "" };

function openBrush(button) {
  const dialog = $("#brush");
  const image = $("img", dialog);
  const canvas = $("canvas", dialog);
  brush.name = button.dataset.name;
  setErase(false);
  image.onload = () => {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    fillMask("rgba(0,0,0,0)");
    if (button.dataset.before) {
      const before = new Image();
      before.onload = () => paintMask(before);
      before.src = button.dataset.before;
    }
    dialog.showModal();
  };
  image.src = button.dataset.brush;
}

function paintMask(picture) {  // a mask as it was saved: what is dark in it is not painted here
  const canvas = $("#brush canvas");
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const learned = pixels.data[i] > 127;
    pixels.data.set([255, 90, 40, learned ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
}

function fillMask(colour) {
  const canvas = $("#brush canvas");
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-over";
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = colour;
  context.fillRect(0, 0, canvas.width, canvas.height);
}

function setErase(on) {
  brush.erase = on;
  $("#brush [data-mask=erase]").setAttribute("aria-pressed", String(on));
}

function stroke(event) {
  const canvas = $("#brush canvas");
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  const to = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = brush.erase ? "destination-out" : "source-over";
  context.strokeStyle = "rgb(255,90,40)";
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = ($("#brush-size").value / 100) * Math.max(canvas.width, canvas.height);
  context.beginPath();
  context.moveTo(...(brush.at || to));
  context.lineTo(to[0] + 0.01, to[1]);
  context.stroke();
  brush.at = to;
}

async function saveMask() {
  const canvas = $("#brush canvas");
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [canvas.width, canvas.height];
  const context = whole.getContext("2d");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set(Array(3).fill(pixels.data[i + 3] > 127 ? 255 : 0).concat(255), i);
  context.putImageData(pixels, 0, 0);
  const blob = await new Promise((resolve) => whole.toBlob(resolve, "image/png"));
  const data = new FormData();
  data.append("file", blob, "mask.png");
  try {
    const answer = await fetch($("#brush").dataset.masks + brush.name, { method: "PUT", body: data });
    if (!answer.ok) return sayError(answer.status, await answer.text());
  } catch {
    return say("The studio does not answer.", "Is it still running?");
  }
  $("#brush").close();
  htmx.trigger(document.body, "changed");
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-brush]");
  if (button) openBrush(button);
  const word = event.target.closest("[data-mask]")?.dataset.mask;
  if (word === "erase") setErase(!brush.erase);
  if (word === "all") fillMask("rgb(255,90,40)");
  if (word === "none") fillMask("rgba(0,0,0,0)");
  if (word === "save") saveMask();
  if (word === "close") $("#brush").close();
});
document.addEventListener("pointerdown", (event) => {
  if (!event.target.matches("#brush canvas")) return;
  event.target.setPointerCapture(event.pointerId);
  brush.at = null;
  stroke(event);
});
document.addEventListener("pointermove", (event) => {
  if (brush.at && event.buttons && event.target.matches("#brush canvas")) stroke(event);
});
document.addEventListener("pointerup", () => { brush.at = null; });
document.addEventListener("keydown", (event) => {
  if (!$("#brush")?.open) return;
  const size = $("#brush-size");
  if (event.key === "[") size.value -= 2;
  if (event.key === "]") size.value = Number(size.value) + 2;
  if (event.key === "e" || event.key === "E") setErase(!brush.erase);
});

// ---------------------------------------------------------------- sliders say their value, and choose what they move

document.addEventListener("input", (event) => {
  if (event.target.type !== "range" || !event.target.closest(".desk")) return;
  $("output", event.target.parentElement).value = event.target.value;
  $("[type=checkbox]", event.target.closest("li")).checked = true;
});

// ---------------------------------------------------------------- a new try makes an old message out of date

document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.requestConfig.verb !== "get") $("#toast").replaceChildren();
});

// ---------------------------------------------------------------- inside of an image UI: what it should know is told to it

const isEmbedded = window.parent !== window;
document.documentElement.classList.toggle("is-embedded", isEmbedded);
const tell = (text) => isEmbedded && window.parent.postMessage(JSON.parse(text), window.location.origin);
document.addEventListener("htmx:afterSwap", (event) => {
  for (const one of $$("[data-tell]", event.target)) tell(one.dataset.tell);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-tell-click]");
  if (button) tell(button.dataset.tellClick);
});
