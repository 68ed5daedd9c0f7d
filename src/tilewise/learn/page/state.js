// What an algorithm holds after a step, rebuilt from the recorded changes.

const trace = JSON.parse(document.getElementById("data").textContent);
// The decimals name float32 numbers; rounding makes them these numbers again.
for (const change of trace.runs.flatMap((run) => run.steps.flatMap((step) => step.changes))) {
  change.values = change.values.map((value) => (value === null ? null : Math.fround(value)));
}

class State {
  constructor(run) {
    this.run = run;
    this.rewind();
  }

  rewind() {
    const { qLen, kvLen, vDim, states } = trace;
    this.at = 0;
    this.step = null;
    this.score = new Float64Array(qLen * kvLen).fill(NaN);
    this.weight = new Float64Array(qLen * kvLen).fill(NaN);
    this.hidden = new Uint8Array(qLen * kvLen);
    this.where = states.map((row) => row.map(() => null));
    // undefined: not set yet; null: minus infinity, a row that has seen no key.
    this.m = new Array(qLen).fill(undefined);
    this.l = new Array(qLen).fill(undefined);
    this.out = Array.from({ length: qLen }, () => new Array(vDim).fill(undefined));
    this.rescaled = new Map();
  }

  /** The state after `count` steps, at most as many as the run has. */
  goTo(count) {
    const target = Math.max(0, Math.min(count, this.run.steps.length));
    if (target < this.at) this.rewind();
    while (this.at < target) this.apply(this.run.steps[this.at++]);
    return this;
  }

  apply(step) {
    this.step = step;
    this.rescaled = new Map();
    for (const [i, j, where] of step.tiles) this.where[i][j] = where;
    const before = this.m.slice();
    for (const change of step.changes) this[`set_${change.name}`](change, before);
  }

  set_scores({ rows, keys, values }) {
    this.eachScore(rows, keys, (cell, index) => {
      this.score[cell] = values[index] ?? NaN;
      this.hidden[cell] = values[index] === null ? 1 : 0;
    });
  }

  set_weights({ rows, keys, values }) {
    this.eachScore(rows, keys, (cell, index) => {
      this.weight[cell] = values[index];
    });
  }

  set_m({ rows, values }) {
    values.forEach((value, index) => (this.m[rows[0] + index] = value));
  }

  set_l({ rows, values }) {
    values.forEach((value, index) => (this.l[rows[0] + index] = value));
  }

  /** Factors below one on a maximum that was set: rows whose sums so far shrink in this step. */
  set_rescale({ rows, values }, before) {
    values.forEach((factor, index) => {
      const row = rows[0] + index;
      if (factor < 1 && before[row] != null) this.rescaled.set(row, { factor, from: before[row] });
    });
  }

  set_out({ rows, values }) {
    const { vDim } = trace;
    for (let row = rows[0]; row < rows[1]; row++) {
      const start = (row - rows[0]) * vDim;
      this.out[row] = values.slice(start, start + vDim);
    }
  }

  eachScore(rows, keys, visit) {
    let index = 0;
    for (let row = rows[0]; row < rows[1]; row++) {
      for (let key = keys[0]; key < keys[1]; key++) visit(row * trace.kvLen + key, index++);
    }
  }
}

/** The largest magnitudes, over all runs and steps: every panel has the same scales. */
function measure() {
  const found = { score: 1e-9, m: [Infinity, -Infinity], l: 1e-9, out: 1e-9 };
  for (const change of trace.runs.flatMap((run) => run.steps.flatMap((step) => step.changes))) {
    for (const value of change.values) {
      if (value === null) continue;
      if (change.name === "scores") found.score = Math.max(found.score, Math.abs(value));
      if (change.name === "m") found.m = [Math.min(found.m[0], value), Math.max(found.m[1], value)];
      if (change.name === "l") found.l = Math.max(found.l, value);
    }
  }
  for (const run of trace.runs) {
    for (const row of new State(run).goTo(Infinity).out) {
      for (const value of row) found.out = Math.max(found.out, Math.abs(value));
    }
  }
  if (found.m[0] > found.m[1]) found.m = [0, 0];
  return found;
}
