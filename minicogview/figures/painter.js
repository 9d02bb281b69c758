// The part of painter.py that runs in the browser. The mask is one ImageData of the picture's own size, so that exactly
// the mask on the screen is sent. Strokes are rasterised here, since the canvas's own are antialiased and would leave
// half-painted pixels.

// Alpha, blue, green and red in one number: vermilion of the Okabe-Ito palette, which colour-blind readers can see.
const PAINT = 0xff005ed5;

function make(tag, name, parent, more = {}) {
  const element = Object.assign(document.createElement(tag), { className: name, ...more });
  parent.append(element);
  return element;
}

function render({ model, el }) {
  const [height, width] = model.get("size");
  const zoom = model.get("zoom"); // screen pixels for each pixel of the picture

  const root = make("div", "mcv-painter", el);
  const stage = make("div", "mcv-stage", root);
  stage.style.width = `${width * zoom}px`;
  stage.style.aspectRatio = `${width} / ${height}`;
  const url = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
  const picture = make("img", "mcv-picture", stage, { src: url, alt: "the picture to paint on", draggable: false });
  const canvas = make("canvas", "mcv-mask", stage, { width, height });
  const ring = make("div", "mcv-ring", stage); // shows how large the brush is
  if (zoom > 1) picture.style.imageRendering = canvas.style.imageRendering = "pixelated";

  const tools = make("div", "mcv-tools", root);
  const brushLabel = make("label", "", tools, { textContent: "brush " });
  const most = Math.max(2, Math.round(Math.max(height, width) / 2));
  const brush = make("input", "mcv-brush", brushLabel, { type: "range", min: 1, max: most, value: Math.ceil(most / 4) });
  const number = make("span", "mcv-number", brushLabel);
  const eraseLabel = make("label", "", tools);
  const erase = make("input", "mcv-erase", eraseLabel, { type: "checkbox" });
  eraseLabel.append(" erase");
  const clear = make("button", "mcv-clear jupyter-button", tools, { type: "button", textContent: "clear" });

  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer); // one number for each pixel: PAINT, or 0 where nothing is painted
  let last = null; // the last point of the current stroke; null between strokes

  function fill(isPainted) {
    for (let i = 0; i < words.length; i++) words[i] = isPainted(i) ? PAINT : 0;
    context.putImageData(pixels, 0, 0);
  }

  // One bit for each pixel, row after row, the first pixel in the highest bit, as in numpy's packbits.
  function load() {
    if (last) return; // an older mask that arrives now must not erase the current stroke
    const bits = model.get("bits"); // a DataView, empty if nothing is painted
    const known = bits && bits.byteLength === Math.ceil((width * height) / 8);
    fill((i) => known && bits.getUint8(i >> 3) & (128 >> (i & 7)));
  }

  function send() {
    const bits = new Uint8Array(Math.ceil((width * height) / 8));
    for (let i = 0; i < words.length; i++) if (words[i]) bits[i >> 3] |= 128 >> (i & 7);
    model.set("bits", new DataView(bits.buffer));
    model.save_changes();
  }

  // Paint the pixels whose centres are within the brush's radius of the line from one point to the other, and the pixel
  // under the pointer.
  function stroke([x0, y0], [x1, y1]) {
    const radius = brush.value / 2;
    const [dx, dy] = [x1 - x0, y1 - y0];
    const long = dx * dx + dy * dy || 1; // squared length; 1 if the points are equal, to avoid dividing by 0
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - radius));
    const right = Math.min(width, Math.ceil(Math.max(x0, x1) + radius));
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - radius));
    const bottom = Math.min(height, Math.ceil(Math.max(y0, y1) + radius));
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const [px, py] = [x + 0.5 - x0, y + 0.5 - y0];
        const part = Math.min(1, Math.max(0, (px * dx + py * dy) / long));
        const near = Math.hypot(px - part * dx, py - part * dy) < radius;
        const under = x === Math.floor(x1) && y === Math.floor(y1);
        if (near || under) words[y * width + x] = erase.checked ? 0 : PAINT;
      }
    }
    if (right > left && bottom > top) context.putImageData(pixels, 0, 0, left, top, right - left, bottom - top);
  }

  function place(event) {
    const box = canvas.getBoundingClientRect(); // on a narrow page, the canvas is smaller than zoom says
    const scale = width / box.width;
    const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const side = `${brush.value / scale}px`;
    Object.assign(ring.style, { width: side, height: side, display: "block" });
    Object.assign(ring.style, { left: `${point[0] / scale}px`, top: `${point[1] / scale}px` });
    return point;
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault(); // otherwise the page would select text
    canvas.setPointerCapture(event.pointerId); // so that a stroke may leave the picture and come back
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    const here = place(event);
    if (last) stroke(last, here);
    last = last && here;
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      if (last) send(); // once for each stroke: a message for each move would overload the kernel
      last = null;
    });
  }
  canvas.addEventListener("pointerleave", () => (ring.style.display = "none"));
  clear.addEventListener("click", () => {
    fill(() => false);
    send();
  });
  const tell = () => (number.textContent = `${brush.value} px`);
  brush.addEventListener("input", tell);

  tell();
  load();
  model.on("change:bits", load); // Python cleared the mask, or another view of the widget was painted on
  return () => {
    model.off("change:bits", load);
    URL.revokeObjectURL(url);
  };
}

export default { render };
