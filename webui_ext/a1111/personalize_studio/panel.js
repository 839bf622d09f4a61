// Until the studio is there: what there is, how far it is, and the one button that goes on. Then the studio itself.
"use strict";

const $ = (id) => document.getElementById(id);
const wanted = new URLSearchParams(location.search).get("next") || "";
const next = /^[a-z]+([/?#][^\\]*)?$/.test(wanted) && !wanted.includes("//") ? wanted : "";
const giga = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GB`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
let started = false;  // the studio is started once by itself; after a failure, by the button

const SHOWN = {
  ready: () => ["The studio opens …", ""],
  starting: () => ["The studio starts …", "The first time takes a little longer."],
  stopped: (now) => ["The studio is not running.", now.python, "Start the studio", "start"],
  installing: (now) => [`Step ${now.step + 1} of ${now.steps}: ${now.doing} …`, `${now.size > now.disk / 100 ? `${giga(now.size)} of about ${giga(now.disk)} are there.` : `About ${giga(now.disk)} will be there in the end.`} You can go on working meanwhile.`],
  failed: (now) => [`${capital(now.what)}.`, `${capital(now.hint)}.`, now.again === "install" ? "Go on" : "Try again", now.again],
  missing: (now) => now.source
    ? ["Train adapters here, in an environment of their own.",
      `Nothing of this program is changed. ${now.build === "cuda" ? "With torch for NVIDIA cards, about" : "About"} ${giga(now.download)} are downloaded, and ${giga(now.disk)} of ${giga(now.free)} that are free are used, in\n${now.place}\n(with ${now.how}, from ${now.source})`,
      now.enough ? "Make the environment" : "", "install"]
    : ["It is not known what to install.", "Name the folder or the wheel of personalize in the settings of this plugin or in the variable PERSONALIZE_PACKAGE, or a Python that has it in PERSONALIZE_PYTHON."],
};

function show(now) {
  const [lead, about, label = "", action = ""] = SHOWN[now.state](now);
  $("lead").textContent = now.state === "missing" && now.source && !now.enough ? "There is too little room on the disk." : lead;
  $("lead").className = now.state === "failed" ? "bad" : "";
  $("about").textContent = about;
  $("go").hidden = !label;
  $("go").textContent = label;
  $("go").dataset.action = action;
  $("cancel").hidden = now.state !== "installing";
  $("bar").hidden = !["installing", "starting"].includes(now.state);
  if (now.state === "installing" && now.size > now.disk / 100) $("bar").value = Math.min(0.99, now.size / now.disk);
  else $("bar").removeAttribute("value");
  $("more").hidden = !now.log;
  if (now.state === "failed") $("more").open = true;
  if (now.log && now.log !== $("log").textContent) {
    $("log").textContent = now.log;
    $("log").scrollTop = $("log").scrollHeight;
  }
}

async function ask(method, name) {
  const answer = await fetch(name, { method, headers: { Accept: "application/json" } });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error ? value.error.message : `The plugin answered with ${answer.status}.`);
  return value;
}

function fail(error) {
  show({ state: "failed", what: error instanceof TypeError ? "this program does not answer" : error.message, hint: "see whether it still runs", again: "start" });
}

async function press(action) {
  $("go").disabled = $("cancel").disabled = true;
  try {
    show(await ask("POST", action));
  } catch (error) {
    fail(error);
  }
  $("go").disabled = $("cancel").disabled = false;
}

async function look() {
  let pause = 1500;
  try {
    const now = await ask("GET", "status");
    show(now);
    if (now.state === "ready") return location.replace(new URL(`../${next}`, location.href));
    if (now.state === "stopped" && !started) {
      started = true;
      press("start");
      pause = 300;
    }
    if (now.state === "failed") started = true;
    if (now.state === "installing") started = false;  // what was made is to be used
  } catch (error) {
    fail(error);
    pause = 4000;
  }
  setTimeout(look, pause);
}

$("go").addEventListener("click", () => press($("go").dataset.action));
$("cancel").addEventListener("click", () => press("cancel"));
look();
