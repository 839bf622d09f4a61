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

// ---------------------------------------------------------------- what a swap must not lose: opened details

let opened = [];
document.addEventListener("htmx:beforeSwap", (event) => {
  opened = $$("details[open] > summary", event.detail.target).map((one) => one.textContent);
});
document.addEventListener("htmx:afterSwap", (event) => {
  for (const one of $$("details > summary", event.detail.target)) {
    if (opened.includes(one.textContent)) one.parentElement.open = true;
  }
});

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
