"use strict";
// The scan out of the page: HU of every voxel from JPEG sheets of two bands, masks from the lengths of their runs.

// A browser that hands out other pixels than it draws, against fingerprinting, is off by far more; decoders by less.
const LARGEST_MEAN_DIFFERENCE = 3;

// Returns the grey levels of a sheet, one byte for each pixel.
async function sheetLevels(base64, width, height, mean) {
  const image = new Image();
  image.src = "data:image/jpeg;base64," + base64;
  await image.decode();
  if (image.naturalWidth !== width || image.naturalHeight !== height) {
    throw new Error(`a sheet has ${image.naturalWidth} × ${image.naturalHeight} pixels instead of ${width} × ${height}`);
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  const levels = new Uint8Array(width * height);
  let sum = 0;
  for (let n = 0; n < levels.length; n++) {
    levels[n] = pixels[4 * n];
    sum += levels[n];
  }
  if (Math.abs(sum / levels.length - mean) > LARGEST_MEAN_DIFFERENCE) {
    throw new Error("this browser does not hand out a picture's pixels as they are");
  }
  return levels;
}

// Returns the HU as an Int16Array in the order (k, j, i).
async function decodeVolume(data, onProgress) {
  const [depth, height, width] = data.shape;
  const rows = data.rows_per_slice;
  const hu = new Int16Array(depth * height * width);
  const [lowOf, highOf] = data.hu_of_level;
  const numSheets = data.sheets[0].length;
  for (let sheet = 0; sheet < numSheets; sheet++) {
    onProgress(sheet, numSheets);
    const first = sheet * data.slices_per_sheet;
    const slices = Math.min(data.slices_per_sheet, depth - first);
    const [low, high] = await Promise.all(
      [0, 1].map((band) => sheetLevels(data.sheets[band][sheet], width, slices * rows, data.means[band][sheet])));
    for (let slice = 0; slice < slices; slice++) {
      let from = slice * rows * width;
      let to = (first + slice) * height * width;
      for (let n = 0; n < height * width; n++, from++, to++) {
        hu[to] = Math.round(lowOf[low[from]] + highOf[high[from]] - data.band_limit_hu);
      }
    }
  }
  return hu;
}

// Returns a mask as a Uint8Array of 0 and 1 in the order (k, j, i).
function decodeMask(runs, numVoxels) {
  const bytes = Uint8Array.from(atob(runs), (character) => character.charCodeAt(0));
  const mask = new Uint8Array(numVoxels);
  let at = 0;
  let inside = 0;
  for (let n = 0; n < bytes.length; inside ^= 1) {
    let length = 0;
    let unit = 1;
    let byte;
    do {
      byte = bytes[n++];
      length += (byte & 127) * unit;
      unit *= 128;
    } while (byte > 127);
    if (inside) mask.fill(1, at, at + length);
    at += length;
  }
  if (at !== numVoxels) throw new Error(`a mask has ${at} voxels instead of ${numVoxels}`);
  return mask;
}
