"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, props = {}, ...inside) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...inside);
    return node;
  };
  // The same picture elsewhere: source, sharpness and size come along.
  const put = (image, from) => {
    image.src = from.src;
    image.alt = from.alt;
    image.width = from.width;
    image.height = from.getAttribute("height");
    image.setAttribute("width", from.getAttribute("width"));
    image.className = from.className;
    image.style.cssText = from.style.cssText;
    return image;
  };
  document.documentElement.classList.add("js");

  // Slider at the top, and the other pairs to choose from.
  const wipe = document.querySelector(".wipe");
  if (wipe && wipe.children.length === 2) {
    const range = make("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50, ariaLabel: "from base to adapter" });
    range.oninput = () => { wipe.style.animation = "none"; wipe.style.setProperty("--cut", range.value + "%"); };
    wipe.append(range, make("span", { className: "knob", textContent: "\u2194" }));
    const shown = all("img", wipe), caption = document.querySelector(".show > figcaption");
    const pairs = all(".pair").filter((pair) => all("img", pair).length === 2).slice(0, 8);
    const picks = pairs.map((pair) => {
      const images = all("img", pair);
      const pick = make("button", { type: "button", title: pair.dataset.strip }, put(new Image(), images[1]));
      pick.setAttribute("aria-pressed", String(images[1].src === shown[1].src));
      pick.onclick = () => {
        picks.forEach((other) => other.setAttribute("aria-pressed", String(other === pick)));
        images.forEach((image, i) => put(shown[i], image));
        const [prompt, seed] = pair.dataset.strip.split(" \u00b7 seed ");
        caption.replaceChildren(make("q", { textContent: prompt }), " ", make("small", { textContent: "seed " + seed }));
      };
      return pick;
    });
    if (picks.length > 1) document.querySelector(".picks").append(...picks);
  }

  // A range over frames, with a label and a play button; show(i) draws the frame.
  const turn = (labels, start, show) => {
    const range = make("input", { type: "range", min: 0, max: labels.length - 1, step: 1, value: start, ariaLabel: "frame" });
    const label = make("output"), play = make("button", { type: "button", textContent: "\u25b6\ufe0e", title: "play" });
    let timer = 0;
    const draw = () => { label.textContent = labels[range.value]; show(+range.value); };
    const stop = () => { clearInterval(timer); timer = 0; play.textContent = "\u25b6\ufe0e"; };
    const go = (by) => { range.value = (+range.value + by + labels.length) % labels.length; draw(); };
    range.oninput = () => { stop(); draw(); };
    play.onclick = () => {
      if (timer) return stop();
      play.textContent = "\u275a\u275a";
      timer = setInterval(go, 700, 1);
      go(1);
    };
    draw();
    return { node: make("div", { className: "turn" }, play, range, label), go: (by) => { stop(); go(by); }, stop };
  };

  // Dials: one row of pictures per prompt, shown large, all turned together.
  all(".dial").forEach((dial) => {
    const grid = dial.nextElementSibling, rows = all("[data-stage]", grid);
    if (!rows.length) return;
    const stages = rows.map((row) => ({ from: all("img", row), image: new Image(), row }));
    const figures = stages.map(({ image, row }) => make("figure", {}, image, make("figcaption", { textContent: row.dataset.stage })));
    const labels = stages[0].from.map((image) => image.dataset.label), one = labels.indexOf("strength 1");
    const start = one < 0 ? labels.length - 1 : one;
    const show = (i) => stages.forEach(({ from, image }) => put(image, from[i]));
    dial.append(make("div", { className: "stages" }, ...figures), turn(labels, start, show).node);
    stages.forEach(({ from, image }) => { image.onclick = () => open(from, from.findIndex((one) => one.src === image.src)); });
    dial.hidden = false;
  });

  // Any picture large; arrow keys leaf through its row.
  let leaf = null;
  const dialog = make("dialog", { onclick: (event) => { if (!event.target.closest(".turn")) dialog.close(); } });
  dialog.onclose = () => leaf && leaf.stop();
  document.body.append(dialog);
  const open = (images, at) => {
    const large = new Image(), title = images[0].closest("[data-strip]").dataset.strip;
    leaf = turn(images.map((image) => image.dataset.label), at, (i) => put(large, images[i]));
    dialog.replaceChildren(large, make("p", { textContent: title }), leaf.node);
    leaf.node.hidden = images.length < 2;
    dialog.showModal();
  };
  all("[data-strip] img").forEach((image) => {
    if (image.closest(".wipe")) return;
    const images = all("img", image.closest("[data-strip]"));
    image.tabIndex = 0;
    image.onclick = () => open(images, images.indexOf(image));
    image.onkeydown = (event) => { if (event.key === "Enter") image.onclick(); };
  });
  addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && dialog.open) { event.preventDefault(); leaf.go(by); }
  });

  // Copy buttons.
  all(".code").forEach((box) => {
    const text = box.querySelector("code").textContent;
    const button = make("button", { type: "button", textContent: "copy" });
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(box.querySelector("code"));
        button.textContent = document.execCommand("copy") ? "copied" : "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    };
    box.append(button);
  });

  // Cross-hair on the curves.
  all(".plot").forEach((plot) => {
    const readings = JSON.parse(plot.dataset.readings);
    const dot = make("span", { className: "hair", hidden: true }), read = make("span", { className: "read", hidden: true });
    plot.append(dot, read);
    plot.onpointermove = (event) => {
      const box = plot.getBoundingClientRect(), x = (100 * (event.clientX - box.left)) / box.width;
      const near = readings.reduce((best, one) => (Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best));
      for (const node of [dot, read]) { node.hidden = false; node.style.left = near[0] + "%"; node.style.top = near[1] + "%"; }
      read.textContent = `${plot.dataset.over} ${near[2]}: ${near[3]}`;
    };
    plot.onpointerleave = () => { dot.hidden = read.hidden = true; };
  });
})();
