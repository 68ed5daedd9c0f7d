// Moving through the steps: controls, keys, captions, meters and tables.

const byId = (id) => document.getElementById(id);
const states = trace.runs.map((run) => new State(run));
const lastStep = Math.max(...trace.runs.map((run) => run.steps.length));
const mostMoved = Math.max(...trace.runs.map((run) => moved(run.steps.at(-1))));
const COLOURS = { Q: "q", K: "k", V: "v", S: "s", O: "o" };

let now = 0;
let followed = trace.runs.length - 1;
let chosen = 0;
let timer = null;

function moved(step) {
  return step ? step.hbm[0] + step.hbm[1] : 0;
}

function bytes(number) {
  return number.toLocaleString("en-US");
}

/** Six significant digits; a float32 has between seven and eight. */
function shown(value) {
  if (value === undefined) return "–";
  if (value === null) return "−∞";
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const panels = trace.runs.map((run, index) => {
  const panel = byId("panel").content.firstElementChild.cloneNode(true);
  const part = (selector) => panel.querySelector(selector);
  panel.dataset.run = run.name;
  part("h2").textContent = run.title;
  part(".order").textContent = run.order;
  part(".head").addEventListener("click", () => follow(index));
  part("canvas").addEventListener("pointerdown", (event) => {
    const place = layOut(event.target.clientWidth);
    const row = Math.floor((event.offsetY - place.top) / place.cell);
    if (row >= 0 && row < trace.qLen) choose(row);
  });
  part(".hbm").setAttribute("aria-valuemax", mostMoved);
  part(".hbm").setAttribute("aria-label", `${run.title}: bytes moved to and from HBM`);
  part(".sram").setAttribute("aria-valuemax", trace.sram);
  part(".sram").setAttribute("aria-label", `${run.title}: bytes held in SRAM`);
  document.querySelector(".panels").append(panel);
  const short = run.title.replace(" attention", "").replace("FlashAttention", "Flash");
  const button = element("button", { type: "button", textContent: short, title: run.title });
  button.addEventListener("click", () => follow(index));
  document.querySelector(".switch").append(button);
  return { panel, part, button };
});

function show() {
  states.forEach((state, index) => {
    state.goTo(now);
    showPanel(state, panels[index]);
  });
  byId("slider").value = now;
  byId("count").textContent = `step ${now} of ${lastStep}`;
  byId("slider").setAttribute("aria-valuetext", `step ${now} of ${lastStep}`);
  byId("back").disabled = byId("first").disabled = now === 0;
  byId("next").disabled = byId("last").disabled = now === lastStep;
  byId("row").value = chosen;
  showRow();
  if (timer === null) speak();
}

function showPanel(state, { part, panel }) {
  const { run, step } = state;
  const ended = state.at === run.steps.length;
  const line = step === null ? run.source : `${step.line}${ended ? ` · done after ${state.at} steps` : ""}`;
  part(".line").textContent = line;
  part(".text").textContent = caption(state);
  panel.classList.toggle("done", ended);
  const [read, written] = step ? step.hbm : [0, 0];
  part(".hbm-value").replaceChildren(
    ...keyed("var(--read)", `${bytes(read)} read`),
    ...keyed("var(--written)", `${bytes(written)} written`),
  );
  part(".hbm").setAttribute("aria-valuenow", read + written);
  part(".hbm .read").style.width = `${(100 * read) / mostMoved}%`;
  part(".hbm .written").style.width = `${(100 * written) / mostMoved}%`;
  showSram(part, step);
  part(".traffic").textContent = step
    ? `${bytes(step.sram[0])} read + ${bytes(step.sram[1])} written`
    : "0 read + 0 written";
  part(".extra").textContent = `${bytes(step ? step.extra : 0)} bytes`;
  const canvas = part("canvas");
  canvas.setAttribute("aria-label", describe(state));
  paint(canvas, state, chosen);
}

function caption(state) {
  if (state.step) return state.step.text;
  return "q, k and v are in HBM. Press play, or → for the first step.";
}

function colourOf(block) {
  return `var(--${COLOURS[block] ?? "m"})`;
}

/** A word with the square of its colour before it. */
function keyed(colour, text) {
  const square = element("span", { className: "key" });
  square.style.background = colour;
  return [square, text];
}

/** One segment for each block on chip, in the colours that the picture gives it. */
function showSram(part, step) {
  const resident = step ? step.resident : {};
  const held = Object.values(resident).reduce((sum, size) => sum + size, 0);
  part(".sram-value").textContent = `${bytes(held)} of ${bytes(trace.sram)}`;
  const names = Object.keys(resident);
  const statistics = names.filter((name) => !(name in COLOURS)).join(" ");
  part(".blocks").replaceChildren(
    ...names.filter((name) => name in COLOURS).flatMap((name) => keyed(colourOf(name), name)),
    ...(statistics ? keyed(colourOf("m"), statistics) : []),
    ...(names.length ? [] : ["empty"]),
  );
  part(".sram").setAttribute("aria-valuenow", held);
  part(".sram").replaceChildren(
    ...Object.entries(resident).map(([name, size]) => {
      const segment = element("span");
      segment.style.width = `${(100 * size) / trace.sram}%`;
      segment.style.background = colourOf(name);
      return segment;
    }),
  );
}

function describe(state) {
  const counts = { sram: 0, hbm: 0, gone: 0, skipped: 0 };
  for (const where of state.where.flat()) if (where) counts[where] += 1;
  return (
    `${state.run.title}, score matrix after ${state.at} steps: ${counts.sram} tiles on chip, ` +
    `${counts.hbm} in HBM, ${counts.gone} computed and thrown away, ${counts.skipped} skipped`
  );
}

function speak() {
  const state = states[followed];
  const text = `Step ${now}. ${state.run.title}: ${caption(state)}`;
  if (byId("spoken").textContent !== text) byId("spoken").textContent = text;
}

function table(id, heads, lines) {
  const head = element("tr", {}, heads.map((text, index) =>
    element(index ? "th" : "td", { textContent: text, scope: index ? "col" : "" })));
  byId(id).querySelector("thead").replaceChildren(head);
  byId(id).querySelector("tbody").replaceChildren(
    ...lines.map(({ title, cells, strong }) =>
      element("tr", { className: strong ? "strong" : "" }, [
        element("th", { scope: "row", textContent: title }),
        ...cells.map((textContent) => element("td", { textContent })),
      ])),
  );
}

/** A title that may break inside, before "Attention", and not at its hyphen. */
function heading(run) {
  return run.title.replace("Attention", "\u200bAttention").replace("-", "\u2011");
}

function showTotals() {
  const ends = trace.runs.map((run) => run.steps.at(-1));
  const line = (title, read, strong = false) => ({ title, cells: trace.runs.map(read), strong });
  const standard = moved(ends[0]);
  table("totals", ["", ...trace.runs.map(heading)], [
    line("HBM read", (_, index) => bytes(ends[index].hbm[0])),
    line("HBM written", (_, index) => bytes(ends[index].hbm[1])),
    line("HBM moved", (_, index) => bytes(moved(ends[index])), true),
    line("as a share of standard", (_, index) => `${((100 * moved(ends[index])) / standard).toFixed(0)} %`),
    line("HBM held beyond q, k, v, out", (_, index) => bytes(ends[index].extra)),
    line("SRAM, most held", (run) => bytes(run.peak)),
    line("tiles computed", (run) => bytes(run.visited)),
    line("largest error against float64", (run) => run.error.toExponential(1).replace("e-", "e−")),
  ]);
  const outs = trace.runs.map((run) => new State(run).goTo(Infinity).out.flat());
  const apart = Math.max(...outs.flatMap((out) => out.map((value, index) => Math.abs(value - outs[0][index]))));
  byId("agreement").textContent =
    `The three results differ by at most ${apart.toExponential(1).replace("e-", "e−")}. FlashAttention is no approximation.`;
  byId("agreement").dataset.apart = apart;
}

function showRow() {
  const line = (title, read) => ({ title, cells: states.map((state) => shown(read(state))) });
  byId("row-values").querySelector("caption").textContent = `Query ${chosen} after step ${now}`;
  table("row-values", ["", ...trace.runs.map(heading)], [
    line("m", (state) => state.m[chosen]),
    line("l", (state) => state.l[chosen]),
    ...states[0].out[chosen].map((_, index) => line(`out ${index}`, (state) => state.out[chosen][index])),
  ]);
}

function goTo(step) {
  now = Math.max(0, Math.min(lastStep, step));
  if (now === lastStep) pause();
  show();
}

/** To the next step, or the previous one, at which the followed algorithm turns to another tile. */
function jump(direction) {
  const { steps } = trace.runs[followed];
  const tile = (index) => JSON.stringify([steps[index]?.rows, steps[index]?.keys]);
  let target = now + direction;
  while (target > 0 && target < steps.length && tile(target - 1) === tile(target - 2)) target += direction;
  goTo(target);
}

function follow(index) {
  followed = index;
  panels.forEach(({ panel, button }, at) => {
    panel.classList.toggle("followed", at === index);
    button.setAttribute("aria-pressed", at === index);
  });
  show();
}

function choose(row) {
  if (!Number.isInteger(row)) return;
  chosen = Math.max(0, Math.min(trace.qLen - 1, row));
  show();
}

function play() {
  if (now === lastStep) goTo(0);
  clearInterval(timer);
  timer = setInterval(() => goTo(now + 1), 1000 / Number(byId("speed").value));
  document.body.classList.add("playing");
  byId("play").setAttribute("aria-label", "Pause");
}

function pause() {
  clearInterval(timer);
  timer = null;
  document.body.classList.remove("playing");
  byId("play").setAttribute("aria-label", "Play");
}

function toggle() {
  if (timer === null) play();
  else {
    pause();
    speak();
  }
}

const KEYS = {
  ArrowRight: (event) => (event.shiftKey ? jump(1) : goTo(now + 1)),
  ArrowLeft: (event) => (event.shiftKey ? jump(-1) : goTo(now - 1)),
  ArrowDown: () => choose(chosen + 1),
  ArrowUp: () => choose(chosen - 1),
  Home: () => goTo(0),
  End: () => goTo(lastStep),
  " ": toggle,
  1: () => follow(0),
  2: () => follow(1),
  3: () => follow(2),
};

document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in KEYS)) return;
  // Fields keep the keys that they use themselves; a button keeps the space bar.
  if (target.matches("select, input[type=number]")) return;
  if (target.matches("button") && event.key === " ") return;
  event.preventDefault();
  KEYS[event.key](event);
});

