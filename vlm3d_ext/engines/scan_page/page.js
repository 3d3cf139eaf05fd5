"use strict";
// Connects what is written on the page with the views.

(() => {
  const byId = (id) => document.getElementById(id);
  const status = byId("status");

  function fail(error) {
    document.body.dataset.state = "failed";
    status.setAttribute("role", "alert");
    status.textContent =
      `The scan's pictures cannot be shown: ${error && error.message ? error.message : error}. The file may be damaged; ` +
      "copy it again, or open it in another browser. Report, findings and lesions on this page are complete.";
  }

  function start() {
    const data = JSON.parse(byId("scan-data").textContent);
    const views = document.querySelector(".views");
    const viewer = new Viewer(data, document.querySelectorAll(".view"), showReadout);
    const level = byId("level");
    const width = byId("width");
    const presets = [...document.querySelectorAll(".presets button")];

    function showReadout() {
      const letters = [["R", "L"], ["A", "P"], ["I", "S"]];
      const parts = viewer.positionMm().map((mm, axis) => `${letters[axis][mm < 0 ? 0 : 1]} ${Math.abs(mm).toFixed(1)}`);
      byId("position").textContent = parts.join("  ");
      byId("density").textContent = `${viewer.huHere()} HU`;
    }

    function setWindow(newLevel, newWidth) {
      viewer.level = newLevel;
      viewer.width = Math.max(newWidth, 1);
      for (const preset of presets) {
        const same = Number(preset.dataset.level) === newLevel && Number(preset.dataset.width) === newWidth;
        preset.setAttribute("aria-pressed", same);
      }
      viewer.draw();
    }

    for (const preset of presets) {
      preset.addEventListener("click", () => {
        level.value = preset.dataset.level;
        width.value = preset.dataset.width;
        setWindow(Number(level.value), Number(width.value));
      });
    }
    for (const input of [level, width]) {
      input.addEventListener("input", () => {
        if (level.value !== "" && Number(width.value) > 0) setWindow(Number(level.value), Number(width.value));
      });
    }
    byId("crosshair").addEventListener("change", (event) => {
      viewer.crosshair = event.target.checked;
      viewer.draw();
    });

    for (const button of document.querySelectorAll(".enlarge")) {
      button.addEventListener("click", () => {
        const figure = button.closest(".view");
        const enlarged = figure.classList.toggle("enlarged");
        views.classList.toggle("single", enlarged);
        button.setAttribute("aria-pressed", enlarged);
      });
    }

    for (const link of document.querySelectorAll("[data-slices]")) {
      link.addEventListener("click", (event) => {
        event.preventDefault();
        viewer.moveTo(link.dataset.slices.split(",").map(Number), true);
        const bounds = document.querySelector(".view.enlarged .picture, .view .picture").getBoundingClientRect();
        // On a phone the views are above what is being read.
        if (bounds.bottom < 120 || bounds.top > window.innerHeight - 120) {
          const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
          document.querySelector(".toolbar").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
        }
      });
    }

    function addSwitch(disease) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      const swatch = document.createElement("span");
      const name = document.createElement("span");
      const count = document.createElement("small");
      input.type = "checkbox";
      input.dataset.disease = disease.key;
      input.checked = disease.shown;
      input.disabled = !disease.shown;
      label.classList.toggle("absent", !disease.shown);
      swatch.className = "swatch";
      swatch.style.setProperty("--colour", disease.colour);
      name.textContent = disease.name;
      count.textContent = disease.shown ? `${disease.num_lesions} lesion${disease.num_lesions === 1 ? "" : "s"}` : "none";
      label.append(input, swatch, name, count);
      byId("overlays").append(label);
      input.addEventListener("change", () => {
        disease.shown = input.checked;
        viewer.draw();
      });
    }

    const numVoxels = data.shape.reduce((product, n) => product * n, 1);
    const diseases = data.diseases.map((disease) => {
      const mask = disease.runs === null ? null : decodeMask(disease.runs, numVoxels);
      return { ...disease, mask, shown: mask !== null };
    });
    diseases.forEach(addSwitch);

    return decodeVolume(data, (sheet, numSheets) => {
      status.textContent = `Decoding the scan, part ${sheet + 1} of ${numSheets} …`;
    }).then((hu) => {
      document.body.dataset.state = "ready";
      viewer.show(hu, diseases);
    });
  }

  try {
    start().catch(fail);
  } catch (error) {
    fail(error);
  }
})();
