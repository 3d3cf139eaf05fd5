"use strict";
// Three linked views of one scan. Indices are (k, j, i): k towards the head, j to the back, i to the patient's left.

// Of each plane: the axis that it fixes, those that run down and to the right, and whether "down" shows the axis
// upwards. The patient's right is on the left of the picture, front or head on top, as radiologists look at a scan.
const PLANES = {
  axial: { fixed: 0, down: 1, right: 2, upwards: false, name: "Axial", world: 2, ends: ["S", "I"] },
  coronal: { fixed: 1, down: 0, right: 2, upwards: true, name: "Coronal", world: 1, ends: ["P", "A"] },
  sagittal: { fixed: 2, down: 0, right: 1, upwards: true, name: "Sagittal", world: 0, ends: ["L", "R"] },
};
const CROSSHAIR_COLOUR = "rgba(130, 220, 255, 0.6)";
const CROSSHAIR_GAP = 12; // CSS pixels that stay free around the position, so that it can be seen
const FILL_OPACITY = 0.14;
const SCALE_BAR_MM = 50;
const WHEEL_STEP = 50; // a notch of a mouse is 100 or 120, a touchpad sends many small ones

class View {
  constructor(figure, viewer) {
    this.figure = figure;
    this.viewer = viewer;
    this.plane = PLANES[figure.dataset.plane];
    this.canvas = figure.querySelector("canvas");
    this.slider = figure.querySelector("input[type=range]");
    this.output = figure.querySelector("output");
    this.ping = figure.querySelector(".ping");
    const { shape, spacing_mm: spacing } = viewer.data;
    const { fixed, down, right } = this.plane;
    this.rows = shape[down];
    this.columns = shape[right];
    this.sizeMm = [this.rows * spacing[down], this.columns * spacing[right]];
    this.slice = document.createElement("canvas");
    this.slice.width = this.columns;
    this.slice.height = this.rows;
    this.slider.max = shape[fixed] - 1;
    this.wheel = 0;
    this.canvas.parentElement.style.setProperty("--ratio", this.sizeMm[1] / this.sizeMm[0]);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  listen() {
    this.slider.addEventListener("input", () => this.setIndex(Number(this.slider.value)));
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.wheel += event.deltaMode ? event.deltaY * WHEEL_STEP : event.deltaY;
      if (Math.abs(this.wheel) < WHEEL_STEP) return;
      this.setIndex(this.index - Math.sign(this.wheel));
      this.wheel = 0;
    }, { passive: false });
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -1e6, End: 1e6 };
    this.canvas.addEventListener("keydown", (event) => {
      if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      this.setIndex(this.index + steps[event.key]);
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.pointAt(event);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (this.canvas.hasPointerCapture(event.pointerId)) this.pointAt(event);
    });
  }

  get index() {
    return this.viewer.position[this.plane.fixed];
  }

  setIndex(index) {
    const position = [...this.viewer.position];
    position[this.plane.fixed] = index;
    this.viewer.moveTo(position);
  }

  pointAt(event) {
    const box = this.box();
    const bounds = this.canvas.getBoundingClientRect();
    const across = ((event.clientX - bounds.left) * box.density - box.left) / box.columnSize;
    const along = ((event.clientY - bounds.top) * box.density - box.top) / box.rowSize;
    const position = [...this.viewer.position];
    position[this.plane.right] = Math.floor(across);
    position[this.plane.down] = this.toRow(Math.floor(along));
    this.viewer.moveTo(position);
  }

  // From a row of the picture to the index of its axis, and back.
  toRow(row) {
    return this.plane.upwards ? this.rows - 1 - row : row;
  }

  // Where the slice lies on the canvas, in its own pixels: lengths to scale, in the middle.
  box() {
    const density = this.canvas.width / (this.canvas.clientWidth || 1);
    const scale = Math.min(this.canvas.width / this.sizeMm[1], this.canvas.height / this.sizeMm[0]);
    const [height, width] = this.sizeMm.map((mm) => mm * scale);
    const left = (this.canvas.width - width) / 2;
    const top = (this.canvas.height - height) / 2;
    return { density, scale, left, top, width, height, columnSize: width / this.columns, rowSize: height / this.rows };
  }

  // Calls visit(row, column of the picture, index of the voxel) for the whole slice.
  eachPixel(visit) {
    const { strides } = this.viewer;
    const { fixed, down, right } = this.plane;
    for (let row = 0; row < this.rows; row++) {
      let voxel = this.index * strides[fixed] + this.toRow(row) * strides[down];
      for (let column = 0; column < this.columns; column++, voxel += strides[right]) visit(row, column, voxel);
    }
  }

  draw() {
    const { clientWidth, clientHeight } = this.canvas;
    if (!this.viewer.hu || !clientWidth || !clientHeight) return;
    const density = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(clientWidth * density);
    this.canvas.height = Math.round(clientHeight * density);
    const context = this.canvas.getContext("2d");
    const box = this.box();
    this.drawSlice(context, box);
    for (const disease of this.viewer.diseases) if (disease.mask && disease.shown) this.drawContours(context, box, disease);
    this.drawScaleBar(context, box);
    if (this.viewer.crosshair) this.drawCrosshair(context, box);
    this.describe();
  }

  drawSlice(context, box) {
    const { hu, level, width } = this.viewer;
    const picture = new ImageData(this.columns, this.rows);
    const pixels = picture.data;
    const lowest = level - width / 2;
    this.eachPixel((row, column, voxel) => {
      const at = 4 * (row * this.columns + column);
      // The array clamps to 0 … 255 and rounds.
      pixels[at] = pixels[at + 1] = pixels[at + 2] = ((hu[voxel] - lowest) * 255) / width;
      pixels[at + 3] = 255;
    });
    this.slice.getContext("2d").putImageData(picture, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.slice, box.left, box.top, box.width, box.height);
  }

  // Outlines run along the voxels' edges: a smoothed one would lie inside the mask.
  drawContours(context, box, disease) {
    const { rows, columns } = this;
    const inside = new Uint8Array((rows + 2) * (columns + 2));
    const across = columns + 2;
    let any = false;
    this.eachPixel((row, column, voxel) => {
      if (!disease.mask[voxel]) return;
      inside[(row + 1) * across + column + 1] = 1;
      any = true;
    });
    if (!any) return;
    const x = (column) => box.left + column * box.columnSize;
    const y = (row) => box.top + row * box.rowSize;
    const outline = new Path2D();
    const area = new Path2D();
    for (let row = 0; row <= rows; row++) {
      let edge = -1;
      let run = -1;
      for (let column = 0; column <= columns; column++) {
        const at = (row + 1) * across + column + 1;
        const isEdge = column < columns && inside[at] !== inside[at - across];
        if (isEdge && edge < 0) edge = column;
        if (!isEdge && edge >= 0) {
          outline.moveTo(x(edge), y(row));
          outline.lineTo(x(column), y(row));
          edge = -1;
        }
        if (inside[at] && run < 0) run = column;
        if (!inside[at] && run >= 0) {
          area.rect(x(run), y(row), x(column) - x(run), box.rowSize);
          run = -1;
        }
      }
    }
    for (let column = 0; column <= columns; column++) {
      let edge = -1;
      for (let row = 0; row <= rows; row++) {
        const at = (row + 1) * across + column + 1;
        const isEdge = row < rows && inside[at] !== inside[at - 1];
        if (isEdge && edge < 0) edge = row;
        if (!isEdge && edge >= 0) {
          outline.moveTo(x(column), y(edge));
          outline.lineTo(x(column), y(row));
          edge = -1;
        }
      }
    }
    context.save();
    context.lineCap = "square";
    context.fillStyle = context.strokeStyle = disease.colour;
    context.globalAlpha = FILL_OPACITY;
    context.fill(area);
    context.globalAlpha = 1;
    context.lineWidth = 1.5 * box.density;
    context.stroke(outline);
    context.restore();
  }

  drawScaleBar(context, box) {
    const length = SCALE_BAR_MM * box.scale;
    const right = box.left + box.width - 12 * box.density;
    const bottom = box.top + box.height - 12 * box.density;
    context.save();
    context.fillStyle = "white";
    context.shadowColor = "black"; // bone and fat are white, too
    context.shadowBlur = 4 * box.density;
    context.fillRect(right - length, bottom, length, 2 * box.density);
    context.font = `${11 * box.density}px system-ui, sans-serif`;
    context.textAlign = "right";
    context.fillText(`${SCALE_BAR_MM / 10} cm`, right, bottom - 4 * box.density);
    context.restore();
  }

  // The middle of the position's voxel on the canvas.
  centre(box) {
    const { position } = this.viewer;
    return [
      box.left + (position[this.plane.right] + 0.5) * box.columnSize,
      box.top + (this.toRow(position[this.plane.down]) + 0.5) * box.rowSize,
    ];
  }

  drawCrosshair(context, box) {
    const [x, y] = this.centre(box);
    const gap = CROSSHAIR_GAP * box.density;
    const wide = box.density;
    context.fillStyle = CROSSHAIR_COLOUR;
    context.fillRect(box.left, y - wide / 2, Math.max(0, x - gap - box.left), wide);
    context.fillRect(x + gap, y - wide / 2, Math.max(0, box.left + box.width - x - gap), wide);
    context.fillRect(x - wide / 2, box.top, wide, Math.max(0, y - gap - box.top));
    context.fillRect(x - wide / 2, y + gap, wide, Math.max(0, box.top + box.height - y - gap));
  }

  describe() {
    const { fixed, world, name, ends } = this.plane;
    const mm = this.viewer.positionMm()[world];
    const text = `${this.index + 1} / ${this.viewer.data.shape[fixed]} · ${ends[mm < 0 ? 1 : 0]} ${Math.abs(mm).toFixed(0)} mm`;
    this.output.textContent = text;
    this.slider.value = this.index;
    this.slider.setAttribute("aria-valuetext", text);
    this.canvas.setAttribute("aria-label", `${name} slice ${text}`);
  }

  flash() {
    const box = this.box();
    const [x, y] = this.centre(box);
    this.ping.style.left = `${x / box.density}px`;
    this.ping.style.top = `${y / box.density}px`;
    this.ping.classList.remove("flash");
    void this.ping.offsetWidth; // the browser restarts an animation only if it has seen the element without it
    this.ping.classList.add("flash");
  }
}

class Viewer {
  constructor(data, figures, onMove) {
    this.data = data;
    this.hu = null;
    this.diseases = [];
    this.position = [...data.start];
    this.level = -600;
    this.width = 1500;
    this.crosshair = true;
    this.onMove = onMove;
    this.strides = [data.shape[1] * data.shape[2], data.shape[2], 1];
    this.views = [...figures].map((figure) => new View(figure, this));
  }

  show(hu, diseases) {
    this.hu = hu;
    this.diseases = diseases;
    this.moveTo(this.position);
  }

  draw() {
    for (const view of this.views) view.draw();
  }

  moveTo(position, flash = false) {
    if (!this.hu) return;
    this.position = position.map((index, axis) => Math.min(Math.max(index, 0), this.data.shape[axis] - 1));
    this.draw();
    if (flash) for (const view of this.views) view.flash();
    this.onMove(this);
  }

  // (x, y, z) in LPS mm.
  positionMm() {
    const [k, j, i] = this.position;
    return this.data.affine_lps.slice(0, 3).map((row) => row[0] * i + row[1] * j + row[2] * k + row[3]);
  }

  huHere() {
    return this.hu[this.position.reduce((sum, index, axis) => sum + index * this.strides[axis], 0)];
  }
}
