// The studio in its tab; what it tells (an adapter was sent, put it into the prompt); what the host sends there.
(function() {
    "use strict";

    const ROOT = "./personalize/";
    const byId = (id) => gradioApp().querySelector(`#${id}`);
    const make = (tag, values = {}, ...inside) => {
        const one = Object.assign(document.createElement(tag), values);
        one.append(...inside);
        return one;
    };

    // ------------------------------------------------------------ the tab

    function frame() {
        return byId("personalize_frame");
    }

    // Shows a room of the studio; it starts where it does not run.
    function show(next = "") {
        const query = next ? `?next=${encodeURIComponent(next)}` : "";
        frame().dataset.theme = document.body.classList.contains("dark") ? "dark" : "light";
        if (next || !frame().src) frame().src = `${ROOT}-/${query}`;
    }

    // Gradio 3 marks the chosen tab by a class, and shows all of them for a moment at first; gradio 4 by an attribute.
    function tabButton() {
        const all = [...gradioApp().querySelectorAll("#tabs > .tab-nav > button, #tabs [role=tab]")];
        return all.find((one) => one.textContent.trim() === "Personalize");
    }

    function openTab(next) {
        tabButton()?.click();
        show(next);
    }

    function showIfChosen() {
        const button = tabButton();
        if (frame() && button && (button.classList.contains("selected") || button.ariaSelected === "true")) show();
    }

    onAfterUiUpdate(showIfChosen);
    onUiTabChange(showIfChosen);
    document.addEventListener("click", () => setTimeout(showIfChosen, 50));  // where the host sees no change

    // ------------------------------------------------------------ asking the studio

    async function ask(path, options = {}) {
        const answer = await fetch(ROOT + path, options);
        const value = await answer.json().catch(() => null);
        if (answer.ok && value) return value;
        const error = value && value.error;
        if (error && error.code === "service_down") {
            openTab();
            throw new Error("The studio was not running. It starts in its tab; then try again.");
        }
        throw new Error(error ? error.message : `The studio answered with ${answer.status}.`);
    }

    const post = (path, value) => ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(value)});

    async function attempt(work) {
        try {
            await work();
        } catch (error) {
            alert(error.message);
        }
    }

    // ------------------------------------------------------------ what the studio tells

    function putIntoPrompt({name, trigger, weight}) {
        const area = gradioApp().querySelector("#txt2img_prompt textarea");
        const word = trigger && !area.value.includes(trigger) ? trigger : "";
        const tag = area.value.includes(`<lora:${name}:`) ? "" : `<lora:${name}:${weight}>`;
        area.value = [area.value.trim(), word, tag].filter(Boolean).join(" ");
        updateInput(area);
        if (typeof switch_to_txt2img === "function") switch_to_txt2img();
    }

    async function refreshLoras() {
        await post("-/refresh", {});
        for (const tab of ["txt2img", "img2img"]) {
            const button = byId(`${tab}_lora_extra_refresh_internal`) || byId(`${tab}_extra_refresh`);
            if (button) button.click();
        }
    }

    window.addEventListener("message", (event) => {
        if (event.origin !== window.location.origin || !frame() || event.source !== frame().contentWindow) return;
        const told = event.data || {};
        if (told.personalize === "sent") attempt(refreshLoras);
        if (told.personalize === "prompt") putIntoPrompt(told);
    });

    // ------------------------------------------------------------ pictures of a gallery, to a dataset

    function pictures(tab) {
        const all = [...gradioApp().querySelectorAll(`#${tab}_gallery .thumbnail-item`)];
        const chosen = all.filter((one) => one.classList.contains("selected"));
        const images = (chosen.length ? chosen : all).map((one) => one.querySelector("img")).filter(Boolean);
        return [...new Set(images.map((one) => one.src))];
    }

    // One question: which dataset? Resolves with its id, "" for a new one with a name, or null.
    function askDataset(count, datasets) {
        const list = make("select", {}, make("option", {value: "", textContent: "a new one"}),
            ...datasets.map((one) => make("option", {value: one.id, textContent: `${one.name} (${one.pictures} pictures)`})));
        const name = make("input", {value: "gallery", autocomplete: "off"});
        const cancel = make("button", {type: "button", textContent: "Cancel"});
        const dialog = make("dialog", {id: "personalize_dialog"}, make("form", {method: "dialog"},
            make("b", {textContent: `Send ${count} picture${count === 1 ? "" : "s"} to a dataset`}),
            make("label", {textContent: "Dataset"}, list), make("label", {textContent: "Name of the new one"}, name),
            make("menu", {}, cancel, make("button", {value: "send", textContent: "Send"}))));
        list.onchange = () => { name.parentElement.hidden = Boolean(list.value); };
        cancel.onclick = () => dialog.close();
        document.body.append(dialog);
        dialog.showModal();
        return new Promise((resolve) => {
            dialog.onclose = () => {
                dialog.remove();
                resolve(dialog.returnValue === "send" ? {id: list.value, name: name.value.trim()} : null);
            };
        });
    }

    async function sendPictures(tab) {
        const sources = pictures(tab);
        if (!sources.length) throw new Error("There is no picture here yet.");
        const own = (await ask("api/datasets")).data.filter((one) => one.own !== false);
        const to = await askDataset(sources.length, own);
        if (!to) return;
        const data = new FormData();
        for (const source of sources) {
            const blob = await (await fetch(source)).blob();
            const name = decodeURIComponent(source.split(/[?#]/)[0].split(/[\\/]/).pop());
            data.append("files", blob, /\.(png|jpe?g|webp)$/i.test(name) ? name : "picture.png");
        }
        if (!to.id && to.name) data.append("name", to.name);
        const made = await ask(to.id ? `api/datasets/${encodeURIComponent(to.id)}/files` : "api/datasets", {method: "POST", body: data});
        openTab(`dataset/${encodeURIComponent(to.id || made.id)}`);
    }

    onUiLoaded(() => {
        for (const tab of ["txt2img", "img2img", "extras"]) {
            const row = byId(`image_buttons_${tab}`)?.querySelector(".form, .gr-group") || byId(`image_buttons_${tab}`);
            const example = row?.querySelector("button");
            if (!example) continue;
            const button = make("button", {className: example.className, id: `${tab}_send_to_personalize`, type: "button",
                textContent: "🎓", title: "Send the picture to a dataset of personalize (all of them, if none is chosen)"});
            button.onclick = () => attempt(() => sendPictures(tab));
            row.append(button);
        }
    });

    // ------------------------------------------------------------ the context menu of a LoRA's card

    // The studio keeps a copy, and works on that: the file of the host stays as it is.
    async function bring(name) {
        return post("api/adapters/bring", await post("-/lora", {name}));
    }

    const ENTRIES = {
        "Check its health": async(name) => {
            const adapter = await bring(name);
            await post("api/jobs", {kind: "doctor", settings: {files: [adapter.id]}, name: `health of ${name}`});
            openTab(`library#${adapter.id}`);  // which shows what the doctor finds as soon as it does
        },
        "Resize …": async(name) => {
            const rank = Number(prompt(`The rank that ${name} should have:`, "16"));
            if (!rank) return;
            const adapter = await bring(name);
            const settings = {file: adapter.id, rank, output: `${name}-rank${rank}`};
            openTab(`jobs/${(await post("api/jobs", {kind: "resize", settings, name: `resize ${name}`})).id}`);
        },
        "Mix and merge": async(name) => openTab(`mix?adapter=${(await bring(name)).id}`),
    };

    function closeMenu() {
        document.querySelector("#personalize_menu")?.remove();
    }

    document.addEventListener("contextmenu", (event) => {
        closeMenu();
        const card = event.composedPath().find((one) => one.matches && one.matches(".card[data-name]"));
        if (!card || !card.closest("[id*=lora]")) return;
        event.preventDefault();
        const menu = make("nav", {id: "personalize_menu"}, ...Object.entries(ENTRIES).map(([label, work]) =>
            make("button", {type: "button", textContent: label, onclick: () => attempt(() => work(card.dataset.name))})));
        document.body.append(menu);
        Object.assign(menu.style, {left: `${Math.min(event.pageX, window.scrollX + innerWidth - 200)}px`, top: `${event.pageY}px`});
        menu.querySelector("button").focus();
    });
    document.addEventListener("click", closeMenu);
    document.addEventListener("keydown", (event) => event.key === "Escape" && closeMenu());
})();
