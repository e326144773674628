// Draws the map of a page of features, and shows the selected image with its neighbors.
(async () => {
  const root = document.querySelector('.explorer');
  const part = selector => root.querySelector(selector);
  const { header, arrays } = read(await unpack(document.getElementById('points')).arrayBuffer());
  await plotly;
  const { names, classes, colors, other, symbols, tile, columns } = header;
  const { x, y, labels, clusters, neighbors, similarities, places, sizes } = arrays;
  const count = x.length, near = neighbors.length / count, perSheet = columns ** 2;
  const [map, panel] = [part('.map'), part('.chosen')];

  // Without WebGL, a browser draws every point as an element: only some thousands stay fluid.
  const webgl = Boolean(document.createElement('canvas').getContext('webgl'));
  const stride = webgl ? 1 : Math.ceil(count / 5000);
  const drawn = Array.from({ length: Math.ceil(count / stride) }, (_, i) => i * stride);
  if (stride > 1) {
    const note = element('p', { className: 'quiet' });
    note.textContent = `This browser has no WebGL, so that only ${drawn.length.toLocaleString()} `
      + 'of these points are drawn. "Find" selects any image.';
    root.append(note);
  }

  let groups = [], highlighted = null, chosen = 0;

  function read(buffer) {
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    const kinds = { f4: Float32Array, i4: Int32Array, i2: Int16Array, u4: Uint32Array,
                    u2: Uint16Array, u1: Uint8Array };
    const arrays = {};
    let offset = 8 + Math.ceil(length / 8) * 8;
    for (const [name, [kind, size]] of Object.entries(header.arrays)) {
      arrays[name] = new kinds[kind](buffer, offset, size);
      offset += Math.ceil(arrays[name].byteLength / 8) * 8;
    }
    return { header, arrays };
  }

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const clusterOf = i => `cluster ${clusters[i] + 1}`;
  const labelOf = i => labels[i] < 0 ? 'no label' : classes[labels[i]];
  const shortName = i => names[i].slice(names[i].lastIndexOf('/') + 1);
  const describe = i => classes.length ? labelOf(i) : clusterOf(i);

  // The most frequent groups have a color and a symbol each; the others share one.
  function group() {
    const byLabel = part('.coloring').value === 'labels', members = new Map();
    for (const i of drawn) {
      const value = (byLabel ? labels : clusters)[i];
      members.has(value) ? members.get(value).push(i) : members.set(value, [i]);
    }
    let values = [...members.keys()].sort((a, b) => a - b);
    const distinct = colors.length * symbols.length;
    if (values.length > distinct) {
      values.sort((a, b) => members.get(b).length - members.get(a).length);
      values = values.slice(0, distinct - 1);
    }
    groups = values.map((value, i) => ({
      name: byLabel ? labelOf(members.get(value)[0]) : clusterOf(members.get(value)[0]),
      color: colors[i % colors.length], symbol: symbols[Math.floor(i / colors.length)],
      members: members.get(value),
    }));
    const rest = [...members.keys()].filter(value => !values.includes(value));
    if (rest.length) {
      groups.unshift({ name: `${rest.length} others`, color: other, symbol: symbols[0],
                       members: rest.flatMap(value => members.get(value)) });
    }
  }

  const size = drawn.length > 20000 ? 3.5 : drawn.length > 3000 ? 5 : 8;
  const traces = () => groups.map(({ color, symbol, members }) => ({
    type: webgl ? 'scattergl' : 'scatter', mode: 'markers', hoverinfo: 'none',
    x: Float32Array.from(members, i => x[i]), y: Float32Array.from(members, i => y[i]),
    marker: { color, symbol, size, opacity: 0.75, line: { width: 0 } },
  }));

  function legend() {
    part('.groups').replaceChildren(...groups.map((each, number) => {
      const swatch = element('i', { className: each.symbol });
      swatch.style.background = each.color;
      const members = ` (${each.members.length.toLocaleString()})`;
      const button = element('button', { type: 'button' }, swatch, each.name + members);
      button.setAttribute('aria-pressed', number === highlighted);
      button.onclick = () => highlight(number === highlighted ? null : number);
      return button;
    }));
  }

  function highlight(number) {
    highlighted = number;
    const faded = groups.map((_, i) => number !== null && i !== number);
    Plotly.restyle(map, {
      'marker.color': groups.map((each, i) => faded[i] ? other : each.color),
      'marker.opacity': faded.map(is => is ? 0.12 : 0.75),
    });
    [...part('.groups').children].forEach((button, i) =>
      button.setAttribute('aria-pressed', i === number));
  }

  async function recolor() {
    highlighted = null;
    group();
    legend();
    await Plotly.react(map, traces(), map.layout);
  }

  // Sheets are decoded when one of their images is shown; a few stay decoded.
  const sheets = new Map();
  function sheet(number) {
    if (!sheets.has(number)) {
      const image = new Image();
      const { textContent } = document.getElementsByClassName('sheet')[number];
      image.src = `data:image/webp;base64,${textContent}`;
      sheets.set(number, image.decode().then(() => image));
      if (sheets.size > 32) sheets.delete(sheets.keys().next().value);
    }
    return sheets.get(number);
  }

  function picture(i, alt) {
    if (places[i] < 0) return element('span', { className: 'none' }, 'no thumbnail');
    const canvas = element('canvas', { width: sizes[2 * i], height: sizes[2 * i + 1] });
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', alt);
    const place = places[i] % perSheet;
    sheet(Math.floor(places[i] / perSheet)).then(image => {
      const [left, top] = [place % columns * tile, Math.floor(place / columns) * tile];
      const { width, height } = canvas;
      canvas.getContext('2d').drawImage(image, left, top, width, height, 0, 0, width, height);
      canvas.dataset.drawn = 'true';
    });
    return canvas;
  }

  function rings() {
    const color = getComputedStyle(root).color;
    const ring = (i, radius, width) => ({
      type: 'circle', xsizemode: 'pixel', ysizemode: 'pixel', xanchor: x[i], yanchor: y[i],
      x0: -radius, x1: radius, y0: -radius, y1: radius, line: { color, width },
    });
    const around = [...neighbors.subarray(chosen * near, (chosen + 1) * near)];
    return [...around.map(i => ring(i, 6, 1.5)), ring(chosen, 10, 3)];
  }

  function choose(i) {
    chosen = i;
    const lines = [classes.length && `label ${labelOf(i)}`, clusterOf(i)].filter(Boolean);
    const around = [...neighbors.subarray(i * near, (i + 1) * near)];
    const same = around.filter(j => labels[j] === labels[i]).length;
    const agree = classes.length && labels[i] >= 0 ? `: ${same} of ${near} have its label` : '';
    panel.replaceChildren(
      element('h3', {}, shortName(i)),
      element('div', { className: 'picture' }, picture(i, `selected image, ${describe(i)}`),
        element('div', {}, element('div', {}, lines.join(', ')),
          element('div', { className: 'quiet' }, names[i]))),
      element('div', {}, `Nearest neighbors by cosine similarity${agree}`),
      element('ul', { className: 'near' }, ...around.map((j, rank) => {
        const similarity = (similarities[i * near + rank] / 1e4).toFixed(3);
        const captions = [describe(j), similarity, shortName(j)];
        const button = element('button', { type: 'button' },
          picture(j, `neighbor ${rank + 1}`),
          ...captions.map(text => element('span', {}, text)));
        button.onclick = () => { choose(j); panel.querySelector('.near button').focus(); };
        return element('li', {}, button);
      })),
    );
    const { xaxis, yaxis } = map._fullLayout;
    const update = { shapes: rings() };
    for (const [axis, name, at] of [[xaxis, 'xaxis', x[i]], [yaxis, 'yaxis', y[i]]]) {
      const [low, high] = axis.range;
      if (at < low || at > high) {
        update[`${name}.range`] = [at - (high - low) / 2, at + (high - low) / 2];
      }
    }
    return Plotly.relayout(map, update);
  }

  function zoom(factor) {
    if (!factor) return Plotly.relayout(map, { 'xaxis.autorange': true, 'yaxis.autorange': true });
    const update = {};
    for (const name of ['xaxis', 'yaxis']) {
      const [low, high] = map._fullLayout[name].range;
      const [middle, half] = [(low + high) / 2, (high - low) / 2 * factor];
      update[`${name}.range`] = [middle - half, middle + half];
    }
    return Plotly.relayout(map, update);
  }

  // Selects the nearest image in a direction, within 45 degrees.
  function step(right, up) {
    let best = chosen, least = Infinity;
    for (const i of drawn) {
      const [dx, dy] = [x[i] - x[chosen], y[i] - y[chosen]];
      const along = dx * right + dy * up, across = Math.abs(dx * up - dy * right);
      if (along > 0 && across <= along && along ** 2 + across ** 2 < least) {
        [best, least] = [i, along ** 2 + across ** 2];
      }
    }
    return choose(best);
  }

  function find(text) {
    const wanted = text.toLowerCase();
    const has = i => names[i].toLowerCase().includes(wanted)
      || classes.length && labelOf(i).toLowerCase().includes(wanted);
    for (let ahead = 1; wanted && ahead <= count; ahead++) {
      const i = (chosen + ahead) % count;
      if (!has(i)) continue;
      part('.found').textContent = 'Enter selects the next match.';
      return choose(i);
    }
    part('.found').textContent = wanted && `No name or label contains "${text}".`;
  }

  group();
  legend();
  map.textContent = '';
  const axis = { visible: false };
  await Plotly.newPlot(map, traces(), {
    dragmode: 'pan', hovermode: 'closest', showlegend: false, autosize: true,
    margin: { l: 0, r: 0, t: 0, b: 0 }, xaxis: axis, yaxis: { ...axis, scaleanchor: 'x' },
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
  }, { responsive: true, displayModeBar: false, scrollZoom: true, doubleClick: 'autosize' });
  root.dataset.drawn = drawn.length;

  const preview = element('div', { className: 'preview', hidden: true });
  root.append(preview);
  const indexOf = ({ curveNumber, pointNumber }) => groups[curveNumber].members[pointNumber];
  map.on('plotly_click', ({ points }) => choose(indexOf(points[0])));
  map.on('plotly_unhover', () => preview.hidden = true);
  map.on('plotly_hover', ({ points, event }) => {
    const i = indexOf(points[0]);
    preview.replaceChildren(picture(i, ''), element('span', {}, `${shortName(i)}, ${describe(i)}`));
    preview.hidden = false;
    preview.style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - 280))}px`;
    preview.style.top = `${Math.max(0, Math.min(event.clientY + 14, innerHeight - 100))}px`;
  });
  map.onkeydown = event => {
    const keys = {
      ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, 1),
      ArrowDown: () => step(0, -1), '+': () => zoom(0.5), '=': () => zoom(0.5),
      '-': () => zoom(2), 0: () => zoom(0),
    };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  };
  root.querySelectorAll('[data-zoom]').forEach(button =>
    button.onclick = () => zoom(Number(button.dataset.zoom)));
  part('.coloring').onchange = recolor;
  part('.find').onkeydown = ({ key, target }) => key === 'Enter' && find(target.value);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () =>
    Plotly.relayout(map, { shapes: rings() }));
  if (document.readyState === 'loading') {  // thumbnails stand at the end of the page
    await new Promise(resolve => addEventListener('DOMContentLoaded', resolve));
  }
  await choose(0);
})();
