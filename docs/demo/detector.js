// From pixels to boxes: the same steps as `aqdetr predict`, with an exported ONNX file.
// No page in here: everything but `loadRuntime` also runs under Node.

export const RUNTIME = {
  version: "1.30.0",
  folder: "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/",
  script: "ort.wasm.bundle.min.mjs",
  binary: "ort-wasm-simd-threaded.wasm",
  // SHA-384 of the files of the package of that version; from whatever folder they come.
  integrity: {
    script: "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    binary: "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
  },
};

/** Loads onnxruntime-web's WASM backend from a folder or URL that ends in "/". */
export async function loadRuntime(folder = RUNTIME.folder) {
  const get = async (part) => {
    const url = new URL(RUNTIME[part], new URL(folder, document.baseURI)).href;
    try {
      const answer = await fetch(url, { integrity: RUNTIME.integrity[part] });
      if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
      return answer;
    } catch (error) {
      throw new Error(
        `onnxruntime-web ${RUNTIME.version} cannot be loaded: ${url}: ${error.message}`
      );
    }
  };
  const [script, binary] = await Promise.all([get("script"), get("binary")]);
  const url = URL.createObjectURL(new Blob([await script.text()], { type: "text/javascript" }));
  const ort = await import(url);
  URL.revokeObjectURL(url);
  ort.env.wasm.wasmBinary = await binary.arrayBuffer();
  ort.env.wasm.numThreads = 1; // more need headers that simple servers do not send
  return ort;
}

/** An exported model, ready to detect. */
export class Detector {
  constructor(ort, session, facts) {
    Object.assign(this, { ort, session, facts });
  }

  /** From the bytes of an ONNX file (Uint8Array). */
  static async create(ort, bytes) {
    const facts = readFacts(bytes);
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    const [batch, ...canvas] = session.inputMetadata.find(({ name }) => name === "images").shape;
    if (batch !== 1) throw new Error(`the model takes ${batch} images at once: export it for one`);
    facts.canvas = canvas.slice(0, 2);
    for (const name of ["scores", "labels", "boxes"])
      if (!session.outputNames.includes(name))
        throw new Error(
          `the model gives ${session.outputNames.join(", ")}, and no ${name}: export it with ` +
            "--detections"
        );
    const detector = new Detector(ort, session, facts);
    const nothing = { data: new Uint8ClampedArray(4), width: 1, height: 1 };
    await detector.detect(nothing, 1); // what is allocated once is not timed
    return detector;
  }

  /**
   * Detects the objects of an image: {data: RGBA bytes, width, height}.
   * Gives {detections: [{name, label, score, box: [x1, y1, x2, y2]}], milliseconds, prepared}, boxes
   * in pixels of the image, best first.
   */
  async detect(image, threshold = 0.5) {
    const start = performance.now();
    const { pixels, size } = prepare(image, this.facts);
    const [height, width] = this.facts.canvas;
    const feeds = {
      images: new this.ort.Tensor("uint8", pixels, [1, height, width, 3]),
      sizes: new this.ort.Tensor("int32", Int32Array.from(size), [1, 2]),
    };
    const prepared = performance.now();
    const found = await this.session.run(feeds);
    const milliseconds = performance.now() - prepared;
    const detections = readOut(
      found.scores.data,
      found.labels.data,
      found.boxes.data,
      { size, original: [image.height, image.width], names: this.facts.names },
      threshold
    );
    return { detections, milliseconds, prepared: prepared - start };
  }
}

// --- the model's own facts ----------------------------------------------------------------------

/** What the exporter wrote into the file: {shortSide, maxSize, names, bits, title}. */
export function readFacts(bytes) {
  let stored;
  try {
    stored = readMetadata(bytes);
  } catch {
    throw new Error("this is no ONNX file, or not all of one");
  }
  const written = JSON.parse(stored.aqdetr ?? "{}");
  if (written.format !== "aqdetr-onnx" || written.version !== 1)
    throw new Error("this ONNX file was not written by aqdetr export --format=onnx of this version");
  return {
    shortSide: written.input.short_side ?? null,
    maxSize: written.input.max_size ?? null,
    names: written.class_names,
    bits: written.bits,
    title: written.info.name ?? "",
  };
}

/** The key-value pairs of an ONNX file: `metadata_props`, field 14 of its `ModelProto`. */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  const pairs = {};
  for (const [field, value] of fields(bytes)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries(fields(value)); // 1: key, 2: value
    pairs[text.decode(entry[1])] = text.decode(entry[2] ?? new Uint8Array());
  }
  return pairs;
}

