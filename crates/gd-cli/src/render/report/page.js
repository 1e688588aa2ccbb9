// Shows the values of a chart at the step under the pointer, or at the one that the arrow keys move to.
const CHARTS = JSON.parse(document.querySelector('#charts').textContent);

/** A number with at most five significant digits, and separators. */
const formatted = (x) => x.toLocaleString('en-US', { maximumSignificantDigits: 5 });

/** The point of a series that is nearest to `x`. */
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
}

function connect(svg) {
  const chart = CHARTS[svg.dataset.chart], readout = svg.parentElement.querySelector('.readout');
  const rule = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  const steps = [...new Set(chart.series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
  rule.setAttribute('class', 'rule');
  let at = steps.length - 1;
  const show = () => {
    const [low, high] = chart.x, x = steps[at];
    const px = chart.left + ((x - low) / (high - low)) * (chart.right - chart.left);
    rule.setAttribute('d', `M${px} ${chart.top}V${chart.bottom}`);
    svg.append(rule);
    const parts = chart.series.map((s) => [s.label, nearest(s.points, x)]).map(([label, [step, y]]) => {
      const elsewhere = step === x ? '' : ` at ${formatted(step)}`;
      return `${label} ${formatted(y)}${elsewhere}`.trim();
    });
    readout.textContent = `Step ${formatted(x)}: ${parts.join(', ')} ${chart.unit}`;
  };
  const hide = () => {
    rule.remove();
    readout.textContent = '';
  };
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect(), px = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = chart.x[0] + ((px - chart.left) / (chart.right - chart.left)) * (chart.x[1] - chart.x[0]);
    at = steps.indexOf(nearest(steps.map((step) => [step]), x)[0]);
    show();
  });
  svg.addEventListener('keydown', (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + move));
    show();
  });
  svg.addEventListener('focus', show);
  for (const kind of ['pointerleave', 'blur']) svg.addEventListener(kind, hide);
}

document.querySelectorAll('svg[data-chart]').forEach(connect);
