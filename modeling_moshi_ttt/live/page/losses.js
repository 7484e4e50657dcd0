// What each TTT layer learns, drawn: its inner loss now and where it had learned nothing, over the last two minutes.
const POINTS = 300, COLORS = ["--moshi", "--you", "--soft", "--alert"];
const short = (x) => (x === null ? "–" : x.toPrecision(3));

export class Losses {
  constructor(canvas, table) { this.canvas = canvas; this.table = table; this.clear(); }

  clear() { this.lines = new Map(); this.table.replaceChildren(); this.draw(); }

  add(layers) {
    for (const { layer, initial, current, drift } of layers) {
      const line = this.lines.get(layer) ?? { points: [], drift: 0 };
      this.lines.set(layer, line);
      line.drift = drift;
      if (current !== null) line.points.push({ initial, current }); // there is none where a mini-batch has just ended
      if (line.points.length > POINTS) line.points.shift();
    }
    this.draw();
    this.tell();
  }

  draw() {
    const { width, height } = this.canvas, pen = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const all = [...this.lines.values()].flatMap((line) => line.points.flatMap((point) => [point.initial, point.current]));
    const top = Math.max(...all, 1e-9) * 1.1;
    pen.clearRect(0, 0, width, height);
    pen.strokeStyle = style.getPropertyValue("--rule");
    pen.lineWidth = 2;
    pen.beginPath(); pen.moveTo(0, height - 1); pen.lineTo(width, height - 1); pen.stroke();
    [...this.lines.values()].forEach((line, i) => {
      pen.strokeStyle = style.getPropertyValue(COLORS[i % COLORS.length]);
      for (const [name, dash, thick] of [["initial", [6, 8], 2], ["current", [], 4]]) {
        pen.setLineDash(dash);
        pen.lineWidth = thick;
        pen.beginPath();
        line.points.forEach((point, at) => pen.lineTo((at / Math.max(line.points.length - 1, 40)) * width, height - 4 - (point[name] / top) * (height - 12)));
        pen.stroke();
      }
    });
    pen.setLineDash([]);
  }

  tell() {
    const rows = [...this.lines].map(([layer, { points, drift }]) => {
      const last = points.at(-1) ?? { initial: null, current: null };
      return [layer, short(last.current), short(last.initial), short(drift)];
    });
    this.table.replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }));
    this.canvas.setAttribute("aria-label", "Inner loss of each memory layer: " + rows.map(([layer, now, first]) => `layer ${layer} ${now}, unlearned ${first}`).join("; "));
  }
}
