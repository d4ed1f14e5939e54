/* One document seen through a model. The data stands in #data; nothing is fetched. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.getElementById(name);
  const L = data.layers, H = data.heads, N = data.tokens.length;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // --- numbers as they were packed ---------------------------------------------------------

  function bytes(text) {
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }
  const floats = (text) => text && new Float32Array(bytes(text).buffer);
  const effects = floats(data.effects), strengths = floats(data.strengths), scores = floats(data.scores);
  const firstOrder = floats(data.firstOrder), C = (data.labels || []).length;
  const sinkMass = floats(data.sinkMass), firstMass = floats(data.firstMass);
  const roots = data.means && new Uint16Array(bytes(data.means).buffer);
  const flags = data.sinks && bytes(data.sinks), seen = data.seen && new Uint16Array(bytes(data.seen).buffer);
  const place = (layer, head) => layer * H + head;
  const isExact = (at) => !Number.isNaN(scores[at * C]); // else its effect is the first order's
  const mean = (layer, head, t) => (roots[place(layer, head) * N + t] / 65535) ** 2;
  function isSink(layer, head, t) {
    const bit = place(layer, head) * N + t;
    return (flags[bit >> 3] >> (bit & 7)) & 1;
  }
  const counts = flags && Float32Array.from({ length: L * H }, (_, at) => {
    let count = 0;
    for (let t = 0; t < N; t++) count += isSink(Math.floor(at / H), at % H, t);
    return count;
  });
  const kept = new Map();
  function mapOf(layer, head) {
    const key = `${layer}.${head}`;
    if (!data.maps || !data.maps[key]) return null;
    if (!kept.has(key)) {
      const one = data.maps[key];
      kept.set(key, { weights: bytes(one.weights), inside: floats(one.inside), outside: floats(one.outside), after: one.after && bytes(one.after) });
    }
    return kept.get(key);
  }
  const starts = []; // where the columns 0..row of each stored row begin
  if (data.rows) data.rows.reduce((sum, row) => (starts.push(sum), sum + row + 1), 0);
  const SQUARES = Float64Array.from({ length: 256 }, (_, n) => (n / 255) ** 2);
  function weights(map, index, t) { // before and after
    if (t > data.rows[index]) return [0, 0];
    const at = starts[index] + t, before = SQUARES[map.weights[at]];
    const factors = isSink(state.layer, state.head, t) ? map.inside : map.outside;
    return [before, map.after ? SQUARES[map.after[at]] : before * factors[index]];
  }

  // --- what is shown of texts and numbers --------------------------------------------------

  const HIDDEN = /(?![ \n])[\p{C}\p{Z}\u034f\u115f\u1160\u17b4\u17b5\u3164\ufe00-\ufe0f\uffa0]/gu;
  const visible = (text) => String(text)
    .replace(HIDDEN, (c) => `\u27e8U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`)
    .replace(/\n/g, "\u21b5").replace(/ /g, "\u2423");
  const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "\u2026" : text);
  const quoted = (t) => `\u201c${cut(visible(data.tokens[t]), 40)}\u201d`;
  const signed = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(4);
  const share = (value) => `${(100 * value).toFixed(1)} %`;

  // --- colours, by the reader's setting ----------------------------------------------------

  const once = (make) => { // colours are made once for each of the reader's two settings
    const made = new Map();
    return (key = "") => {
      const known = `${dark.matches}${key}`;
      if (!made.has(known)) made.set(known, make(key));
      return made.get(known);
    };
  };
  const rising = (x) => d3.interpolateYlGnBu(dark.matches ? 1 - x : x);
  const bothWays = once(() => d3.piecewise(d3.interpolateRgb, dark.matches
    ? ["#ffb199", "#c0392b", "#1d232a", "#2d7dd2", "#a8d5ff"]
    : ["#a50f15", "#f4a582", "#f4f4f4", "#92c5de", "#0b559f"]));
  const pixelsOf = once((view) => Uint32Array.from({ length: 513 }, (_, n) => {
    const c = d3.rgb(view === "difference" ? bothWays()(n / 512) : rising(n / 512)); // as bytes: red, green, blue, opaque
    return new Uint32Array(new Uint8Array([c.r, c.g, c.b, 255]).buffer)[0];
  }));
  const inkOn = (colour) => (d3.lab(colour).l > 58 ? "#111" : "#fff");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const METRICS = {
    effect: data.searched
      ? { label: "effect found by the search, in spreads of the margin", short: "effect found by the search", values: effects, both: true,
        text: (v) => (Number.isNaN(v) ? "not measured" : `effect ${signed(v)} spreads`) }
      : { label: "effect of this head alone on the margin, in nats", short: "effect on the margin", values: effects, both: true,
        text: (v, at) => (Number.isNaN(v) ? "its layer does not attend" : isExact(at) ? `effect ${signed(v)} nats${Number.isNaN(firstOrder[at]) ? "" : ` (first order ${signed(firstOrder[at])})`}` : `effect about ${signed(v)} nats (first order)`) },
    firstOrder: { label: "effect of this head alone to first order, from one backward pass", short: "effect, first order only", values: firstOrder && firstOrder.some((v) => !Number.isNaN(v)) ? firstOrder : null, both: true, text: () => null },
    sinks: { label: "number of sinks", values: counts, text: (v) => `${v} sink${v === 1 ? "" : "s"}` },
    sinkMass: { label: "share of mass on sinks", values: sinkMass, text: (v) => `${share(v)} of mass on sinks` },
    firstMass: { label: "mass on the first token", values: firstMass, text: (v) => `${share(v)} on the first token` },
    strength: { label: "strength in the head set", values: data.artifact ? strengths : null,
      text: (v) => (Number.isNaN(v) ? "not in the head set" : `strength ${+v.toFixed(4)}`) },
    initial: { label: "strength on the first token", values: floats(data.initial),
      text: (v) => (Number.isNaN(v) ? "no strength on the first token" : `strength ${+v.toFixed(4)} on the first token`) },
  };
  const state = { layer: 0, head: 0, metric: effects ? "effect" : "strength", view: "before", colour: "head", token: 0, row: 0 };
  if (effects) {
    let best = 0;
    effects.forEach((v, at) => { if (Math.abs(v) > Math.abs(effects[best] || 0)) best = at; });
    state.layer = Math.floor(best / H); state.head = best % H;
  } else {
    const first = strengths.findIndex((v) => !Number.isNaN(v));
    if (first >= 0) { state.layer = Math.floor(first / H); state.head = first % H; }
  }
  if (data.rows) state.row = data.rows.length - 1;

  function colourOf(metric) {
    const values = Array.from(metric.values).filter(Number.isFinite);
    const most = d3.max(values, Math.abs) || 1, ramp = bothWays();
    if (!metric.both) return { of: (v) => (Number.isFinite(v) ? rising(v / most) : "none"), at: (part) => most * part };
    const root = (x) => Math.sign(x) * Math.sqrt(Math.abs(x)); // one strong head would make all others pale
    return {
      of: (v) => (Number.isFinite(v) ? ramp((root(v / most) + 1) / 2) : "none"),
      at: (part) => most * (2 * part - 1) * Math.abs(2 * part - 1),
    };
  }

  // --- the map of heads --------------------------------------------------------------------

  const width = (name) => Math.max(280, Math.min(900, find(name).clientWidth));
  let headsDrawn = null;
  function drawHeads() {
    const metric = METRICS[state.metric], colour = colourOf(metric), box = find("heads-drawing");
    const cells = Array.from({ length: L * H }, (_, at) => ({ layer: Math.floor(at / H), head: at % H, v: metric.values[at],
      set: data.artifact && !Number.isNaN(strengths[at]) }));
    const line = style("--line"), ground = style("--ground");
    const size = H / data.groups, wide = width("heads-drawing");
    const step = Math.max(7, Math.min(24, (wide - 50) / H));
    const every = (count, room) => d3.range(0, count, Math.max(1, Math.ceil(count / room)));
    const svg = Plot.plot({
      width: wide, height: Math.max(150, L * Math.min(step, 16) + 62), marginLeft: 42, marginTop: 30, marginBottom: 34,
      x: { type: "band", domain: d3.range(H), label: "head", padding: 0.06, ticks: every(H, wide / 28), tickSize: 0 },
      y: { type: "band", domain: d3.range(L), label: "layer", padding: 0.06, ticks: every(L, 20), tickSize: 0 },
      marks: [
        Plot.cell(cells, { x: "head", y: "layer", fill: (d) => colour.of(d.v), stroke: line, strokeWidth: 0.4 }),
        Plot.dot(cells.filter((d) => d.set), { x: "head", y: "layer", r: 2.2, fill: "currentColor", stroke: ground, strokeWidth: 1 }),
      ],
    });
    const x = svg.scale("x"), y = svg.scale("y"), top = y.apply(0) - 4, bottom = y.apply(L - 1) + y.bandwidth + 4;
    const drawing = d3.select(svg);
    if (data.groups < H) { // query heads of one key head stand in a bracket
      const groups = drawing.append("g").attr("class", "groups").attr("stroke", "currentColor").attr("fill", "none");
      groups.selectAll("path").data(d3.range(data.groups)).join("path").attr("d", (g) => {
        const left = x.apply(g * size) + 1, right = x.apply((g + 1) * size - 1) + x.bandwidth - 1;
        return `M${left},${top + 3}V${top - 2}H${right}V${top + 3}`;
      });
      groups.append("path").attr("stroke-opacity", 0.45).attr("d", d3.range(1, data.groups).map((g) => {
        const middle = (x.apply(g * size - 1) + x.bandwidth + x.apply(g * size)) / 2;
        return `M${middle},${top}V${bottom}`;
      }).join(""));
    }
    const ring = drawing.append("rect").attr("class", "chosen").attr("fill", "none").attr("stroke", style("--mark"))
      .attr("stroke-width", 2.5).attr("width", x.bandwidth + 2).attr("height", y.bandwidth + 2).attr("rx", 1.5);
    const at = (event) => {
      const [px, py] = d3.pointer(event, svg), scale = wide / (svg.viewBox.baseVal.width || wide);
      const across = (x.apply(H > 1 ? 1 : 0) - x.apply(0)) || 1, down = (y.apply(L > 1 ? 1 : 0) - y.apply(0)) || 1;
      const head = Math.floor((px * scale - x.apply(0)) / across), layer = Math.floor((py * scale - y.apply(0)) / down);
      return head >= 0 && head < H && layer >= 0 && layer < L ? [layer, head] : null;
    };
    svg.addEventListener("click", (event) => { const hit = at(event); if (hit) choose(...hit); });
    svg.addEventListener("pointermove", (event) => { const hit = at(event); if (hit) tellHead(...hit); });
    svg.addEventListener("pointerleave", () => tellHead(state.layer, state.head));
    box.replaceChildren(svg);
    headsDrawn = () => ring.attr("x", x.apply(state.head) - 1).attr("y", y.apply(state.layer) - 1);
    headsDrawn();
    const ramp = document.createElement("span");
    ramp.className = "ramp";
    ramp.style.background = `linear-gradient(to right, ${d3.range(0, 1.01, 0.1).map((part) => colour.of(colour.at(part))).join(",")})`;
    const dots = data.artifact ? "; dots: heads of the head set" : "";
    const shared = data.groups < H ? `; brackets: query heads that share a key head (${data.groups} group${data.groups > 1 ? "s" : ""})` : "";
    find("heads-legend").replaceChildren(`${metric.label}: ${+colour.at(0).toPrecision(3)}`, ramp, `${+colour.at(1).toPrecision(3)}${metric.both ? ", by square root" : ""}${dots}${shared}`);
  }
  function tellHead(layer, head) {
    const parts = Object.values(METRICS).filter((m) => m.values).map((m) => m.text(m.values[place(layer, head)], place(layer, head)));
    find("head-line").textContent = `layer ${layer}, head ${head}: ${parts.filter(Boolean).join(", ")}`;
  }

  // --- answers -----------------------------------------------------------------------------

  function shares(values) { // of the next token: probabilities; of choices: their shares of all shown
    const raised = values.map(Math.exp);
    if (data.next) return raised;
    const most = d3.max(values), scaled = values.map((v) => Math.exp(v - most)), sum = d3.sum(scaled);
    return scaled.map((v) => v / sum);
  }
  function drawAnswers() {
    const at = place(state.layer, state.head), alone = `${state.layer}.${state.head} alone`;
    const arms = [["stock", data.before]];
    if (isExact(at)) arms.push([alone, Array.from(scores.subarray(at * C, (at + 1) * C))]);
    if (data.after) arms.push(["head set", data.after]);
    const bars = arms.flatMap(([arm, values]) => shares(values).map((p, i) => ({ arm, p, i, score: values[i] })));
    const name = (i) => `${i === data.right ? "\u2713 " : ""}${cut(visible(data.labels[i]), 18)}`;
    const svg = Plot.plot({
      width: width("answers-drawing"), height: C * (arms.length * 11 + 10) + 44, marginLeft: 8, marginRight: 46, marginTop: 6,
      fy: { domain: d3.range(C), tickFormat: name, label: null, axis: "left", padding: 0.15 },
      y: { domain: arms.map(([arm]) => arm), axis: null }, x: { label: data.next ? "probability" : "share among the choices", nice: true },
      color: { domain: ["stock", alone, "head set"], range: [style("--quiet"), style("--mark"), dark.matches ? "#5cb3ff" : "#0b6bcb"] },
      marks: [
        Plot.barX(bars, { x: "p", y: "arm", fy: "i", fill: "arm" }),
        Plot.text(bars, { x: "p", y: "arm", fy: "i", text: (d) => d.p.toFixed(4), textAnchor: "start", dx: 3, fontSize: 9 }),
      ],
      facet: { marginLeft: 130 },
    });
    find("answers-drawing").replaceChildren(svg);
    const marks = arms.map(([arm, values]) => {
      const others = d3.max(values.filter((_, i) => i !== data.right));
      return `${arm} ${signed(values[data.right] - others)}`;
    });
    find("answers-line").textContent = `margin of ${cut(visible(data.labels[data.right]), 40)} over the best other, in nats: ${marks.join(", ")}`
      + "; bars from above: " + arms.map(([arm]) => arm).join(", ")
      + (isExact(at) || Number.isNaN(effects[at]) ? "" : `; ${alone} was not computed: its effect is about ${signed(effects[at])}, to first order; make the page with --heads ${state.layer}.${state.head} for it`);
  }

  // --- tokens ------------------------------------------------------------------------------

  let spans = [];
  function writeTokens() {
    spans = data.tokens.map((text, t) => {
      const span = document.createElement("span");
      span.textContent = visible(text);
      span.dir = "auto";
      span.id = `token-${t}`;
      span.setAttribute("role", "option");
      return span;
    });
    find("tokens").replaceChildren(...spans.flatMap((span, t) => (data.tokens[t].includes("\n") ? [span, document.createElement("br")] : [span])));
  }
  const averages = roots && Float32Array.from({ length: N }, (_, t) => {
    let sum = 0;
    for (let at = 0; at < L * H; at++) sum += (roots[at * N + t] / 65535) ** 2;
    return sum / (L * H);
  });
  const threshold = () => data.thresholds[state.layer];
  const tokenColours = once(() => d3.range(65).map((n) => rising((n / 64) * 0.9)).map((colour) => `background:${colour};color:${inkOn(colour)}`));
  function colourTokens() {
    const full = 4 * (threshold() ?? 5 / N), all = state.colour === "all", steps = tokenColours();
    spans.forEach((span, t) => {
      const value = all ? averages[t] : mean(state.layer, state.head, t);
      const step = Math.round(64 * Math.min(1, Math.sqrt(value / full)));
      span.style.cssText = steps[step];
      span.classList.toggle("sink", !all && Boolean(isSink(state.layer, state.head, t)));
    });
    tellToken(state.token);
  }
  function tellToken(t) {
    const at = isSink(state.layer, state.head, t) ? ", a sink" : "";
    find("token-line").textContent = `position ${t}, ${quoted(t)}: mean attention ${mean(state.layer, state.head, t).toFixed(5)}`
      + ` of head ${state.layer}.${state.head}${at}; ${averages[t].toFixed(5)} over all heads; seen by ${seen[state.layer * N + t]} rows`;
  }
  function chooseToken(t, scroll = true) {
    spans[state.token].removeAttribute("aria-selected");
    state.token = Math.max(0, Math.min(N - 1, t));
    spans[state.token].setAttribute("aria-selected", "true");
    find("tokens").setAttribute("aria-activedescendant", `token-${state.token}`);
    if (scroll) {
      const box = find("tokens"), span = spans[state.token];
      if (span.offsetTop - box.offsetTop < box.scrollTop || span.offsetTop - box.offsetTop + 24 > box.scrollTop + box.clientHeight)
        box.scrollTop = span.offsetTop - box.offsetTop - box.clientHeight / 2;
    }
    tellToken(state.token);
    if (columnsDrawn) columnsDrawn();
    if (mapDrawn) mapDrawn();
  }

  // --- column means ------------------------------------------------------------------------

  let columnsDrawn = null;
  function drawColumns() {
    const { layer, head } = state, limit = threshold();
    find("columns-title").textContent = `Mean attention that each column gets, head ${layer}.${head}`;
    const marked = style("--mark"), quiet = style("--quiet");
    const columns = d3.range(N).map((t) => ({ t, v: mean(layer, head, t), sink: isSink(layer, head, t) }));
    const svg = Plot.plot({
      width: width("columns-drawing"), height: 190, marginLeft: 48,
      x: { domain: [-0.5, N - 0.5], label: "position" }, y: { type: "sqrt", label: "mean attention", domain: [0, Math.max(d3.max(columns, (d) => d.v), limit ?? 0) || 1] },
      marks: [
        limit === null ? null : Plot.ruleY([limit], { stroke: "currentColor", strokeDasharray: "5 3" }),
        limit === null ? null : Plot.text([limit], { y: (d) => d, x: N - 0.5, text: () => `threshold ${limit.toFixed(4)}`, textAnchor: "end", dy: -7, stroke: style("--ground"), strokeWidth: 5, fill: "currentColor" }),
        Plot.ruleY([0]),
      ],
    });
    const x = svg.scale("x"), y = svg.scale("y"), foot = y.apply(0);
    const bars = d3.select(svg).append("g").attr("class", "bars").attr("stroke-width", Math.max(1, Math.min(8, 0.7 * (x.apply(1) - x.apply(0)))));
    [quiet, marked].forEach((colour, kind) => bars.append("path").attr("stroke", colour) // two marks, not one for each column
      .attr("d", columns.filter((d) => Boolean(d.sink) === Boolean(kind)).map((d) => `M${x.apply(d.t).toFixed(1)},${foot}V${y.apply(d.v).toFixed(1)}`).join("")));
    bars.lower();
    const line = d3.select(svg).append("path").attr("stroke", "currentColor").attr("stroke-opacity", 0.5).attr("fill", "none");
    svg.addEventListener("click", (event) => chooseToken(Math.round(x.invert(d3.pointer(event, svg)[0]))));
    find("columns-drawing").replaceChildren(svg);
    columnsDrawn = () => line.attr("d", `M${x.apply(state.token)},12V160`);
    columnsDrawn();
  }

  // --- one head's map ----------------------------------------------------------------------

  let mapDrawn = null;
  function drawMap() {
    const { layer, head, view } = state, map = mapOf(layer, head), box = find("map-drawing");
    find("map-title").textContent = `Attention map of head ${layer}.${head}, ${view}`;
    if (!map) {
      mapDrawn = null;
      const note = document.createElement("p");
      note.textContent = `The rows of head ${layer}.${head} are not on this page; make it with --heads ${layer}.${head}`;
      box.replaceChildren(note);
      find("weight-line").textContent = "";
      return;
    }
    const R = data.rows.length, canvas = document.createElement("canvas");
    canvas.width = N; canvas.height = R;
    const context = canvas.getContext("2d"), image = context.createImageData(N, R);
    const values = new Float32Array(R * N), sunk = Uint8Array.from({ length: N }, (_, t) => isSink(layer, head, t));
    let most = 0;
    for (let r = 0; r < R; r++) {
      const factors = [map.outside[r], map.inside[r]];
      for (let t = 0, at = starts[r]; t <= data.rows[r]; t++, at++) {
        let value = SQUARES[map.weights[at]];
        if (view !== "before") {
          const after = map.after ? SQUARES[map.after[at]] : value * factors[sunk[t]];
          value = view === "after" ? after : after - value;
        }
        values[r * N + t] = value;
        most = Math.max(most, Math.abs(value));
      }
    }
    most = most || 1;
    const pixels = new Uint32Array(image.data.buffer), table = pixelsOf(view);
    for (let r = 0; r < R; r++) for (let t = 0; t <= data.rows[r]; t++) {
      const part = values[r * N + t] / most, root = Math.sqrt(Math.abs(part));
      pixels[r * N + t] = table[Math.round(512 * (view === "difference" ? ((part < 0 ? -root : root) + 1) / 2 : root))];
    }
    context.putImageData(image, 0, 0);
    const wide = Math.min(width("map-drawing"), 640), left = 46, top = 6, bottom = 40, inner = wide - left - 8;
    const high = Math.max(160, Math.min(inner, inner * R / N));
    const svg = d3.create("svg").attr("width", wide).attr("height", high + top + bottom).attr("viewBox", [0, 0, wide, high + top + bottom])
      .attr("font-family", "system-ui, sans-serif").attr("font-size", 10);
    canvas.style.cssText = `left:${left}px;top:${top}px;width:${inner}px;height:${high}px`; // lies below the drawing
    svg.append("rect").attr("x", left).attr("y", top).attr("width", inner).attr("height", high).attr("fill", "none").attr("stroke", "currentColor").attr("stroke-opacity", 0.4);
    const x = d3.scaleLinear([0, N], [left, left + inner]), y = d3.scaleLinear([0, R], [top, top + high]);
    const whole = (scale, count) => scale.ticks(count).filter(Number.isInteger);
    svg.append("g").attr("transform", `translate(0,${top + high})`).call(d3.axisBottom(x).tickValues(whole(x, 8)).tickFormat(d3.format("d")));
    svg.append("g").attr("transform", `translate(${left},0)`)
      .call(d3.axisLeft(y).tickValues(whole(y, 8).filter((r) => r < R)).tickFormat((r) => data.rows[r]));
    svg.append("text").attr("x", left + inner).attr("y", top + high + 34).attr("text-anchor", "end").attr("fill", "currentColor")
      .text(`column; square root of the weight, ${view === "difference" ? `red \u2212${most.toPrecision(2)}, blue +${most.toPrecision(2)}` : `up to ${most.toPrecision(2)}`}`);
    const sinks = d3.range(N).filter((t) => isSink(layer, head, t));
    svg.append("path").attr("d", sinks.map((t) => `M${x(t + 0.5)},${top}v-5`).join("")).attr("stroke", style("--mark")).attr("stroke-width", 2);
    const cross = svg.append("path").attr("stroke", style("--mark")).attr("fill", "none").attr("stroke-opacity", 0.8);
    const node = svg.node();
    const hit = (event) => {
      const [px, py] = d3.pointer(event, node), t = Math.floor(x.invert(px)), r = Math.floor(y.invert(py));
      return t >= 0 && t < N && r >= 0 && r < R ? [r, t] : null;
    };
    node.addEventListener("pointermove", (event) => { const at = hit(event); if (at) tellWeight(map, ...at); });
    node.addEventListener("pointerleave", () => tellWeight(map, state.row, state.token));
    node.addEventListener("click", (event) => { const at = hit(event); if (at) { state.row = at[0]; chooseToken(at[1]); } });
    box.replaceChildren(canvas, node);
    mapDrawn = () => {
      cross.attr("d", `M${x(state.token + 0.5)},${top}v${high}M${left},${y(state.row + 0.5)}h${inner}`);
      tellWeight(map, state.row, state.token);
    };
    mapDrawn();
  }
  function tellWeight(map, r, t) {
    const [before, after] = weights(map, r, t);
    find("weight-line").textContent = `row ${data.rows[r]} ${quoted(data.rows[r])}, column ${t} ${quoted(t)}: `
      + `before ${before.toFixed(4)}, after ${after.toFixed(4)}, difference ${signed(after - before)}`;
  }

  // --- sinks -------------------------------------------------------------------------------

  function listSinks() {
    const { layer, head } = state, limit = threshold();
    const found = d3.range(N).filter((t) => isSink(layer, head, t));
    const rows = found.map((t) => {
      const row = document.createElement("tr"), value = mean(layer, head, t);
      const cells = [t, cut(visible(data.tokens[t]), 60), value.toFixed(5), limit === null ? "" : `${(value / limit).toFixed(2)} \u00d7`, seen[layer * N + t]];
      row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    });
    find("sinks").tBodies[0].replaceChildren(...rows);
    find("sinks-line").textContent = found.length ? "" : `Head ${layer}.${head} has no sinks in this document.`;
  }

  // --- choosing ----------------------------------------------------------------------------

  function choose(layer, head) {
    state.layer = Math.max(0, Math.min(L - 1, layer));
    state.head = Math.max(0, Math.min(H - 1, head));
    headsDrawn();
    tellHead(state.layer, state.head);
    if (N) showHead();
  }
  function showHead() {
    if (scores) drawAnswers();
    drawColumns();
    drawMap();
    colourTokens();
    listSinks();
  }
  const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function onKeys(name, move, end) {
    find(name).addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = ARROWS[event.key];
      if (step) move(...step);
      else if (event.key === "Home" || event.key === "End") end(event.key === "End");
      else return;
      event.preventDefault();
    });
  }
  onKeys("heads-drawing", (down, across) => choose(state.layer + down, state.head + across), (last) => choose(last ? L - 1 : 0, state.head));

  // --- pictures ----------------------------------------------------------------------------

  function download(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function pictureOf(figure) {
    const copy = figure.querySelector(".drawing svg").cloneNode(true), canvas = figure.querySelector(".drawing canvas");
    if (canvas) {
      const place = { x: canvas.offsetLeft, y: canvas.offsetTop, width: canvas.offsetWidth, height: canvas.offsetHeight,
        href: canvas.toDataURL(), preserveAspectRatio: "none", style: "image-rendering:pixelated" };
      const image = document.createElementNS("http://www.w3.org/2000/svg", "image");
      Object.entries(place).forEach(([name, value]) => image.setAttribute(name, value));
      copy.prepend(image);
    }
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("style", `color:${style("--ink")};background:${style("--ground")}`);
    return new XMLSerializer().serializeToString(copy);
  }
  function save(figure, kind) {
    const svg = figure.querySelector(".drawing svg");
    if (!svg) return;
    const name = `${figure.dataset.name}-${state.layer}.${state.head}.${kind}`, text = pictureOf(figure);
    if (kind === "svg") { download(new Blob([text], { type: "image/svg+xml" }), name); return; }
    const image = new Image(), [wide, high] = [Number(svg.getAttribute("width")), Number(svg.getAttribute("height"))];
    image.onload = () => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 2 * wide, height: 2 * high });
      const context = canvas.getContext("2d");
      context.fillStyle = style("--ground");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => download(blob, name), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  }
  document.querySelectorAll("figure").forEach((figure) => {
    const saves = document.createElement("div");
    saves.className = "saves";
    ["png", "svg"].forEach((kind) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind.toUpperCase();
      button.setAttribute("aria-label", `Save ${figure.dataset.name} as ${kind.toUpperCase()}`);
      button.addEventListener("click", () => save(figure, kind));
      saves.append(button);
    });
    figure.append(saves);
  });

  // --- beginning ---------------------------------------------------------------------------

  find("title").textContent = data.title;
  find("about").textContent = [data.model, data.artifact ? `head set ${data.artifact}` : "no head set: every head has the calibration's own strength",
    data.settings, data.worth, N ? `${N} tokens` : null].filter(Boolean).join(" \u00b7 ");
  Object.entries(METRICS).filter(([, metric]) => metric.values).forEach(([name, metric]) => {
    find("metric").append(new Option(metric.short || metric.label, name, false, name === state.metric));
  });
  find("metric").addEventListener("change", (event) => { state.metric = event.target.value; drawHeads(); });
  find("answers-part").hidden = !scores;
  find("document-section").hidden = !N;
  if (N) {
    find("answers-title").textContent = data.next ? "Next token" : "Choices";
    writeTokens();
    find("tokens").addEventListener("click", (event) => { const t = spans.indexOf(event.target); if (t >= 0) chooseToken(t, false); });
    find("tokens").addEventListener("pointerover", (event) => { const t = spans.indexOf(event.target); if (t >= 0) tellToken(t); });
    find("tokens").addEventListener("pointerleave", () => tellToken(state.token));
    onKeys("tokens", (down, across) => chooseToken(state.token + across + down * 10), (last) => chooseToken(last ? N - 1 : 0));
    onKeys("map-drawing", (down, across) => {
      state.row = Math.max(0, Math.min(data.rows.length - 1, state.row + down));
      chooseToken(state.token + across);
    }, (last) => chooseToken(last ? N - 1 : 0));
    document.querySelectorAll("input[name=view]").forEach((one) => one.addEventListener("change", () => { state.view = one.value; drawMap(); }));
    document.querySelectorAll("input[name=colour]").forEach((one) => one.addEventListener("change", () => { state.colour = one.value; colourTokens(); }));
  }
  function everything() { drawHeads(); tellHead(state.layer, state.head); if (N) { showHead(); chooseToken(state.token); } }
  everything();
  dark.addEventListener("change", everything);
  let last = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== last) { last = innerWidth; everything(); } });
})();