/** A link may name a place: #step=40&run=flash2&row=5. */
function readLink() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const index = trace.runs.findIndex((run) => run.name === wanted.get("run"));
  if (wanted.has("row")) choose(Number(wanted.get("row")));
  if (index >= 0) follow(index);
  if (wanted.has("step")) goTo(Number(wanted.get("step")) || 0);
}

byId("slider").max = lastStep;
byId("row").max = trace.qLen - 1;
byId("slider").addEventListener("input", () => goTo(Number(byId("slider").value)));
byId("row").addEventListener("change", () => choose(Number(byId("row").value)));
byId("speed").addEventListener("change", () => timer !== null && play());
byId("first").addEventListener("click", () => goTo(0));
byId("back").addEventListener("click", () => goTo(now - 1));
byId("next").addEventListener("click", () => goTo(now + 1));
byId("last").addEventListener("click", () => goTo(lastStep));
byId("play").addEventListener("click", toggle);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
new ResizeObserver(() => states.forEach((state, index) => paint(panels[index].part("canvas"), state, chosen)))
  .observe(document.querySelector(".panels"));
addEventListener("hashchange", readLink);

showTotals();
follow(followed);
readLink();

/** For the console: tilewise.state("flash2", 40).out is what that run holds after 40 steps. */
globalThis.tilewise = {
  trace,
  state: (name, step = Infinity) => new State(trace.runs.find((run) => run.name === name)).goTo(step),
};
