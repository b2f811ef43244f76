// What is copied is the message as it was written: without the figures under it and without the unseen characters
// that keep "<" from opening a tag.
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) =>
    write(text.replace(/\s*<(div|span) class="causerie-[^]*$/, "").replaceAll("\u200b", ""));
}