/** Fields [number, value] of a protocol buffer: bytes of those with a length, else nothing. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      if (at >= bytes.length) throw new Error("cut off");
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const field = Math.floor(key / 8);
    const kind = key % 8;
    if (kind === 0) {
      varint();
      yield [field, undefined];
      continue;
    }
    const length = kind === 2 ? varint() : { 1: 8, 5: 4 }[kind];
    if (length === undefined || at + length > bytes.length) throw new Error("cut off");
    yield [field, bytes.subarray(at, at + length)];
    at += length;
  }
}

// --- images --------------------------------------------------------------------------------------

/** Resized by the model's rule, in the top left corner of its canvas: {pixels, size: [h, w]}. */
export function prepare(image, facts) {
  const size = targetSize(image.height, image.width, facts);
  const rgb = resize(withoutAlpha(image), image.height, image.width, ...size);
  const [height, width] = facts.canvas;
  const pixels = new Uint8Array(height * width * 3);
  for (let y = 0; y < size[0]; y++)
    pixels.set(rgb.subarray(y * size[1] * 3, (y + 1) * size[1] * 3), y * width * 3);
  return { pixels, size };
}

/** RGBA to RGB. */
export function withoutAlpha(image) {
  const count = image.width * image.height;
  const rgb = new Uint8Array(count * 3);
  for (let i = 0; i < count; i++) rgb.set(image.data.subarray(4 * i, 4 * i + 3), 3 * i);
  return rgb;
}

/** [height, width] on the canvas: the evaluation's resize, and smaller if it does not fit. */
export function targetSize(height, width, { shortSide, maxSize, canvas }) {
  let [h, w] = [height, width];
  if (shortSide !== null) {
    const [shorter, longer] = [Math.min(h, w), Math.max(h, w)];
    let side = shortSide;
    if (maxSize !== null && (longer / shorter) * side > maxSize)
      side = roundEven((maxSize * shorter) / longer);
    if (shorter !== side) {
      const other = Math.max(Math.trunc((side * longer) / shorter), 1);
      [h, w] = w < h ? [other, Math.max(side, 1)] : [Math.max(side, 1), other];
    }
  }
  const factor = Math.min(canvas[0] / h, canvas[1] / w);
  if (factor >= 1) return [h, w];
  const fit = (side, limit) => Math.min(Math.max(roundEven(side * factor), 1), limit);
  return [fit(h, canvas[0]), fit(w, canvas[1])];
}

function roundEven(x) {
  const whole = Math.floor(x);
  if (x - whole !== 0.5) return Math.round(x);
  return whole % 2 === 0 ? whole : whole + 1;
}

/**
 * Bilinear with area support, byte for byte as Pillow does it (but for pictures more than twice as
 * tall as wide, where newer versions take columns first and a byte can be another by one): RGB bytes
 * of h x w to H x W, rows first, each pass in whole numbers of 22 bits and rounded to bytes.
 */
export function resize(rgb, h, w, H, W) {
  if (W !== w) rgb = pass(rgb, h, weights(w, W), { line: w * 3, step: 3 }, { line: W * 3, step: 3 });
  if (H !== h) rgb = pass(rgb, W, weights(h, H), { line: 3, step: W * 3 }, { line: 3, step: W * 3 });
  return rgb;
}

const BITS = 22;

/** Of every place of the result: the first place of the source, and whole weights. */
function weights(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const parts = [];
    for (let x = first; x < end; x++)
      parts.push(Math.max(1 - Math.abs((x - centre + 0.5) / support), 0));
    const total = parts.reduce((a, b) => a + b, 0);
    return { first, parts: parts.map((p) => Math.trunc(0.5 + (p / total) * 2 ** BITS)) };
  });
}

function pass(source, lines, table, from, to) {
  const target = new Uint8Array(lines * table.length * 3);
  for (let line = 0; line < lines; line++)
    for (let place = 0; place < table.length; place++) {
      const { first, parts } = table[place];
      for (let c = 0; c < 3; c++) {
        let sum = 1 << (BITS - 1);
        let at = line * from.line + first * from.step + c;
        for (const part of parts) {
          sum += source[at] * part;
          at += from.step;
        }
        target[line * to.line + place * to.step + c] = Math.min(Math.max(sum >> BITS, 0), 255);
      }
    }
  return target;
}

// --- detections ----------------------------------------------------------------------------------

/** Detections of at least a score, best first, boxes clipped to the image as it was given. */
export function readOut(scores, labels, boxes, { size, original, names }, threshold) {
  const scale = [original[1] / size[1], original[0] / size[0]];
  const found = Array.from(scores, (score, i) => ({
    name: names[Number(labels[i])],
    label: Number(labels[i]),
    score,
    box: [0, 1, 2, 3].map((k) => {
      const limit = original[1 - (k % 2)];
      return Math.min(Math.max(boxes[4 * i + k] * scale[k % 2], 0), limit);
    }),
  }));
  return found.filter((one) => one.score >= threshold).sort((a, b) => b.score - a.score);
}

const HUES = [211, 28, 130, 0, 271, 50, 180, 320, 90, 240];

/** What is drawn of detections, in the order of drawing: the best ones on top. */
export function drawing(detections) {
  return [...detections].reverse().map(({ name, label, score, box: [x1, y1, x2, y2] }) => ({
    rectangle: [x1, y1, x2 - x1, y2 - y1],
    text: `${name} ${score.toFixed(2)}`,
    colour: `hsl(${HUES[label % HUES.length]} 75% 45%)`,
  }));
}
