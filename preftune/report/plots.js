// Draws every figure.plot of the page from the JSON block inside it. Colours are the page's own, so that they follow it
// into the dark and onto paper.
(() => {
  "use strict";
  // twice as many pixels as the screen needs, for paper
  const ratio = Math.max(2, window.devicePixelRatio);
  Object.defineProperty(window, "devicePixelRatio", { get: () => ratio });

  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const FONT = "12px system-ui, sans-serif";
  const drawn = [];
  let theme = {};
  const readTheme = () => {
    theme = { ink: colour("--ink"), soft: colour("--soft"), line: colour("--line"), faint: colour("--faint"), series: [] };
    for (let k = 1; k <= 8; k++) theme.series.push(colour(`--series-${k}`));
  };
  const of = (line) => theme.series[(line.colour || 0) % theme.series.length];
  const thin = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

  const number = (v) => {
    if (v == null) return "–";
    const size = Math.abs(v);
    if (Number.isInteger(v) || size >= 1000) return Math.round(v).toLocaleString("en-US");
    return size < 1e-4 ? v.toExponential(2) : String(Number(v.toPrecision(4)));
  };

  // a name under an axis, broken near its middle; the table has it whole
  const twoLines = (name) => {
    const short = name.length > 26 ? `${name.slice(0, 25)}…` : name;
    const far = (at) => Math.abs(at - short.length / 2);
    const gaps = [...short.matchAll(/ /g)].map((gap) => gap.index).sort((a, b) => far(a) - far(b));
    return gaps.length ? `${short.slice(0, gaps[0])}\n${short.slice(gaps[0] + 1)}` : short;
  };

  // the place of the nearest value of a series, for curves that are not measured at every step
  const nearest = (u, si, at) => {
    const values = u.data[si];
    if (values[at] != null) return at;
    const [from, to] = [u.scales.x.min, u.scales.x.max];
    const x = u.data[0][at];
    let best = null;
    for (let step = 1, open = true; open && best === null; step++) {
      open = false;
      for (const k of [at - step, at + step]) {
        if (k < 0 || k >= values.length || u.data[0][k] < from || u.data[0][k] > to) continue;
        open = true;
        if (values[k] != null && (best === null || Math.abs(u.data[0][k] - x) < Math.abs(u.data[0][best] - x))) best = k;
      }
    }
    return best;
  };

  class Drawing {
    constructor(figure) {
      this.spec = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
      this.place = figure.querySelector(".canvas");
      this.tables = this.spec.lines.map((l) => [l.x, l.y, ...(l.low ? [l.low, l.high] : [])]);
      this.lineOf = [null]; // of each series of uPlot
      this.series = [{ label: this.spec.x, value: (u, v) => (v == null ? "" : this.nameOf(v)) }];
      this.bands = [];
      for (const line of this.spec.lines) this.add(line);
      const data = uPlot.join(this.tables);
      this.ends = data.map((values) => values.reduce((last, v, k) => (v == null ? last : k), null));
      this.u = new uPlot(this.options(), data, this.place);
      this.said = document.createElement("p");
      this.said.className = "aside";
      this.said.setAttribute("aria-live", "polite");
      figure.append(this.said);
      this.controls();
      new ResizeObserver(() => this.fit()).observe(this.place);
    }

    nameOf(x) {
      return this.spec.names.length ? this.spec.names[x] ?? "" : number(x);
    }

    height() {
      return this.spec.wide ? 320 : 210;
    }

    fit() {
      const width = this.place.clientWidth;
      if (width && width !== this.u.width && !root.dataset.print) this.u.setSize({ width, height: this.height() });
    }

    add(line) {
      const at = this.series.length;
      const dash = line.dashed ? [6, 4] : undefined;
      const entry = {
        label: line.name,
        stroke: () => (line.draw === "faint" ? thin(of(line), 0.32) : of(line)),
        width: line.draw === "faint" ? 1 : 2,
        dash,
        spanGaps: true,
        class: line.draw,
        points: {
          show: line.draw === "dots" || line.draw === "points" || line.x.length === 1,
          size: 8,
          fill: () => of(line),
          stroke: () => of(line),
        },
        value: (u, v, si, k) => this.valueOf(line, u, si, k),
      };
      if (line.draw === "points") entry.paths = () => null;
      if (line.draw === "bars") {
        const paths = uPlot.paths.bars({ size: [0.86, 64] });
        Object.assign(entry, { paths, fill: () => thin(of(line), 0.8), width: 0, points: { show: false } });
      }
      this.series.push(entry);
      this.lineOf.push(line);
      if (line.low) {
        const band = line.draw === "line"; // else whiskers
        const paths = band ? uPlot.paths.linear() : () => null;
        for (const end of ["low", "high"]) {
          const hidden = { class: "hidden", width: 0, stroke: "transparent", points: { show: false }, spanGaps: true };
          this.series.push({ label: `${line.name}, ${end}`, paths, ...hidden });
          this.lineOf.push({ bound: at });
        }
        if (band) this.bands.push({ series: [at + 2, at + 1], fill: () => thin(of(line), 0.18) });
      }
    }

    valueOf(line, u, si, k) {
      const at = k ?? (this.spec.together ? this.ends?.[si] : null); // a curve says where it ended
      if (at == null) return "";
      const v = u.data[si][at];
      if (v == null) return "–";
      const low = line.low && u.data[si + 1][at], high = line.low && u.data[si + 2][at];
      return number(v) + (low != null && high != null ? ` [${number(low)}, ${number(high)}]` : "");
    }

    options() {
      const { spec } = this;
      const named = spec.names.length > 0;
      const grid = { stroke: () => theme.line, width: 1 };
      const axis = { stroke: () => theme.soft, font: FONT, ticks: { show: false }, grid };
      const tick = (x) => (x == null ? "" : named ? twoLines(this.nameOf(x)) : number(x));
      const size = named ? 46 : 30, space = named ? 1 : 56;
      const pointed = (si) => this.lineOf[si] && !this.lineOf[si].bound && this.lineOf[si].draw !== "faint";
      const sync = spec.together ? { key: spec.together, scales: ["x", null], setSeries: false } : undefined;
      return {
        width: this.place.clientWidth || 400,
        height: this.height(),
        padding: [12, 14, 0, 4],
        series: this.series,
        bands: this.bands,
        scales: { x: this.scaleOfX(named), y: { range: (u, low, high) => this.rangeOfY(low, high) } },
        axes: [
          { ...axis, ...this.splits(named), grid: { show: false }, size, space, gap: 6, values: (u, at) => at.map(tick) },
          { ...axis, size: 54, space: 34, values: (u, at) => at.map((v) => (v == null ? "" : number(v))) },
        ],
        cursor: {
          sync,
          drag: { x: true, y: false, dist: 6 },
          dataIdx: nearest,
          points: { size: 8, fill: (u, si) => (pointed(si) ? of(this.lineOf[si]) : "transparent") },
        },
        legend: { live: true, markers: { width: 0, fill: (u, si) => `var(--series-${((this.lineOf[si].colour || 0) % 8) + 1})` } },
        hooks: {
          drawAxes: [(u) => this.thinLines(u)],
          draw: [(u) => this.whiskers(u), (u) => this.words(u)],
          setSeries: [(u, si, opts) => this.withBounds(u, si, opts)],
        },
      };
    }

    scaleOfX(named) {
      const measured = this.spec.lines.flatMap((l) => l.x);
      const first = Math.min(...measured), last = Math.max(...measured);
      const xs = this.spec.lines.flatMap((l) => [...(l.x_low || []), ...(l.x_high || [])]).filter((x) => x != null);
      const low = Math.min(first, ...xs, ...this.spec.uprights), high = Math.max(last, ...xs, ...this.spec.uprights);
      const scale = { time: false, distr: this.spec.log2 ? 3 : 1, log: 2 };
      if (named || this.spec.together || this.spec.lines.some((l) => l.draw !== "line")) {
        const bars = this.spec.lines.find((l) => l.draw === "bars");
        const share = bars ? 1 / Math.max(1, bars.x.length - 1) : this.spec.together ? 0.02 : 0.05;
        const room = named ? 0.5 : (high - low || 1) * share;
        const whole = this.spec.log2 ? [low / 1.15, high * 1.15] : [low - room, high + room];
        // a part that was zoomed into is taken as it is
        scale.range = (u, from, to) => (from > first || to < last ? [from, to] : whole);
      }
      return scale;
    }

    splits(named) {
      if (named) return { splits: () => this.spec.names.map((_, k) => k) };
      if (!this.spec.log2) return {};
      const powers = Array.from({ length: 41 }, (_, k) => 2 ** (k - 20));
      return { splits: (u, axis, min, max) => powers.filter((x) => x >= min && x <= max) };
    }

    rangeOfY(low, high) {
      if (low == null) return [0, 1];
      for (const level of this.spec.levels) { low = Math.min(low, level); high = Math.max(high, level); }
      if (this.spec.lines.some((l) => l.draw === "bars")) low = Math.min(low, 0);
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      return [low === 0 ? 0 : low - room, high + room];
    }

    thinLines(u) {
      const { ctx, bbox: b } = u;
      const cut = (x1, y1, x2, y2) => { ctx.beginPath(); ctx.moveTo(x1, y1); ctx.lineTo(x2, y2); ctx.stroke(); };
      ctx.save();
      ctx.beginPath();
      ctx.rect(b.left, b.top, b.width, b.height);
      ctx.clip();
      ctx.strokeStyle = theme.faint;
      ctx.lineWidth = 1.25 * ratio;
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      for (const level of this.spec.levels) { const y = u.valToPos(level, "y", true); cut(b.left, y, b.left + b.width, y); }
      for (const x of this.spec.uprights) { const at = u.valToPos(x, "x", true); cut(at, b.top, at, b.top + b.height); }
      const [left, bottom, right, top] = [0, 0, 1, 1].map((v, k) => u.valToPos(v, "xy"[k % 2], true));
      if (this.spec.diagonal) cut(left, bottom, right, top);
      ctx.restore();
    }

    whiskers(u) {
      const { ctx, bbox: b } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(b.left, b.top, b.width, b.height);
      ctx.clip();
      ctx.lineWidth = 1.5 * ratio;
      this.lineOf.forEach((line, si) => {
        if (!line || line.bound || !u.series[si].show || line.draw === "line" || line.draw === "faint") return;
        ctx.strokeStyle = of(line);
        const bar = (x1, y1, x2, y2) => {
          if ([x1, y1, x2, y2].includes(undefined) || [x1, y1, x2, y2].includes(null)) return;
          ctx.beginPath();
          ctx.moveTo(u.valToPos(x1, "x", true), u.valToPos(y1, "y", true));
          ctx.lineTo(u.valToPos(x2, "x", true), u.valToPos(y2, "y", true));
          ctx.stroke();
        };
        line.x.forEach((x, k) => {
          bar(x, line.low?.[k], x, line.high?.[k]);
          bar(line.x_low?.[k], line.y[k], line.x_high?.[k], line.y[k]);
        });
      });
      ctx.restore();
    }

    words(u) {
      const { ctx, bbox: b } = u;
      ctx.save();
      ctx.font = FONT.replace("12px", `${11 * ratio}px`);
      ctx.textBaseline = "bottom";
      ctx.textAlign = "left";
      const taken = []; // a word that would cover another is left out: the pointer and the table have it
      this.lineOf.forEach((line, si) => {
        if (!line?.labels || !u.series[si].show) return;
        ctx.fillStyle = theme.soft;
        line.labels.forEach((label, k) => {
          const x = u.valToPos(line.x[k], "x", true), y = u.valToPos(line.y[k], "y", true);
          if (x < b.left || x > b.left + b.width) return;
          const width = ctx.measureText(label).width, turned = x + width + 8 * ratio > b.left + b.width;
          const left = turned ? x - width - 7 * ratio : x + 7 * ratio;
          const base = Math.max(y + (line.draw === "dots" ? 16 : -5) * ratio, b.top + 12 * ratio); // off the line that joins them
          if (taken.some((t) => Math.abs(t.base - base) < 12 * ratio && left < t.right && t.left < left + width)) return;
          taken.push({ left, right: left + width, base });
          ctx.fillText(label, left, base);
        });
      });
      ctx.restore();
    }

    withBounds(u, si, opts) {
      if (si == null || opts.show == null || !this.lineOf[si]?.low) return;
      for (const bound of [si + 1, si + 2]) if (u.series[bound].show !== opts.show) u.setSeries(bound, { show: opts.show });
    }

    // keys do what the pointer does: arrows move along the curve, + and − zoom, 0 shows all
    controls() {
      for (const [k, cell] of this.u.root.querySelectorAll(".u-legend th").entries()) {
        if (k === 0) continue;
        cell.tabIndex = 0;
        cell.setAttribute("role", "button");
        cell.setAttribute("aria-pressed", "true");
        const shown = () => String(!cell.parentNode.classList.contains("u-off"));
        cell.addEventListener("click", () => requestAnimationFrame(() => cell.setAttribute("aria-pressed", shown())));
        cell.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          event.stopPropagation();
          cell.click();
        });
      }
      this.place.addEventListener("keydown", (event) => this.key(event));
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target !== this.place) return;
      const u = this.u, xs = u.data[0], { min, max } = u.scales.x;
      const first = xs.findIndex((x) => x >= min), last = xs.findLastIndex((x) => x <= max);
      const now = u.cursor.idx ?? first - 1, stride = event.shiftKey ? Math.max(1, Math.round((last - first) / 20)) : 1;
      const moves = { ArrowRight: now + stride, ArrowLeft: (u.cursor.idx ?? last + 1) - stride, Home: first, End: last };
      const zooms = { "+": 0.5, "=": 0.5, "-": 2 };
      if (event.key in moves) this.point(Math.min(last, Math.max(first, moves[event.key])));
      else if (event.key in zooms) this.zoom(xs[u.cursor.idx] ?? (min + max) / 2, zooms[event.key]);
      else if (event.key === "0" || event.key === "Escape") this.zoom(0, Infinity);
      else return;
      event.preventDefault();
    }

    point(at) {
      const u = this.u;
      u.setCursor({ left: u.valToPos(u.data[0][at], "x"), top: u.over.clientHeight / 2 }, true, true);
      const read = (line, si) => `${line.name} ${this.valueOf(line, u, si, nearest(u, si, at))}`;
      const shown = (line, si) => line && !line.bound && line.draw !== "faint" && u.series[si].show;
      const values = this.lineOf.flatMap((line, si) => (shown(line, si) ? [read(line, si)] : []));
      this.said.textContent = `${this.nameOf(u.data[0][at])}: ${values.join(", ")}`;
    }

    zoom(centre, by) {
      const u = this.u, xs = u.data[0], { min, max } = u.scales.x;
      const low = Math.max(xs[0], centre - (centre - min) * by), high = Math.min(xs[xs.length - 1], centre + (max - centre) * by);
      const to = Number.isFinite(by) ? { min: low, max: high } : { min: xs[0], max: xs[xs.length - 1] };
      const all = this.spec.together ? drawn.filter((other) => other.spec.together === this.spec.together) : [this];
      for (const one of all) one.u.setScale("x", to);
    }
  }

  const redraw = () => {
    readTheme();
    for (const one of drawn) one.u.redraw(false, true);
  };
  readTheme();
  const start = () => {
    document.getElementById("still").hidden = true;
    for (const figure of document.querySelectorAll("figure.plot")) drawn.push(new Drawing(figure));
  };
  addEventListener("DOMContentLoaded", start); // uPlot follows this script, and reads the ratio set above
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    root.dataset.print = "1";
    for (const part of document.querySelectorAll("details.open-on-paper")) part.open = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    redraw();
  });
})();
