// One panel's picture: the score matrix with its tiles, the blocks on chip, m, l and out.

const scales = measure();
const MARGIN = { left: 20, top: 30, bottom: 4, right: 12 };
const GAP = 9;
const STATISTIC = 34;
const TALLEST = 292;

let theme = readTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (theme = readTheme()));

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["card", "ink", "quiet", "line", "rise", "hatch", "q", "k", "v", "o", "m", "accent"];
  const found = Object.fromEntries(names.map((name) => [name, read(name)]));
  for (const name of ["low", "zero", "high", "weight-0", "weight-1"]) found[name] = channels(read(name));
  return found;
}

function channels(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

function mix(from, to, share) {
  const amount = Math.max(0, Math.min(1, share));
  return `rgb(${from.map((part, index) => Math.round(part + (to[index] - part) * amount)).join(" ")})`;
}

/** Minus to plus `most` through zero; the root makes small values visible. */
function signed(value, most) {
  const share = Math.sqrt(Math.abs(value) / most);
  return mix(theme.zero, value < 0 ? theme.low : theme.high, share);
}

function weightColour(value) {
  return mix(theme["weight-0"], theme["weight-1"], Math.sqrt(value));
}

/** Where everything stands for a canvas of this width. */
function layOut(width) {
  const { qLen, kvLen, vDim } = trace;
  const outWidth = Math.max(24, Math.min(56, vDim * 5));
  const beside = 2 * STATISTIC + outWidth + 3 * GAP;
  const cell = Math.min((width - MARGIN.left - beside - MARGIN.right) / kvLen, TALLEST / qLen, 26);
  const left = MARGIN.left + Math.max(0, (width - MARGIN.left - beside - MARGIN.right - cell * kvLen) / 2);
  const m = left + cell * kvLen + GAP;
  const l = m + STATISTIC + GAP;
  const out = l + STATISTIC + GAP;
  const height = Math.ceil(MARGIN.top + cell * qLen + MARGIN.bottom);
  return { cell, left, top: MARGIN.top, m, l, out, outWidth, height, width };
}

function paint(canvas, state, chosen) {
  canvas.style.width = "";
  const width = canvas.clientWidth;
  if (!width) return;
  const place = layOut(width);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(place.height * ratio);
  // Exactly its pixels, also where the ratio is a fraction: a stretched picture is blurred.
  canvas.style.width = `${canvas.width / ratio}px`;
  canvas.style.height = `${canvas.height / ratio}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, place.height);
  paintScores(pen, place, state);
  paintLoaded(pen, place, state);
  paintStatistics(pen, place, state);
  paintOut(pen, place, state);
  paintLabels(pen, place);
  paintChosen(pen, place, chosen);
}

/** Whole pixels, so that neighbouring cells meet without a seam. */
function box(place, rows, keys) {
  const x0 = Math.round(place.left + keys[0] * place.cell);
  const x1 = Math.round(place.left + keys[1] * place.cell);
  const y0 = Math.round(place.top + rows[0] * place.cell);
  const y1 = Math.round(place.top + rows[1] * place.cell);
  return [x0, y0, x1 - x0, y1 - y0];
}

function tileSpans(i, j) {
  const { qLen, kvLen, blockQ, blockKv } = trace;
  return [
    [i * blockQ, Math.min((i + 1) * blockQ, qLen)],
    [j * blockKv, Math.min((j + 1) * blockKv, kvLen)],
  ];
}

function paintScores(pen, place, state) {
  trace.states.forEach((line, i) =>
    line.forEach((_, j) => {
      const [rows, keys] = tileSpans(i, j);
      const where = state.where[i][j];
      if (where === "skipped") hatch(pen, box(place, rows, keys));
      else if (where) {
        pen.globalAlpha = where === "gone" ? 0.38 : 1;
        paintTile(pen, place, state, rows, keys);
        pen.globalAlpha = 1;
      }
      pen.strokeStyle = theme.line;
      pen.lineWidth = 1;
      const [x, y, w, h] = box(place, rows, keys);
      pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
    }),
  );
  const step = state.step;
  if (!step || !step.rows || !step.keys) return;
  const [x, y, w, h] = box(place, step.rows, step.keys);
  pen.strokeStyle = step.phase === "skip" ? theme.quiet : theme.ink;
  pen.lineWidth = 2;
  pen.strokeRect(x + 0, y + 0, w, h);
}

function paintTile(pen, place, state, rows, keys) {
  for (let row = rows[0]; row < rows[1]; row++) {
    for (let key = keys[0]; key < keys[1]; key++) {
      const index = row * trace.kvLen + key;
      const [x, y, w, h] = box(place, [row, row + 1], [key, key + 1]);
      if (state.hidden[index]) {
        const dot = Math.max(1, Math.min(2.4, place.cell / 4));
        pen.fillStyle = theme.hatch;
        pen.fillRect(x + (w - dot) / 2, y + (h - dot) / 2, dot, dot);
        continue;
      }
      const weight = state.weight[index];
      pen.fillStyle = Number.isNaN(weight)
        ? signed(state.score[index], scales.score)
        : weightColour(weight);
      pen.fillRect(x, y, w, h);
    }
  }
}

function hatch(pen, [x, y, w, h]) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, w, h);
  pen.clip();
  pen.strokeStyle = theme.hatch;
  pen.globalAlpha = 0.65;
  pen.lineWidth = 1;
  pen.beginPath();
  const apart = 6;
  for (let start = Math.floor((x - y - h) / apart) * apart; start < x + w - y; start += apart) {
    pen.moveTo(start + y, y);
    pen.lineTo(start + y + h, y + h);
  }
  pen.stroke();
  pen.restore();
}

/** Bars beside the matrix: the block of Q, and those of K and V, that are in SRAM now. */
function paintLoaded(pen, place, state) {
  const step = state.step;
  if (!step) return;
  const thick = 4;
  if ("Q" in step.resident && step.rows) {
    const [, y, , h] = box(place, step.rows, [0, 1]);
    pen.fillStyle = theme.q;
    pen.fillRect(Math.round(place.left) - thick - 3, y, thick, h);
  }
  if (!step.keys) return;
  const [x, , w] = box(place, [0, 1], step.keys);
  [["K", theme.k], ["V", theme.v]].forEach(([name, colour], index) => {
    if (!(name in step.resident)) return;
    pen.fillStyle = colour;
    pen.fillRect(x, place.top - 7 - index * (thick + 1), w, thick);
  });
}

function paintStatistics(pen, place, state) {
  const [low, high] = scales.m;
  const range = high - low || 1;
  const across = (value) => place.m + 3 + ((value - low) / range) * (STATISTIC - 6);
  for (let row = 0; row < trace.qLen; row++) {
    const [, y, , h] = box(place, [row, row + 1], [0, 1]);
    const middle = y + h / 2;
    const thick = Math.max(1, Math.min(8, h - 2));
    if (state.m[row] != null) {
      const risen = state.rescaled.get(row);
      if (risen) {
        pen.strokeStyle = theme.rise;
        pen.lineWidth = Math.max(1, Math.min(2, h / 3));
        pen.beginPath();
        pen.moveTo(across(risen.from), middle);
        pen.lineTo(across(state.m[row]), middle);
        pen.stroke();
      }
      pen.fillStyle = risen ? theme.rise : theme.m;
      pen.beginPath();
      pen.arc(across(state.m[row]), middle, Math.max(1.3, Math.min(3, h / 2.4)), 0, 2 * Math.PI);
      pen.fill();
    }
    if (state.l[row] != null) {
      pen.fillStyle = state.rescaled.has(row) ? theme.rise : theme.m;
      const length = (state.l[row] / scales.l) * STATISTIC;
      pen.fillRect(place.l, middle - thick / 2, length, thick);
    }
  }
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1;
  const bottom = place.top + place.cell * trace.qLen;
  for (const x of [place.m, place.l]) {
    pen.beginPath();
    pen.moveTo(Math.round(x) - 0.5, place.top);
    pen.lineTo(Math.round(x) - 0.5, bottom);
    pen.stroke();
  }
}

function paintOut(pen, place, state) {
  const { qLen, vDim } = trace;
  const wide = place.outWidth / vDim;
  state.out.forEach((line, row) => {
    const [, y, , h] = box(place, [row, row + 1], [0, 1]);
    line.forEach((value, column) => {
      if (value == null) return;
      const x0 = Math.round(place.out + column * wide);
      pen.fillStyle = signed(value, scales.out);
      pen.fillRect(x0, y, Math.round(place.out + (column + 1) * wide) - x0, h);
    });
  });
  const whole = box(place, [0, qLen], [0, 1]);
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1;
  const x = Math.round(place.out);
  pen.strokeRect(x - 0.5, whole[1] - 0.5, Math.round(place.outWidth) + 1, whole[3] + 1);
  const step = state.step;
  if (step && "O" in step.resident && step.rows) {
    const [, y, , h] = box(place, step.rows, [0, 1]);
    pen.strokeStyle = theme.o;
    pen.lineWidth = 2;
    pen.strokeRect(x - 1, y, Math.round(place.outWidth) + 2, h);
  }
}

function paintLabels(pen, place) {
  pen.fillStyle = theme.quiet;
  pen.font = "11.5px system-ui, -apple-system, sans-serif";
  pen.textBaseline = "alphabetic";
  pen.textAlign = "left";
  const above = place.top - 16;
  if (place.cell * trace.kvLen > 40) pen.fillText("keys →", place.left, above);
  pen.textAlign = "center";
  pen.fillText("m", place.m + STATISTIC / 2, above);
  pen.fillText("l", place.l + STATISTIC / 2, above);
  pen.fillText("out", place.out + place.outWidth / 2, above);
  if (place.cell * trace.qLen < 60) return;
  pen.save();
  pen.translate(place.left - 11, place.top);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "right";
  pen.fillText("← queries", 0, 0);
  pen.restore();
}

/** A thin line through the chosen query's row, and a wedge at its end. */
function paintChosen(pen, place, chosen) {
  const y = place.top + (chosen + 0.5) * place.cell;
  const right = place.out + place.outWidth + 3;
  pen.fillStyle = theme.accent;
  pen.beginPath();
  pen.moveTo(right, y);
  pen.lineTo(right + 6, y - 4);
  pen.lineTo(right + 6, y + 4);
  pen.fill();
  pen.globalAlpha = 0.55;
  pen.fillRect(place.left, y - 0.5, right - place.left, 1);
  pen.globalAlpha = 1;
}
