// In a frame of an image UI: light or dark as that UI says it is (data-theme of the frame), whatever the system prefers.
"use strict";

(() => {
  const frame = window.frameElement;  // null outside of a frame, and in one of a stranger
  if (!frame) return;
  const rules = [];
  for (const sheet of document.styleSheets) {
    for (const rule of sheet.cssRules) {
      if (rule.media?.mediaText.includes("prefers-color-scheme: dark")) rules.push([rule.media, rule.media.mediaText]);
    }
  }
  const follow = () => {
    const theme = frame.dataset.theme || "";
    for (const [media, before] of rules) media.mediaText = { dark: "screen", light: "not all" }[theme] || before;
    document.documentElement.style.colorScheme = theme;
  };
  follow();
  new MutationObserver(follow).observe(frame, { attributeFilter: ["data-theme"] });
})();
