/**
 * Images to the model's pixel values and back, as VFMTokImageProcessor does it with PIL: halve with a box filter while the
 * shorter side is at least twice the target, resize it to the target with bicubic interpolation, crop the center.
 * An image here is `{ data, width, height }` with 8-bit RGBA data, such as ImageData.
 */

const BOX = { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) };
const BICUBIC = {
  support: 2,
  weight: (x) => {
    const distance = Math.abs(x);
    if (distance < 1) return (1.5 * distance - 2.5) * distance * distance + 1;
    if (distance < 2) return (((distance - 5) * distance + 8) * distance - 4) * -0.5;
    return 0;
  },
};
// PIL filters 8-bit images in integers: weights have 22 bits after the point.
const WEIGHT_BITS = 22;

/** For each output pixel the first input pixel that counts, and the integer weights from there on. */
function filterWeights(inputSize, outputSize, filter) {
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  const reach = filter.support * stretch;
  return Array.from({ length: outputSize }, (_, output) => {
    const center = (output + 0.5) * scale;
    const start = Math.max(Math.trunc(center - reach + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach + 0.5), inputSize);
    const weights = Array.from({ length: end - start }, (_, x) => filter.weight((x + start - center + 0.5) * (1 / stretch)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { start, weights: weights.map((weight) => roundHalfAway((weight / total) * 2 ** WEIGHT_BITS)) };
  });
}

const roundHalfAway = (x) => Math.trunc(x < 0 ? x - 0.5 : x + 0.5);

/** Python's `round`, which takes halves to the even neighbor. */
const roundHalfEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** Resize along one axis. `from` and `to` say how far apart its lines are, and the pixels of a line. */
function resizeAxis(input, output, lines, from, to, filters) {
  filters.forEach(({ start, weights }, position) => {
    for (let line = 0; line < lines; line++) {
      const source = line * from.line + start * from.pixel;
      const target = line * to.line + position * to.pixel;
      for (let channel = 0; channel < 4; channel++) {
        let sum = 2 ** (WEIGHT_BITS - 1);
        for (let tap = 0; tap < weights.length; tap++) sum += input[source + tap * from.pixel + channel] * weights[tap];
        output[target + channel] = sum >> WEIGHT_BITS; // Uint8ClampedArray clamps
      }
    }
  });
}

function resize({ data, width, height }, newWidth, newHeight, filter) {
  if (newWidth !== width) {
    const narrow = new Uint8ClampedArray(4 * newWidth * height);
    const from = { line: 4 * width, pixel: 4 };
    resizeAxis(data, narrow, height, from, { line: 4 * newWidth, pixel: 4 }, filterWeights(width, newWidth, filter));
    data = narrow;
  }
  if (newHeight !== height) {
    const low = new Uint8ClampedArray(4 * newWidth * newHeight);
    const stride = { line: 4, pixel: 4 * newWidth };
    resizeAxis(data, low, newWidth, stride, stride, filterWeights(height, newHeight, filter));
    data = low;
  }
  return { data, width: newWidth, height: newHeight };
}

/** The central `side` x `side` pixels of an image whose shorter side has been brought to `side`. */
export function centerSquare(image, side) {
  while (Math.min(image.width, image.height) >= 2 * side) {
    image = resize(image, Math.floor(image.width / 2), Math.floor(image.height / 2), BOX);
  }
  const scale = side / Math.min(image.width, image.height);
  image = resize(image, roundHalfEven(image.width * scale), roundHalfEven(image.height * scale), BICUBIC);
  const left = Math.floor((image.width - side) / 2);
  const top = Math.floor((image.height - side) / 2);
  const square = new Uint8ClampedArray(4 * side * side);
  for (let y = 0; y < side; y++) {
    const start = 4 * ((top + y) * image.width + left);
    square.set(image.data.subarray(start, start + 4 * side), 4 * side * y);
  }
  return { data: square, width: side, height: side };
}

/** `(3, side, side)` values in [-1, 1] of RGBA data. */
export function toPixelValues(data) {
  const area = data.length / 4;
  const values = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    for (let pixel = 0; pixel < area; pixel++) {
      const level = Math.fround(data[4 * pixel + channel] * (1 / 255));
      values[channel * area + pixel] = Math.fround(level - 0.5) / 0.5;
    }
  }
  return values;
}

/** RGBA data of `(3, side, side)` values: `x * 127.5 + 128`, the fraction cut off. */
export function toRgba(values) {
  const area = values.length / 3;
  const data = new Uint8ClampedArray(4 * area).fill(255);
  for (let channel = 0; channel < 3; channel++) {
    for (let pixel = 0; pixel < area; pixel++) {
      data[4 * pixel + channel] = Math.floor(Math.fround(values[channel * area + pixel] * 127.5 + 128));
    }
  }
  return data;
}

/** Peak signal-to-noise ratio in dB of two images' RGB data. */
export function psnr(first, second) {
  let sum = 0;
  for (let index = 0; index < first.length; index++) sum += (first[index] - second[index]) ** 2; // alpha is equal
  return 10 * Math.log10((255 ** 2 * 0.75 * first.length) / sum);
}
