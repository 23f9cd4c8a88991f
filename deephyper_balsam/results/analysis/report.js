"use strict";

const byId = (id) => document.getElementById(id);
const schemes = { dark: matchMedia("(prefers-color-scheme: dark)"), print: matchMedia("print") };
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/* Elements, with text and attributes that are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "rect", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/* None as the value of a hyperparameter: the page's null says that there is none. As JSON it is null. */
const NONE = { toString: () => "None", toJSON: () => null };
const WORDS = { true: "True", false: "False" };

function shown(value) {
  if (value === NONE) return "None";
  if (typeof value === "boolean") return WORDS[value];
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

const counted = (count) => count.toLocaleString("en");

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/* --- figures ----------------------------------------------------------------------------------------------------- */

const views = [];
const COLOURS = ["ink", "quiet", "accent", "soft", "paper"];

function tooltip(handler, event, item, value) {
  const tip = byId("tip");
  tip.hidden = !value;
  if (!value) return;
  const lines = typeof value === "object" ? Object.entries(value) : [["", value]];
  tip.replaceChildren(...lines.map(([name, one]) => make("div", {}, make("span", {}, name), make("span", {}, shown(one)))));
  const { clientX: x, clientY: y } = event;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 14}px`;
}

function paint(view) {
  for (const name of COLOURS) view.signal(name, colour(name));
}

/* The rows of a figure: what figures.rows says, with the hyperparameters that this one uses. */
function rowsOf(data, spec) {
  const used = JSON.stringify(spec);
  const extra = data.axes.map((axis, j) => ({ axis, name: `p${j}`, column: data.columns.indexOf(axis.key) })).filter(({ name }) => used.includes(`"${name}\\"`) || used.includes(`"${name}"`));
  return data.rows.map((row) => {
    const made = { ...row };
    const line = data.byNumber.get(row.n);
    for (const { axis, name, column } of extra) made[name] = axis.choices.length && line[column] !== null ? axis.labels[indexOf(axis, line[column])] : line[column];
    return made;
  });
}

const indexOf = (axis, value) => axis.places.get(JSON.stringify(value));

async function drawFigures(data) {
  const charts = JSON.parse(byId("charts").textContent);
  const renderer = data.rows.length > 1500 ? "canvas" : "svg";
  for (const place of document.querySelectorAll("[data-chart]")) {
    const { spec, needsTrials: uses } = charts[place.dataset.chart];
    if (uses) spec.data.find((one) => one.name === "trials").values = rowsOf(data, spec);
    for (const one of spec.signals) if (COLOURS.includes(one.name)) one.value = colour(one.name);
    const { view } = await vegaEmbed(place, spec, { mode: "vega", renderer, tooltip, actions: false, defaultStyle: false });
    if (uses) view.addEventListener("click", (event, item) => item && item.datum && item.datum.n !== undefined && openTrial(data, item.datum.n));
    views.push(view);
    await new Promise((resume) => setTimeout(resume)); // the page stays alive meanwhile
  }
}

/* --- one trial --------------------------------------------------------------------------------------------------- */

function copyButton(name, text) {
  const button = make("button", { type: "button", "data-text": text }, name);
  button.addEventListener("click", () => copy(text, button));
  return button;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", {}, text);
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const said = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1500);
}

function openTrial(data, number) {
  const line = data.byNumber.get(number);
  const config = Object.create(null); // a hyperparameter may be called __proto__
  const rows = [];
  data.columns.forEach((name, i) => {
    if (line[i] === null) return;
    if (name.startsWith("p:")) config[name.slice(2)] = line[i];
    const whole = name.startsWith("p:") && typeof line[i] === "number" ? String(line[i]) : shown(line[i]);
    rows.push(make("div", {}, make("dt", {}, heading(name)), make("dd", {}, whole)));
  });
  const close = make("button", { type: "button" }, "Close");
  close.addEventListener("click", () => byId("trial").close());
  const trace = data.tracebacks[number];
  byId("trial").replaceChildren(
    make("h2", { id: "trial-title" }, `Trial ${number}`),
    make("p", { class: "actions" }, copyButton("Copy configuration as JSON", JSON.stringify(config, null, 2)), close),
    make("dl", { class: "values" }, ...rows),
    ...(trace ? [make("h3", {}, "Traceback"), make("pre", { tabindex: 0 }, trace)] : []),
  );
  byId("trial").showModal();
}

/* --- the table --------------------------------------------------------------------------------------------------- */

const HEADINGS = { job_id: "trial", job_status: "status" };
const heading = (name) => HEADINGS[name] ?? name.replace(/^p:/, "").replace(/^m:/, "").replace(/^timestamp_/, "");
const PAGE = 25;

function condition(term, data) {
  const found = term.match(/^(.+?)(<=|>=|!=|=|<|>)(.+)$/);
  const column = found ? data.columns.findIndex((name) => heading(name).toLowerCase() === found[1].toLowerCase()) : -1;
  if (column < 0) return (line, text) => text.includes(term.toLowerCase());
  const [, , operator, value] = found;
  const compare = (cell) => {
    if (cell === null) return operator === "!=";
    const number = Number(value);
    const numeric = typeof cell === "number" && !Number.isNaN(number);
    const [a, b] = numeric ? [cell, number] : [String(cell).toLowerCase(), value.toLowerCase()];
    return { "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "=": a === b, "!=": a !== b }[operator];
  };
  return (line) => compare(line[column]);
}

function table(data) {
  const state = { column: data.columns.indexOf("objective"), up: data.minimize, page: 0, kept: data.lines, picked: null };
  const numeric = data.columns.map((_, i) => data.lines.every((line) => line[i] === null || typeof line[i] === "number"));
  const kind = (i) => `${numeric[i] ? "number" : ""} ${data.columns[i].startsWith("m:") ? "aside" : ""}`;
  // What a person looks for first stands first: number, objective, status, then the hyperparameters.
  const first = ["job_id", "objective", "job_status"];
  const rest = data.columns.filter((name) => !first.includes(name));
  const order = [...first, ...rest.filter((name) => name.startsWith("p:")), ...rest.filter((name) => name === "m:failure"), ...rest.filter((name) => !name.startsWith("p:") && name !== "m:failure")].map((name) => data.columns.indexOf(name));
  const heads = order.map((i) => {
    const button = make("button", { type: "button" }, heading(data.columns[i]));
    button.addEventListener("click", () => {
      state.up = state.column === i ? !state.up : !numeric[i];
      state.column = i;
      sort();
    });
    return make("th", { scope: "col", class: kind(i) }, button);
  });
  byId("table").tHead.replaceChildren(make("tr", {}, ...heads));

  function filter() {
    const tests = byId("filter").value.split(/\s+/).filter(Boolean).map((term) => condition(term, data));
    const picked = byId("only-picked").checked ? state.picked : null;
    state.kept = data.lines.filter((line, i) => (!picked || picked.has(line[data.number])) && tests.every((test) => test(line, data.texts[i])));
    sort();
  }

  function sort() {
    const { column, up } = state;
    const sign = up ? 1 : -1;
    state.kept = [...state.kept].sort((one, other) => {
      const [a, b] = [one[column], other[column]];
      if (a === null || b === null) return (a === null) - (b === null); // empty cells stand last, always
      if (a === b) return one[data.number] - other[data.number];
      return typeof a === "number" && typeof b === "number" ? sign * (a - b) : sign * String(a).localeCompare(String(b), "en", { numeric: true });
    });
    heads.forEach((head, place) => {
      if (order[place] === column) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    state.page = 0;
    show();
  }

  function show() {
    const from = state.page * PAGE;
    const lines = state.kept.slice(from, from + PAGE);
    byId("table").tBodies[0].replaceChildren(...lines.map((line) => make("tr", {}, ...order.map((i) => cell(line, i)))));
    const all = state.kept.length;
    byId("count").textContent = all ? `${counted(from + 1)}–${counted(from + lines.length)} of ${counted(all)} trials` : "No trial holds all of that.";
    byId("back").disabled = state.page === 0;
    byId("next").disabled = from + PAGE >= all;
  }

  function cell(line, i) {
    if (i === data.number) {
      const button = make("button", { type: "button", "aria-label": `Trial ${line[i]}: show all of it` }, String(line[i]));
      button.addEventListener("click", () => openTrial(data, line[i]));
      return make("td", { class: "number" }, button);
    }
    const attributes = { class: `${kind(i)} ${line[i] === null ? "empty" : ""}` };
    if (typeof line[i] === "string" && line[i].length > 40) attributes.title = line[i];
    return make("td", attributes, shown(line[i]));
  }

  byId("filter").addEventListener("input", filter);
  byId("only-picked").addEventListener("change", filter);
  byId("back").addEventListener("click", () => { state.page -= 1; show(); });
  byId("next").addEventListener("click", () => { state.page += 1; show(); });
  filter();
  return (picked) => {
    state.picked = picked;
    byId("only-picked").checked = picked !== null;
    filter();
  };
}

/* --- parallel coordinates ---------------------------------------------------------------------------------------- */

const TOP = 40;
const HEIGHT = 300;
const BELOW = 0.12; // where a value that is missing stands, below the axis

function parallel(data, onPick) {
  const { axes } = data;
  const place = byId("parallel-plot");
  const lines = data.lines.filter((line) => ["DONE", "FAILED"].includes(line[data.status]));
  const objective = data.columns.indexOf("objective");
  const columns = axes.map((axis) => data.columns.indexOf(axis.key));
  const good = lines.map((line) => line[objective] !== null && (data.minimize ? line[objective] <= data.good : line[objective] >= data.good));
  const at = axes.map((axis, a) => Float32Array.from(lines, (line) => position(axis, line[columns[a]])));
  const order = [...lines.keys()].sort((i, j) => good[i] - good[j]);
  const lowest = axes.map((axis) => (axis.missing ? -BELOW : 0));
  const reach = axes.map((_, a) => [lowest[a], 1]);
  const canvas = place.appendChild(make("canvas", { role: "img", "aria-label": "Parallel coordinates: a line for each trial that ended, over one axis for each hyperparameter and the objective" }));
  const svg = place.appendChild(make("svg", { role: "group", "aria-label": "Axes; each has two ends to move" }));
  let x = [];
  let waiting = 0;

  function position(axis, value) {
    if (value === null) return -BELOW;
    if (axis.choices.length) return indexOf(axis, value) / Math.max(axis.choices.length - 1, 1);
    const scale = axis.log ? Math.log : Number;
    const [low, high, here] = [axis.lower, axis.upper, value].map((one) => scale(one) / 4); // a quarter: no difference overflows
    return Math.min(1, Math.max(0, (here - low) / (high - low || 1)));
  }

  function valueAt(axis, where) {
    if (where < 0) return axis.missing ?? shown(axis.lower);
    if (axis.choices.length) return axis.labels[Math.round(where * (axis.choices.length - 1))];
    const value = axis.log ? axis.lower * (axis.upper / axis.lower) ** where : axis.lower * (1 - where) + axis.upper * where;
    return axis.whole ? String(Math.round(value)) : String(Number(value.toPrecision(4)));
  }

  const y = (where) => TOP + (1 - where) * HEIGHT;
  const isFree = (a) => reach[a][0] <= lowest[a] && reach[a][1] >= 1;
  const holds = (i) => axes.every((_, a) => at[a][i] >= reach[a][0] - 1e-6 && at[a][i] <= reach[a][1] + 1e-6);

  function layout() {
    const width = Math.max(place.clientWidth, axes.length * 92);
    const height = TOP + HEIGHT + 50;
    x = axes.map((_, a) => 46 + (a * (width - 110)) / Math.max(axes.length - 1, 1));
    const ratio = devicePixelRatio || 1;
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(name, value);
    axes.forEach((axis, a) => drawAxis(axis, a));
    draw();
  }

  function draw() {
    const ratio = devicePixelRatio || 1;
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const all = axes.every((_, a) => isFree(a));
    const dense = Math.min(0.5, Math.max(0.05, 4 / Math.sqrt(lines.length)));
    const trace = (i) => {
      pen.beginPath();
      for (let a = 0; a < axes.length; a += 1) pen.lineTo(x[a], y(at[a][i]));
      pen.stroke();
    };
    const [quiet, accent] = [colour("quiet"), colour("accent")];
    const picked = order.filter(holds);
    if (!all) {
      pen.strokeStyle = quiet;
      pen.globalAlpha = dense * 0.25;
      pen.lineWidth = 0.7;
      const kept = new Set(picked);
      for (const i of order) if (!kept.has(i)) trace(i);
    }
    const strong = Math.min(0.9, Math.max(dense, all ? dense : 6 / Math.sqrt(picked.length || 1)));
    for (const i of picked) {
      pen.strokeStyle = good[i] ? accent : quiet;
      pen.globalAlpha = good[i] ? Math.min(0.9, strong * 1.4) : strong;
      pen.lineWidth = good[i] ? 1.1 : 0.8;
      trace(i);
    }
    pen.globalAlpha = 1;
    byId("picked").textContent = all ? `${counted(lines.length)} trials` : `${counted(picked.length)} of ${counted(lines.length)} trials picked`;
    byId("free").disabled = all;
    return all ? null : new Set(picked.map((i) => lines[i][data.number]));
  }

  function pick() {
    if (waiting) return;
    waiting = requestAnimationFrame(() => {
      waiting = 0;
      onPick(draw());
    });
  }

  const groups = axes.map(() => svg.appendChild(make("g")));

  function drawAxis(axis, a) {
    const few = axis.choices.length && axis.choices.length <= 8 ? axis.choices.map((_, i) => i / Math.max(axis.choices.length - 1, 1)) : [0, 1];
    const text = (cls, dx, where, said) => make("text", { class: cls, x: x[a] + dx, y: where }, said);
    const name = text("name", 0, 16, axis.name.length > 14 ? `${axis.name.slice(0, 13)}…` : axis.name);
    name.setAttribute("text-anchor", "middle");
    const brush = make("rect", { class: "brush", x: x[a] - 6, width: 12 });
    const hit = make("rect", { class: "reach", x: x[a] - 16, width: 32, y: y(1) - 8, height: HEIGHT * (1 + (axis.missing ? BELOW : 0)) + 16 });
    const ends = [0, 1].map((side) => {
      const end = make("rect", {
        class: "end", width: 14, height: 6, rx: 3, x: x[a] - 7, tabindex: 0, role: "slider", "aria-orientation": "vertical",
        "aria-label": `${axis.name}, ${side ? "highest" : "lowest"}`, "aria-valuemin": lowest[a], "aria-valuemax": 1,
      });
      end.addEventListener("keydown", (event) => key(event, a, side));
      return end;
    });
    const missing = axis.missing ? [text("", 11, y(-BELOW) + 4, axis.missing)] : [];
    groups[a].replaceChildren(
      name, make("line", { x1: x[a], x2: x[a], y1: y(1), y2: y(lowest[a]) }), brush,
      ...few.map((where) => text("", 11, y(where) + 4, valueAt(axis, where))), ...missing, hit, ...ends,
    );
    hit.addEventListener("pointerdown", (event) => drag(event, a));
    ends.forEach((end) => end.addEventListener("pointerdown", (event) => drag(event, a)));
    for (const one of [hit, ...ends]) one.addEventListener("dblclick", () => set(a, lowest[a], 1));
    Object.assign(groups[a], { brush, ends });
    mark(a);
  }

  function mark(a) {
    const { brush, ends } = groups[a];
    const [low, high] = reach[a];
    brush.setAttribute("y", y(high));
    brush.setAttribute("height", isFree(a) ? 0 : Math.max(y(low) - y(high), 2));
    [low, high].forEach((where, side) => {
      ends[side].setAttribute("y", y(where) - (side ? 6 : 0));
      ends[side].setAttribute("aria-valuenow", where.toFixed(3));
      ends[side].setAttribute("aria-valuetext", valueAt(axes[a], where));
    });
  }

  function set(a, low, high) {
    const bound = (where) => Math.min(1, Math.max(lowest[a], where));
    reach[a] = [bound(Math.min(low, high)), bound(Math.max(low, high))];
    mark(a);
    pick();
  }

  function key(event, a, side) {
    const { choices } = axes[a];
    const step = choices.length ? 1 / Math.max(choices.length - 1, 1) : 0.02;
    const [low, high] = reach[a];
    const here = reach[a][side];
    const up = here < 0 ? 0 : here + step;
    const down = here <= 1e-9 ? lowest[a] : Math.max(0, here - step);
    const to = { ArrowUp: up, ArrowRight: up, ArrowDown: down, ArrowLeft: down, PageUp: here + 0.1, PageDown: here - 0.1, Home: lowest[a], End: 1 }[event.key];
    if (event.key === "Escape") set(a, lowest[a], 1);
    else if (to === undefined) return;
    else if (side) set(a, low, Math.max(low, to));
    else set(a, Math.min(high, to), high);
    event.preventDefault();
  }

  function drag(event, a) {
    const where = (one) => 1 - (one.clientY - svg.getBoundingClientRect().top - TOP) / HEIGHT;
    const start = where(event);
    const [low, high] = reach[a];
    const near = [low, high].findIndex((end, side) => Math.abs(start - (end + (side ? 0.012 : -0.012))) < 0.03);
    const inside = !isFree(a) && start > low && start < high;
    const target = event.currentTarget;
    target.setPointerCapture(event.pointerId);
    const move = (one) => {
      const now = where(one);
      if (near >= 0) set(a, near ? low : Math.min(now, high), near ? Math.max(now, low) : high);
      else if (inside) {
        const shift = Math.min(1 - high, Math.max(lowest[a] - low, now - start));
        set(a, low + shift, high + shift);
      } else if (Math.abs(now - start) > 0.01) set(a, start, now);
    };
    const stop = () => {
      target.removeEventListener("pointermove", move);
      target.removeEventListener("pointerup", stop);
      target.removeEventListener("pointercancel", stop);
    };
    target.addEventListener("pointermove", move);
    target.addEventListener("pointerup", stop);
    target.addEventListener("pointercancel", stop);
  }

  byId("free").addEventListener("click", () => axes.forEach((_, a) => set(a, lowest[a], 1)));
  addEventListener("resize", layout);
  layout();
  return draw;
}

/* --- all together ------------------------------------------------------------------------------------------------ */

async function main() {
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy, button));
  byId("trial").addEventListener("click", (event) => event.target === byId("trial") && byId("trial").close());
  const data = await unpack(byId("data").textContent);
  data.number = data.columns.indexOf("job_id");
  data.status = data.columns.indexOf("job_status");
  const ours = data.columns.map((name) => name.startsWith("p:"));
  for (const line of data.lines) line.forEach((value, i) => { if (ours[i] && Array.isArray(value)) line[i] = NONE; });
  data.byNumber = new Map(data.lines.map((line) => [line[data.number], line]));
  for (const axis of data.axes) axis.places = new Map(axis.choices.map((one, i) => [JSON.stringify(one), i]));
  data.texts = data.lines.map((line) => line.map(shown).join("\n").toLowerCase());
  const pick = table(data);
  const redraw = parallel(data, pick);
  const repaint = () => {
    for (const view of views) { paint(view); view.run(); }
    redraw();
  };
  for (const scheme of Object.values(schemes)) scheme.addEventListener("change", repaint);
  addEventListener("beforeprint", repaint);
  addEventListener("afterprint", repaint);
  await drawFigures(data);
  document.documentElement.dataset.drawn = Math.round(performance.now());
}

main();
