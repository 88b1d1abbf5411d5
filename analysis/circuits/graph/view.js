// The attribution graph's picture, brought to life: more nodes or fewer, a panel for the node that
// is pointed at, pins, groups and names, and these as a Python call. Text is set as text only.
// What is shown is by the rule of shown.py, and where by the arithmetic of layout.py.
(function () {
  "use strict";
  const FAINT = 0.05, WIDEST = 9, LISTED = 6;
  const STEPS = Array.from({ length: 19 }, (_, i) => (i + 1) / 20);
  const HELP = "Point at a node, or reach it by Tab, for its edges and numbers. Click or Enter " +
    "chooses it, Shift with click or Space several, Escape none; the buttons above are for what " +
    "is chosen. Ctrl with the wheel zooms.";

  function hide(element, hidden) {
    if (hidden) element.setAttribute("display", "none");
    else element.removeAttribute("display");
  }

  function made(tag, text, parent) {
    const element = document.createElement(tag);
    element.textContent = text;
    parent.append(element);
    return element;
  }

  function spaced(cells, near, far) {
    const sorted = [...new Map(cells.map((cell) => [String(cell), cell])).values()]
      .sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const offsets = new Map();
    let offset = 0;
    sorted.forEach((cell, i) => {
      if (i) offset += cell[0] === sorted[i - 1][0] ? near : far;
      offsets.set(String(cell), offset);
    });
    return offsets;
  }

  function view(card) {
    card.dataset.ready = "1";
    const svg = card.querySelector("svg"), frame = card.querySelector(".frame");
    const panel = card.querySelector(".panel"), state = card.querySelector(".state");
    const size = JSON.parse(svg.dataset.sizes);
    const tool = {};
    card.querySelectorAll("[data-do]").forEach((e) => { tool[e.dataset.do] = e; });
    const nodes = [...svg.querySelectorAll("g.node")].map((g, number) => ({
      g, number, id: g.dataset.id, label: g.dataset.label, given: g.dataset.label,
      rank: +g.dataset.rank, column: JSON.parse(g.dataset.column), row: JSON.parse(g.dataset.row),
      group: g.dataset.group || "", pinned: g.classList.contains("pinned"), chosen: false,
      text: g.querySelector("text"), width: g.querySelector("rect").width.baseVal.value,
      lines: g.querySelector("title").textContent.split("\n"),
    }));
    const ranked = nodes.slice().sort((a, b) => a.rank - b.rank);
    const edges = [...svg.querySelectorAll("path")].map((path) => ({
      path, from: nodes[path.dataset.a], to: nodes[path.dataset.b], value: +path.dataset.value,
    }));
    const began = { groups: nodes.some((n) => n.group), pins: nodes.some((n) => n.pinned) };
    let count = +svg.dataset.count, zoom = 1;

    const nameOf = (node) => node.group || node.label;
    const members = (box) => nodes.filter((n) => (box.group ? n.group === box.group : n === box));
    const chosen = () => nodes.filter((n) => n.chosen);

    function curve(a, b, boxes) {
      const y0 = a.y - size.height / 2, y1 = b.y + size.height / 2;
      const bend = Math.max(18, (y0 - y1) * 0.45);
      const others = boxes.filter((n) => n !== a && n !== b);
      let swing = 0, least = Infinity;
      size.swings.forEach((s) => {
        const behind = others.filter((n) => STEPS.some((t) => {
          const near = (1 - t) ** 2 * (1 + 2 * t), far = t ** 2 * (3 - 2 * t), mid = 3 * t * (1 - t);
          const x = near * a.x + far * b.x + mid * s;
          const y = near * y0 + far * y1 + mid * bend * (2 * t - 1);
          return Math.abs(x - n.x) < size.width / 2 && Math.abs(y - n.y) < size.height / 2;
        })).length;
        if (behind < least) [swing, least] = [s, behind];
      });
      return [[a.x, y0], [a.x + swing, y0 - bend], [b.x + swing, y1 + bend], [b.x, y1]];
    }

    // Edges between boxes, those of a group's members added up, the first path standing for all.
    function merged(every) {
      const pairs = new Map();
      edges.forEach((edge) => {
        const a = edge.from.box || (every && edge.from), b = edge.to.box || (every && edge.to);
        if (!a || !b || a === b) return;
        const key = a.number + " " + b.number;
        if (!pairs.has(key)) pairs.set(key, { a, b, value: 0, path: edge.path });
        pairs.get(key).value += edge.value;
      });
      return [...pairs.values()];
    }

    function draw() {
      const first = new Map();
      ranked.forEach((n) => {
        if (n.group && !first.has(n.group)) first.set(n.group, n);
        n.box = n.group ? first.get(n.group) : n.rank < count || n.pinned ? n : null;
      });
      const boxes = nodes.filter((n) => n.box === n);
      const step = size.width + size.gap;
      const across = spaced(boxes.map((n) => n.column), step, step + size.gap);
      const up = spaced(boxes.map((n) => n.row), size.line, size.rise);
      const bottom = Math.max(...up.values()), xs = [], ys = [], rows = new Map();
      boxes.forEach((n) => {
        n.x = across.get(String(n.column));
        n.y = bottom - up.get(String(n.row));
        rows.set(n.row[0], Math.max(n.y, rows.has(n.row[0]) ? rows.get(n.row[0]) : n.y));
        xs.push(n.x - n.width / 2, n.x + n.width / 2);
        ys.push(n.y - size.line, n.y + size.line);
      });
      const pairs = merged(false);
      const limit = Math.max(0, ...pairs.map((p) => Math.abs(p.value)));
      const most = { a: new Map(), b: new Map() };
      pairs.forEach((p) => ["a", "b"].forEach((end) => {
        most[end].set(p[end], Math.max(Math.abs(p.value), most[end].get(p[end]) || 0));
      }));
      edges.forEach((e) => hide(e.path, true));
      pairs.forEach((p) => {
        const value = Math.abs(p.value);
        if (!tool.faint.checked && value < FAINT * limit
          && value !== most.a.get(p.a) && value !== most.b.get(p.b)) return;
        const points = curve(p.a, p.b, boxes), out = 0.75 * (points[1][0] - points[0][0]);
        [points[0][0], points[3][0]].forEach((x) => xs.push(x, x + out));
        points.forEach((point) => ys.push(point[1]));
        const [start, ...rest] = points.map((point) => point.map((v) => v.toFixed(1)).join(" "));
        hide(p.path, false);
        p.path.setAttribute("d", "M" + start + "C" + rest.join(" "));
        p.path.setAttribute("class", p.value >= 0 ? "plus" : "minus");
        p.path.setAttribute("stroke-width", Math.max(0.6, WIDEST * value / limit).toFixed(2));
        p.path.ends = [p.a, p.b];
        p.path.querySelector("title").textContent =
          nameOf(p.a) + " → " + nameOf(p.b) + ": " + signed(p.value);
      });
      nodes.forEach((n) => {
        const there = n.box === n;
        hide(n.g, !there);
        n.chosen = n.chosen && there;
        n.g.classList.toggle("pinned", n.pinned);
        n.g.classList.toggle("grouped", !!n.group);
        n.g.classList.toggle("chosen", n.chosen);
        n.g.setAttribute("aria-pressed", n.chosen);
        n.g.setAttribute("aria-label", nameOf(n) + ", " + n.lines.slice(2).join(", "));
        if (!there) return;
        n.g.setAttribute("transform", "translate(" + n.x.toFixed(1) + " " + n.y.toFixed(1) + ")");
        fit(n, nameOf(n));
      });
      const left = Math.min(...xs) - size.margin, right = Math.max(...xs) + size.gap;
      const top = Math.min(...ys), height = Math.max(...ys) - top;
      svg.querySelectorAll("text.row").forEach((row) => {
        hide(row, !rows.has(+row.dataset.row));
        row.setAttribute("x", (left + 6).toFixed(1));
        row.setAttribute("y", ((rows.get(+row.dataset.row) || 0) + 4).toFixed(1));
      });
      svg.setAttribute("viewBox", [left, top, right - left, height].map((v) => v.toFixed(1)).join(" "));
      svg.setAttribute("width", ((right - left) * zoom).toFixed(1));
      svg.setAttribute("height", (height * zoom).toFixed(1));
      tool.count.value = count;
      tool.count.nextElementSibling.textContent = boxes.length + " of " + nodes.length;
      state.textContent = python();
      state.hidden = state.textContent === "graph";
      highlight(null);
    }

    function fit(node, label) {
      const letters = Array.from(label);
      node.text.textContent = label;
      while (letters.length && node.text.getComputedTextLength() > node.width - 8) {
        letters.pop();
        node.text.textContent = letters.join("") + "…";
      }
    }

    function signed(value) {
      return (value >= 0 ? "+" : "") + value.toPrecision(3);
    }

    // The node that is pointed at, else the one that was chosen last.
    function highlight(pointed) {
      const shown = pointed || chosen()[0];
      svg.classList.toggle("on", !!shown);
      edges.forEach((e) => e.path.classList.toggle("near", (e.path.ends || []).includes(shown)));
      panel.replaceChildren();
      if (!shown) {
        made("div", HELP, panel).className = "muted";
        return;
      }
      const about = made("div", "", panel), group = members(shown);
      made("strong", nameOf(shown), about);
      (group.length > 1
        ? group.map((n) => n.label + ": " + n.lines.slice(2, 4).join(", "))
        : shown.lines.slice(1)).forEach((line) => made("div", line, about));
      const pairs = merged(true);
      listed("in from", pairs.filter((p) => p.b === shown), (p) => p.a);
      listed("out to", pairs.filter((p) => p.a === shown), (p) => p.b);
    }

    function listed(heading, pairs, other) {
      if (!pairs.length) return;
      const table = made("table", "", made("div", "", panel)), head = made("tr", "", table);
      [heading, "relevance"].forEach((text) => { made("th", text, head).scope = "col"; });
      pairs.sort((p, q) => Math.abs(q.value) - Math.abs(p.value)).slice(0, LISTED).forEach((p) => {
        const row = made("tr", "", table), node = other(p);
        made("td", nameOf(node) + (node.box ? "" : " (hidden)"), row);
        made("td", signed(p.value), row);
      });
    }

    function choose(node, more) {
      const was = node.chosen;
      if (!more) nodes.forEach((n) => { n.chosen = false; });
      node.chosen = more ? !was : true;
      tool.name.value = chosen().length === 1 ? nameOf(node) : "";
      nodes.forEach((n) => n.g.classList.toggle("chosen", n.chosen));
      nodes.forEach((n) => n.g.setAttribute("aria-pressed", n.chosen));
      const units = members(node).map((n) => n.id.replace(/@-?\d+$/, ""));
      card.querySelectorAll("details[data-unit]").forEach((page) => {
        page.open = !more && units.includes(page.dataset.unit);
        if (page.open) page.scrollIntoView({ block: "nearest" });
      });
      highlight(node);
    }

    // The Python call that makes this picture again: JSON's strings are Python's, too.
    function python() {
      const ids = (list) => "[" + list.map((n) => JSON.stringify(n.id)).join(", ") + "]";
      const entries = (list) => "{" + list.join(", ") + "}";
      const names = nodes.filter((n) => n.label !== n.given);
      const groups = [...new Set(nodes.map((n) => n.group).filter(Boolean))];
      const pins = nodes.filter((n) => n.pinned);
      let text = "graph";
      if (names.length) {
        text += ".label(" + entries(names.map((n) =>
          JSON.stringify(n.id) + ": " + JSON.stringify(n.label))) + ")";
      }
      if (groups.length || began.groups) {
        text += ".group(" + entries(groups.map((g) =>
          JSON.stringify(g) + ": " + ids(nodes.filter((n) => n.group === g)))) + ")";
      }
      if (pins.length || began.pins) text += ".pin(" + ids(pins) + ")";
      return text;
    }

    const actions = {
      count() { count = +tool.count.value; },
      faint() {},
      name() {},
      rename() {
        const name = tool.name.value.trim();
        if (!name) return tool.name.focus();
        chosen().forEach((box) => members(box).forEach((n) => {
          if (n.group) n.group = name;
          else n.label = name;
        }));
      },
      group() {
        const name = tool.name.value.trim();
        if (!name) return tool.name.focus();
        chosen().flatMap(members).forEach((n) => { n.group = name; });
      },
      ungroup() { chosen().flatMap(members).forEach((n) => { n.group = ""; }); },
      pin() {
        const boxes = chosen().flatMap(members), all = boxes.every((n) => n.pinned);
        boxes.forEach((n) => { n.pinned = !all; });
      },
      in() { zoom = Math.min(4, zoom * 1.25); },
      out() { zoom = Math.max(0.2, zoom / 1.25); },
      fit() { zoom = Math.min(1, frame.clientWidth / svg.viewBox.baseVal.width); },
      copy() {
        state.hidden = false;
        getSelection().selectAllChildren(state);
        if (navigator.clipboard) navigator.clipboard.writeText(state.textContent).catch(() => {});
      },
    };
    Object.entries(tool).forEach(([name, element]) => {
      const event = element.type === "button" ? "click" : "input";
      element.addEventListener(event, () => {
        actions[name]();
        if (name !== "copy") draw();
      });
    });
    nodes.forEach((n) => {
      n.g.setAttribute("tabindex", "0");
      n.g.setAttribute("role", "button");
      n.g.addEventListener("pointerenter", () => highlight(n));
      n.g.addEventListener("pointerleave", () => highlight(null));
      n.g.addEventListener("focus", () => highlight(n));
      n.g.addEventListener("blur", () => highlight(null));
      n.g.addEventListener("click", (e) => choose(n, e.shiftKey));
      n.g.addEventListener("keydown", (e) => {
        if (e.key !== "Enter" && e.key !== " ") return;
        e.preventDefault();
        choose(n, e.key === " " || e.shiftKey);
      });
    });
    card.addEventListener("keydown", (e) => {
      if (e.key !== "Escape") return;
      nodes.forEach((n) => { n.chosen = false; });
      draw();
    });
    frame.addEventListener("wheel", (e) => {
      if (!e.ctrlKey && !e.metaKey) return;
      e.preventDefault();
      actions[e.deltaY < 0 ? "in" : "out"]();
      draw();
    }, { passive: false });
    svg.setAttribute("role", "group");
    frame.setAttribute("tabindex", "0");
    card.querySelectorAll(".tools,.panel").forEach((e) => { e.hidden = false; });
    draw();
    const target = nodes[nodes.length - 1].x - svg.viewBox.baseVal.x;
    frame.scrollLeft = target + 2 * size.width - frame.clientWidth;
  }

  // A notebook may attach the picture after its script.
  let tries = 0;
  (function start() {
    const cards = document.querySelectorAll(".lenslrp-graph:not([data-ready])");
    cards.forEach(view);
    if (!cards.length && tries++ < 200) setTimeout(start, 50);
  })();
})();
