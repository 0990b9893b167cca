"use strict";
// Tables that can be sorted, and the text. Everything from data is put in as text, never as markup.

for (const table of document.querySelectorAll("table.sortable")) {
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    head.querySelector("button").addEventListener("click", () => sortTable(table, column, head));
  }
}

function sortTable(table, column, head) {
  const direction = head.ariaSort === "descending" ? 1 : -1;
  const key = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows];
  const numeric = rows.every((row) => key(row) !== undefined);
  const number = (row) => (key(row) === "NaN" ? Infinity : Number(key(row)));
  const text = (row) => row.cells[column].textContent;
  const compare = numeric ? (a, b) => order(number(a), number(b)) : (a, b) => text(a).localeCompare(text(b), "en", { numeric: true });
  rows.sort((a, b) => direction * compare(a, b));
  for (const other of head.parentElement.cells) other.ariaSort = "none";
  head.ariaSort = direction === 1 ? "ascending" : "descending";
  table.tBodies[0].append(...rows);
}

function order(a, b) {
  return a < b ? -1 : a > b ? 1 : 0; // the difference of two infinities is NaN
}

const source = document.getElementById("text-data");
if (source) showText(JSON.parse(source.textContent));

function showText(data) {
  const COLOURED = 10; // nats at which the colour is full
  const COLOURED_DIFFERENCE = 4;
  const LISTED = 200; // single tokens
  const BEFORE = 8; // tokens of context
  const get = (id) => document.getElementById(id);
  const [list, single, tip, found] = ["tokens", "single", "tip", "found"].map(get);
  const nll = data.nll.map((column) => Float64Array.from(column, Number));
  const string = (i) => data.strings[data.text[i]];
  const spans = [];
  let hits = new Set(); // tokens that the search has found
  let sequence = []; // tokens that are shown, as they are shown
  let current = -1;

  const model = get("model");
  data.models.forEach((name, at) => model.append(new Option(name, String(at))));
  for (let at = 1; at < data.models.length; at++) {
    model.append(new Option(`${data.models[at]} − ${data.models[0]}`, `difference ${at}`));
  }
  model.closest("label").hidden = data.models.length === 1;

  function surprise() {
    const [, difference] = model.value.split(" ");
    if (difference === undefined) return { value: (i) => nll[model.value][i], full: COLOURED, difference: false };
    const other = nll[difference];
    // Where both are infinite nothing changed.
    const value = (i) => (other[i] === nll[0][i] ? 0 : other[i] - nll[0][i]);
    return { value, full: COLOURED_DIFFERENCE, difference: true };
  }

  for (const stretch of data.stretches) {
    const article = document.createElement("article");
    const heading = document.createElement("h3");
    stretch.mean = document.createElement("small");
    heading.append(stretch.name, " ", stretch.mean);
    const text = document.createElement("p");
    for (let i = stretch.from; i < stretch.to; i++) text.append(...token(i, i === stretch.from));
    article.append(heading, text);
    stretch.article = article;
    stretch.lower = [];
    let joined = "";
    for (let i = stretch.from; i < stretch.to; i++) {
      stretch.lower.push(joined.length);
      joined += string(i).toLowerCase() + data.separator;
    }
    stretch.joined = joined;
  }
  list.append(...data.stretches.map((stretch) => stretch.article));

  function token(i, first) {
    const span = document.createElement("span");
    span.className = "t";
    span.dataset.i = i;
    span.textContent = visible(string(i));
    spans.push(span);
    const before = [];
    if (!first && data.row[i] !== data.row[i - 1] + 1) {
      const gap = document.createElement("span");
      gap.className = "gap";
      gap.textContent = "[…] ";
      before.push(gap);
    }
    return [...before, span, data.separator];
  }

  function visible(text) {
    if (text === "") return "·"; // a part of a character that the next token ends
    return text.replace(/\r/g, "␍").replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");
  }

  function paint() {
    const { value, full, difference } = surprise();
    for (let i = 0; i < spans.length; i++) {
      const v = value(i);
      const strength = Number.isNaN(v) ? 1 : Math.min(1, Math.abs(v) / full);
      spans[i].style.setProperty("--s", strength.toFixed(2));
      spans[i].classList.toggle("better", v < 0);
    }
    for (const stretch of data.stretches) {
      let sum = 0;
      let largest = -Infinity;
      for (let i = stretch.from; i < stretch.to; i++) {
        const v = value(i);
        sum += v;
        largest = Math.max(largest, Number.isNaN(v) ? Infinity : v);
      }
      stretch.loss = sum / (stretch.to - stretch.from);
      stretch.largest = largest;
      stretch.mean.textContent = `${(stretch.to - stretch.from).toLocaleString("en")} tokens, mean ${digits(stretch.loss)} nats`;
    }
    get("scale").classList.toggle("difference", difference);
    get("low").textContent = difference ? `−${full} nats or less` : "0 nats";
    get("high").textContent = `${full} nats or more`;
    filter();
  }

  function filter() {
    const { value } = surprise();
    const least = get("least");
    const floor = Number(least.value) > Number(least.min) ? Number(least.value) : -Infinity;
    get("least-shown").textContent = floor === -Infinity ? "all" : `${digits(floor)} nats`;
    const wanted = get("search").value.trim().toLowerCase();
    const counts = (i) => !(value(i) < floor); // NaN does
    hits = new Set();
    let shown = 0;
    for (const stretch of data.stretches) {
      const inName = wanted === "" || stretch.name.toLowerCase().includes(wanted);
      let any = false;
      const marked = new Set(occurrences(stretch, wanted));
      for (let i = stretch.from; i < stretch.to; i++) {
        const counted = counts(i);
        const matched = marked.has(i);
        spans[i].classList.toggle("dim", !counted);
        spans[i].classList.toggle("hit", matched);
        if (matched && counted) hits.add(i);
        if (counted && (inName || matched)) {
          any = true;
          shown += wanted === "" || matched ? 1 : 0;
        }
      }
      stretch.article.hidden = !any;
    }
    found.textContent = wanted === "" ? `${shown.toLocaleString("en")} tokens` : `${hits.size.toLocaleString("en")} tokens match`;
    arrange(counts, wanted === "" ? null : hits);
  }

  function occurrences(stretch, wanted) {
    const places = [];
    if (wanted === "") return places;
    for (let at = stretch.joined.indexOf(wanted); at >= 0; at = stretch.joined.indexOf(wanted, at + 1)) {
      let i = lastAtMost(stretch.lower, at);
      for (; i < stretch.lower.length && stretch.lower[i] < at + wanted.length; i++) places.push(stretch.from + i);
    }
    return places;
  }

  function lastAtMost(starts, at) {
    let [low, high] = [0, starts.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (starts[middle] <= at) low = middle;
      else high = middle;
    }
    return low;
  }

  function arrange(counts, marked) {
    const { value } = surprise();
    const how = get("order").value;
    single.hidden = how !== "single";
    list.hidden = how === "single";
    hideTip();
    if (how === "single") {
      const chosen = [];
      for (let i = 0; i < spans.length; i++) if (counts(i) && (marked === null || marked.has(i))) chosen.push(i);
      const rank = (i) => (Number.isNaN(value(i)) ? Infinity : value(i));
      chosen.sort((a, b) => order(rank(b), rank(a)));
      single.tBodies[0].replaceChildren(...chosen.slice(0, LISTED).map((i) => singleRow(i, value(i))));
      return;
    }
    const by = {
      text: (a, b) => a.from - b.from,
      largest: (a, b) => order(b.loss, a.loss),
      smallest: (a, b) => order(a.loss, b.loss),
      token: (a, b) => order(b.largest, a.largest),
    }[how];
    const NaNsFirst = (a, b) => Number.isNaN(b.loss) - Number.isNaN(a.loss);
    const sorted = [...data.stretches].sort((a, b) => (how === "text" ? 0 : NaNsFirst(a, b)) || by(a, b));
    list.append(...sorted.map((stretch) => stretch.article));
    sequence = [];
    for (const stretch of sorted) {
      for (let i = stretch.from; i < stretch.to; i++) if (!stretch.article.hidden && counts(i)) sequence.push(i);
    }
  }

  function singleRow(i, v) {
    const row = document.createElement("tr");
    const stretch = data.stretches.findLast((one) => one.from <= i);
    const context = [];
    for (let j = Math.max(stretch.from, i - BEFORE); j < i; j++) context.push(string(j));
    const jump = document.createElement("button");
    jump.type = "button";
    jump.textContent = visible(string(i));
    jump.addEventListener("click", () => {
      get("order").value = "text";
      filter();
      go(i);
    });
    const before = document.createElement("span");
    before.className = "before";
    before.textContent = context.join(data.separator) + data.separator;
    for (const content of [digits(v), before, jump, stretch.name]) {
      const cell = document.createElement("td");
      cell.append(content);
      row.append(cell);
    }
    return row;
  }

  function digits(value) {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    return size !== 0 && size < 0.001 ? value.toExponential(2) : value.toFixed(size < 10 ? 3 : 2);
  }

  function showTip(i) {
    tip.replaceChildren();
    const head = document.createElement("strong");
    head.textContent = visible(string(i)).trim() || "␣";
    tip.append(head, ` token ${data.label[i]}, row ${data.row[i].toLocaleString("en")}, position ${data.position[i].toLocaleString("en")}`);
    const table = document.createElement("table");
    const line = (tag, cells) => {
      const row = table.insertRow();
      for (const cell of cells) row.appendChild(document.createElement(tag)).textContent = cell;
    };
    const names = data.models.length > 1;
    line("th", [...(names ? ["model"] : []), "nats", "p", "rank", "top p"]);
    data.models.forEach((name, at) => {
      const numbers = [digits(nll[at][i]), percent(Math.exp(-nll[at][i])), String(data.rank[at][i] + 1), percent(Number(data.p_max[at][i]))];
      line("td", names ? [name, ...numbers] : numbers);
    });
    tip.append(table);
    tip.hidden = false;
    const [box, size] = [spans[i].getBoundingClientRect(), tip.getBoundingClientRect()];
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - size.width - 8));
    const below = box.bottom + size.height + 8 < window.innerHeight;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(below ? box.bottom + 6 : box.top - size.height - 6) + window.scrollY}px`;
  }

  function percent(p) {
    if (Number.isNaN(p)) return "unknown";
    return p !== 0 && p < 0.0001 ? `${(100 * p).toExponential(1)} %` : `${(100 * p).toFixed(2)} %`;
  }

  function hideTip() {
    tip.hidden = true;
    spans[current]?.classList.remove("current");
    current = -1;
  }

  function go(i) {
    spans[current]?.classList.remove("current");
    current = i;
    spans[i].classList.add("current");
    spans[i].scrollIntoView({ block: "nearest" });
    list.focus({ preventScroll: true });
    showTip(i);
  }

  function step(by, wanted = () => true) {
    const length = sequence.length;
    const from = sequence.indexOf(current); // -1: before the first
    for (let n = 1; n <= length; n++) {
      const at = from + n * by;
      const i = sequence[from < 0 && by < 0 ? length - n : ((at % length) + length) % length];
      if (wanted(i)) return go(i);
    }
  }

  function nextHit(by) {
    if (get("order").value === "single") {
      get("order").value = "text";
      filter();
    }
    step(by, (i) => hits.has(i));
  }

  list.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".t");
    if (span) showTip(Number(span.dataset.i));
  });
  list.addEventListener("pointerleave", () => current < 0 && hideTip());
  list.addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (span) go(Number(span.dataset.i));
    else hideTip();
  });
  list.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (by === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    step(by);
  });
  get("search").addEventListener("input", filter);
  get("search").addEventListener("keydown", (event) => event.key === "Enter" && nextHit(event.shiftKey ? -1 : 1));
  get("next").addEventListener("click", () => nextHit(1));
  get("previous").addEventListener("click", () => nextHit(-1));
  get("least").addEventListener("input", filter);
  get("order").addEventListener("change", filter);
  model.addEventListener("change", paint);
  paint();
}
