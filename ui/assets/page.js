// The little that Gradio's components do not do themselves. Runs before them, so it waits for what they make.
(() => {
  // What is copied is the message as it was written: without the figures under it and without the unseen characters
  // that keep "<" from opening a tag.
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) =>
      write(text.replace(/\s*<(div|span) class="causerie-[^]*$/, "").replaceAll("\u200b", ""));
  }

  // Gradio's two round buttons have no name for those who cannot see them.
  const names = { "submit-button": "Send", "stop-button": "Stop" };
  new MutationObserver(() => {
    for (const [name, label] of Object.entries(names)) {
      const button = document.querySelector(`#composer button.${name}:not([aria-label])`);
      if (button) button.setAttribute("aria-label", label);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  // Another tab has stored its chats. Writing ours would lose its news, so this tab reads them before it is used again.
  let isStale = false;
  const refresh = () => {
    const isBusy = document.querySelector("#composer .stop-button") || document.querySelector("#composer textarea")?.value;
    if (isStale && !isBusy && document.visibilityState === "visible") location.reload();
  };
  window.addEventListener("storage", (event) => {
    if (event.key === "causerie.chats") isStale = true;
  });
  window.addEventListener("focus", refresh);
  document.addEventListener("visibilitychange", refresh);
})();
