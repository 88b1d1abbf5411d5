// The search of an index of pages: rows whose names, tokens or sentences hold all words.
(() => {
  "use strict";
  const sentences = JSON.parse(document.getElementById("sentences").textContent);
  const field = document.querySelector("input[type=search]");
  const count = document.querySelector("output");
  const folded = (text) => text.normalize("NFKC").toLowerCase();
  const entries = [...document.querySelectorAll("tbody tr")].map((row, i) => ({
    row,
    note: row.querySelector(".found"),
    listed: folded(row.textContent),
    sentences: sentences[i].map(folded),
  }));

  // The sentence with its first place of each word marked; text stays text.
  function marked(text, words) {
    const low = folded(text);
    if (low.length !== text.length) return [text];
    const places = words.map((word) => [low.indexOf(word), word.length]).sort((a, b) => a[0] - b[0]);
    const parts = [];
    let at = 0;
    for (const [start, length] of places) {
      if (start < at) continue;
      const mark = document.createElement("mark");
      mark.textContent = text.slice(start, start + length);
      parts.push(text.slice(at, start), mark);
      at = start + length;
    }
    return [...parts, text.slice(at)];
  }

  function search() {
    const words = folded(field.value).split(/\s+/).filter(Boolean);
    const holds = (text) => words.every((word) => text.includes(word));
    let shown = 0;
    entries.forEach((entry, i) => {
      const k = words.length ? entry.sentences.findIndex(holds) : -1;
      entry.row.hidden = !(k >= 0 || holds(entry.listed));
      entry.note.replaceChildren(...(k >= 0 ? marked(sentences[i][k], words) : []));
      shown += entry.row.hidden ? 0 : 1;
    });
    count.textContent = words.length ? `${shown} of ${entries.length} units` : "";
  }

  field.addEventListener("input", search);
  field.value = decodeURIComponent(location.hash.slice(1));
  field.parentElement.hidden = false;
  search();
})();
