"use strict";
// The plots: curves of accuracy and loss, and cost against accuracy.
(() => {
  const { data } = page;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PAPER = { width: 660, height: 300 }; // what fits between the margins of a sheet
  let printing = false;
  const LETTERS = 22; // longer names are cut where they stand in a plot
  const LABELS = 8; // more names at the end of the lines than this cover one another

  const element = (id) => document.getElementById(id);
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
  const ticked = (id) => element(id)?.checked ?? false;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const scheme = () => (dark.matches && !printing ? "dark" : "light");
  // Plotly reads a little HTML in its texts; names are names.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text) => plain(text.length > LETTERS ? `${text.slice(0, LETTERS - 1)}…` : text);
  const percent = (value) => `${(100 * value).toFixed(data.digits)} %`;
  const english = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const number = (value) => english.format(value);
  const bytes = (value) => {
    const power = Math.min(3, Math.floor(Math.log2(Math.max(value, 1)) / 10));
    return `${number(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB"][power]}`;
  };
  const faint = (colour, opacity) => {
    const part = (at) => parseInt(colour.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  };
  const widthOf = (box) => (printing ? PAPER.width : box.clientWidth);
  const heightOf = (box) => (printing ? PAPER.height : box.clientHeight);
  const visible = () => data.methods.filter((_, index) => page.shown[index]);

  function layout(box, margin) {
    const [ink, soft, line] = [css("--ink"), css("--soft"), css("--line")];
    const axis = () => ({
      gridcolor: line,
      linecolor: line,
      zeroline: false,
      ticks: "outside",
      tickcolor: line,
      ticklen: 4,
      tickfont: { color: soft, size: 12 },
      title: { font: { color: soft, size: 12 }, standoff: 8 },
      fixedrange: box.clientWidth < 560, // on a phone a finger scrolls the page, not the plot
    });
    return {
      autosize: true,
      width: printing ? PAPER.width : undefined,
      height: heightOf(box),
      margin: { l: 66, r: 16, t: 12, b: 48, ...margin },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 },
      showlegend: false,
      hovermode: "closest",
      hoverlabel: { bgcolor: css("--raised"), bordercolor: line, font: { color: ink, size: 12 } },
      xaxis: { ...axis(), showgrid: false },
      yaxis: axis(),
      annotations: [],
    };
  }
  const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false };
  const plans = new Map();

  function paint(box, traces, plan) {
    const first = !plans.has(box);
    plans.set(box, { annotations: plan.annotations, ranges: rangesOf(plan) });
    const drawn = Plotly.react(box, traces, plan, CONFIG);
    if (first) {
      // A zoom moves the lines away from their names; a double click brings both back.
      box.on("plotly_relayout", (change) => {
        if (!Object.keys(change).some((key) => /^[xy]axis\./.test(key))) return;
        const { annotations, ranges } = plans.get(box);
        const back = rangesOf(box.layout) === ranges;
        Plotly.relayout(box, { annotations: back ? annotations : [] });
      });
    }
    return drawn;
  }

  const rangesOf = ({ xaxis, yaxis }) => JSON.stringify([xaxis.range, yaxis.range]);

  function curveTraces(name, format) {
    const x = chosen("x");
    const unit = x === "step" ? "step" : "second";
    const traces = [];
    const methods = visible();
    for (const method of methods) {
      const curve = method[name];
      if (!curve.step.length) continue;
      const colour = method[scheme()];
      if (ticked("bands")) {
        traces.push({
          x: [...curve[x], ...[...curve[x]].reverse()],
          y: [...curve.high, ...[...curve.low].reverse()],
          type: "scatter",
          mode: "none",
          fill: "toself",
          fillcolor: faint(colour, scheme() === "dark" ? 0.2 : 0.13),
          hoverinfo: "skip",
        });
      }
      traces.push({
        x: curve[x],
        y: curve.mean,
        type: "scatter",
        mode: "lines+markers",
        line: { color: colour, width: method.reference ? 2.6 : 1.8, dash: method.dash },
        marker: { color: colour, size: 6, symbol: method.marker, maxdisplayed: 7 },
        text: curve.mean.map(
          (mean, at) =>
            `<b>${plain(method.label)}</b><br>${format(mean)} ` +
            `(${format(curve.low[at])} to ${format(curve.high[at])})<br>` +
            `${unit} ${number(curve[x][at])}, ${curve.count[at]} ` +
            (curve.count[at] === 1 ? "seed" : "seeds")
        ),
        hoverinfo: "text",
        meta: method.label,
      });
      const crosses = method.failures.map((failure) => {
        const after = curve.step.findIndex((step) => step >= failure.step);
        return after < 0 ? curve.step.length - 1 : after;
      });
      if (crosses.length) {
        traces.push({
          x: crosses.map((at) => curve[x][at]),
          y: crosses.map((at) => curve.mean[at]),
          type: "scatter",
          mode: "markers",
          marker: { symbol: "x-thin", size: 11, line: { width: 2.5, color: colour } },
          text: method.failures.map(
            (failure) =>
              `<b>${plain(method.label)}</b><br>seed ${failure.seed}: ` +
              `${plain(failure.status)} at step ${number(failure.step)}`
          ),
          hoverinfo: "text",
        });
      }
    }
    return traces;
  }

  function drawCurves(id, name, title, format, rangeOf) {
    const box = element(id);
    if (!box) return null;
    const methods = visible().filter((method) => method[name].step.length);
    const named = methods.length <= LABELS && widthOf(box) > 480;
    const widest = Math.max(0, ...methods.map((method) => Math.min(LETTERS, method.label.length)));
    const plan = layout(box, named ? { r: 18 + 6.6 * widest } : {});
    const x = chosen("x");
    plan.uirevision = [x, ticked("log"), ticked("top"), chosen("loss"), printing].join();
    plan.xaxis.title.text = x === "step" ? "optimiser step" : "training time in seconds";
    plan.yaxis.title.text = title;
    if (methods.length) {
      plan.xaxis.range = [0, Math.max(...methods.map((method) => method[name][x].at(-1)))];
      plan.yaxis.range = rangeOf(plan.yaxis, methods);
      if (named) plan.annotations = lineNames(box, plan, name, methods);
    } else {
      plan.annotations = [
        note(
          data.methods.some((method) => method[name].step.length)
            ? "no method is shown" : "nothing was recorded"
        ),
      ];
    }
    return paint(box, curveTraces(name, format), plan);
  }

  const note = (text) => ({
    text, xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false,
    font: { color: css("--soft"), size: 13 },
  });

  // Names at the end of the lines, moved apart until none covers another.
  function lineNames(box, plan, name, methods) {
    const height = heightOf(box) - plan.margin.t - plan.margin.b;
    const [low, high] = plan.yaxis.range;
    const place = (value) => {
      const scaled = plan.yaxis.type === "log" ? Math.log10(Math.max(value, 1e-12)) : value;
      return height * Math.min(1, Math.max(0, (high - scaled) / (high - low)));
    };
    const gap = 14;
    const ends = methods.map((method) => ({
      method,
      x: method[name][chosen("x")].at(-1) / (plan.xaxis.range[1] || 1),
      at: place(method[name].mean.at(-1)),
    }));
    const last = ends.filter(({ x }) => x > 0.85).sort((a, b) => a.at - b.at);
    for (let round = 0; round < 100; round += 1) {
      let moved = false;
      last.forEach((end, index) => {
        const before = index ? last[index - 1].at + gap : -4;
        if (end.at < before - 0.1) {
          const lack = before - end.at;
          end.at += index ? lack / 2 : lack;
          if (index) last[index - 1].at -= lack / 2;
          moved = true;
        }
      });
      if (!moved) break;
    }
    return ends.map(({ method, x, at }) => ({
      text: short(method.label),
      xref: "paper", yref: "paper", x: x > 0.85 ? 1 : x, y: 1 - at / height,
      xanchor: "left", yanchor: "middle", xshift: x > 0.85 ? 8 : 11, showarrow: false,
      font: { color: method[scheme()], size: 12 },
    }));
  }

  function accuracyRange(axis, methods) {
    axis.tickformat = ".0%";
    const high = Math.max(...methods.flatMap(({ accuracy }) => accuracy.high));
    let low = Math.min(...methods.flatMap(({ accuracy }) => accuracy.low));
    if (ticked("top")) {
      // From where most methods stood after a third of their training.
      const ends = methods.map(({ accuracy }) => accuracy.mean.at(-1)).sort((a, b) => a - b);
      low = Math.max(low, ends[Math.floor(ends.length / 3)] - 0.06);
    }
    const margin = 0.04 * (high - low) || 0.01;
    if (high - low < 0.05) axis.tickformat = ".1%";
    return [low - margin, high + margin];
  }

  function lossRange(name) {
    return (axis, methods) => {
      const bands = ticked("bands");
      const high = Math.max(...methods.flatMap((each) => each[name][bands ? "high" : "mean"]));
      const lows = methods.flatMap((each) => each[name][bands ? "low" : "mean"]);
      if (!ticked("log")) return [0, 1.04 * high || 1];
      axis.type = "log";
      axis.tickformat = "~g";
      const low = Math.min(...lows.filter((value) => value > 0));
      if (!Number.isFinite(low)) return [-1, 0];
      const [bottom, top] = [Math.log10(low), Math.log10(high)];
      axis.dtick = top - bottom < 1.2 ? "D1" : top - bottom < 3 ? "D2" : 1;
      return [bottom - 0.05, top + 0.05];
    };
  }

  const COSTS = {
    seconds: { title: "mean training time in seconds", format: (value) => `${number(value)} s` },
    memory: { title: "peak memory", format: bytes },
    parameters: { title: "parameters", format: number },
  };

  function drawCost() {
    const box = element("plot-cost");
    if (!box) return null;
    const name = chosen("cost");
    const { title, format } = COSTS[name];
    const methods = visible().filter(
      (method) => method.final.mean !== null && method.cost[name].mean != null
    );
    const named = methods.length <= 12 && widthOf(box) > 480;
    const plan = layout(box, named ? { r: 24 + 6.6 * LETTERS } : {});
    plan.uirevision = name;
    plan.xaxis.title.text = title;
    plan.xaxis.showgrid = true;
    plan.yaxis.title.text = "final accuracy";
    plan.yaxis.tickformat = ".1%";
    if (methods.length) {
      const costs = methods.map((method) => method.cost[name].mean);
      const ends = methods.flatMap(({ final }) => [final.mean, final.low, final.high]);
      plan.xaxis.range = around(costs);
      const [lowest, highest] = around(ends.filter((value) => value != null));
      // With two seeds an interval may reach beyond what an accuracy can be.
      plan.yaxis.range = [Math.max(lowest, -0.02), Math.min(highest, 1.02)];
      if (name === "memory") {
        const [low, high] = plan.xaxis.range;
        const step = 2 ** Math.ceil(Math.log2((high - low) / 6));
        const first = Math.ceil(low / step);
        const count = Math.floor(high / step) - first + 1;
        plan.xaxis.tickvals = Array.from({ length: count }, (_, at) => (first + at) * step);
        plan.xaxis.ticktext = plan.xaxis.tickvals.map(bytes);
      }
      if (named) plan.annotations = pointNames(box, plan, methods, name);
    } else {
      plan.annotations = [
        note(
          data.methods.some((method) => method.cost[name].mean != null)
            ? "no method shown has a final accuracy" : "not recorded on this machine"
        ),
      ];
    }
    const traces = methods.map((method) => {
      const { mean, low, high } = method.final;
      const colour = method[scheme()];
      return {
        x: [method.cost[name].mean],
        y: [mean],
        error_y: {
          type: "data", symmetric: false, color: faint(colour, 0.6), thickness: 1.5, width: 0,
          array: [high == null ? 0 : high - mean], arrayminus: [low == null ? 0 : mean - low],
        },
        type: "scatter",
        mode: "markers",
        marker: { color: colour, size: 11, symbol: method.marker },
        text: [
          `<b>${plain(method.label)}</b><br>${percent(mean)}` +
          `${high == null ? "" : ` ± ${(100 * (high - mean)).toFixed(data.digits)}`}` +
          `<br>${format(method.cost[name].mean)}`,
        ],
        hoverinfo: "text",
        meta: method.label,
      };
    });
    return paint(box, traces, plan);
  }

  function around(values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const margin = 0.08 * (high - low) || 0.02 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  }

  // Names beside the points, each moved down past those it would cover.
  function pointNames(box, plan, methods, name) {
    const { l, r, t, b } = plan.margin;
    const part = ([low, high], value) => (value - low) / (high - low);
    const width = widthOf(box) - l - r;
    const points = methods.map((method) => ({
      method,
      x: width * part(plan.xaxis.range, method.cost[name].mean),
      y: (heightOf(box) - t - b) * (1 - part(plan.yaxis.range, method.final.mean)),
      width: 12 + 6.6 * Math.min(LETTERS, method.label.length),
    }));
    points.sort((one, other) => one.y - other.y);
    const placed = [];
    return points.map((point) => {
      let at = point.y;
      const covers = (other) =>
        point.x < other.x + other.width &&
        other.x < point.x + point.width &&
        Math.abs(at - other.at) < 14;
      for (let round = 0; round < 60 && placed.some(covers); round += 1) at += 3;
      placed.push({ ...point, at });
      return {
        text: short(point.method.label),
        x: point.method.cost[name].mean, y: point.method.final.mean,
        xanchor: "left", yanchor: "middle", xshift: 9, yshift: point.y - at, showarrow: false,
        font: { color: point.method[scheme()], size: 12 },
      };
    });
  }

  let near = false; // whether the reader has come near the cost plot
  const drawAccuracy = () =>
    drawCurves("plot-accuracy", "accuracy", "accuracy", percent, accuracyRange);
  const drawRest = () => {
    const loss = chosen("loss");
    const heading = element("loss-title");
    if (heading) heading.textContent = loss === "test" ? "Loss on test data" : "Training loss";
    drawCurves("plot-loss", loss, "loss", number, lossRange(loss));
    if (near || printing) drawCost();
  };
  page.draw = () => {
    drawAccuracy();
    drawRest();
  };
  new IntersectionObserver(
    (entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      near = true;
      drawCost();
    },
    { rootMargin: "600px" }
  ).observe(element("cost") ?? document.body);

  if (element("bands")) element("bands").checked = data.bands;
  document.addEventListener("change", (event) => {
    if (event.target.matches(".choices input")) page.draw();
  });
  dark.addEventListener("change", () => page.draw());
  // Names hang on the height and width of their plot.
  let waiting = 0;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width || printing) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(page.draw, 150);
  });
  addEventListener("beforeprint", () => {
    printing = true;
    page.draw();
  });
  addEventListener("afterprint", () => {
    printing = false;
    page.draw();
  });

  // One plot first, the others when it stands.
  Promise.resolve(drawAccuracy()).then(() =>
    requestAnimationFrame(() => {
      performance.mark("plotted");
      drawRest();
      document.documentElement.dataset.ready = "yes";
    })
  );
})();
