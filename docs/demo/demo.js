// The page: what the visitor does, and what is seen of it.

import { Detector, RUNTIME, drawing, loadRuntime } from "./detector.js";

const LONGEST = 4096; // pixels of a side; larger pictures are made smaller before anything else
const DRAWN = 1088; // pixels of the longer side as it is drawn
const LINE = 28; // pixels, of a name
const options = new URLSearchParams(location.search);
const part = (id) => document.getElementById(id);
const canvas = part("picture");
let runtime = null;
let detector = null;
let shown = null; // {image, bitmap}: pixels as they are looked at, picture as it is drawn

function say(text, kind = "") {
  part("status").textContent = text;
  part("status").className = kind;
}

/** Shows what goes wrong instead of leaving it in the console. */
function guarded(work) {
  return async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      say(error.message, "error");
    }
  };
}

const useModel = guarded(async (bytes, name) => {
  if (!runtime) {
    say("loading onnxruntime-web ...");
    runtime = await loadRuntime(options.get("runtime") ?? RUNTIME.folder);
  }
  say(`reading ${name} ...`);
  detector = await Detector.create(runtime, bytes);
  const { bits, title, canvas, names } = detector.facts;
  const kind = bits === 32 ? "float" : `${bits}-bit`;
  part("model").textContent =
    `${title || name}: ${kind}, ${Math.round(bytes.length / 1024)} KiB, images of at most ` +
    `${canvas[0]} x ${canvas[1]} pixels, ${names.length} classes (${names.join(", ")})`;
  say("ready: choose a picture");
  if (shown) await look();
});

const useImage = guarded(async (blob) => {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${blob.name ?? "this file"} is no picture that this browser can read`);
  }
  const factor = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((n) => Math.max(Math.round(n * factor), 1));
  const pixels = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  pixels.drawImage(bitmap, 0, 0, width, height);
  shown = { image: pixels.getImageData(0, 0, width, height), bitmap };
  await look();
});

async function look() {
  if (!detector || !shown) return;
  say("looking ...");
  await new Promise((done) => setTimeout(done)); // so that it is seen
  const threshold = Number(part("threshold").value);
  const found = await detector.detect(shown.image, threshold);
  paint(found.detections);
  const list = found.detections.map(({ name, score, box }) => {
    const item = document.createElement("li");
    item.textContent = `${name} ${score.toFixed(2)}`;
    Object.assign(item.dataset, { name, score, box: box.join(",") });
    return item;
  });
  part("detections").replaceChildren(...list);
  part("time").textContent =
    `${found.milliseconds.toFixed(0)} ms for the network, ${found.prepared.toFixed(0)} ms to ` +
    "resize the picture; one thread";
  say(`${found.detections.length} objects`, "done");
}

function paint(detections) {
  const { image, bitmap } = shown;
  const zoom = DRAWN / Math.max(image.width, image.height); // lines and letters stay sharp
  canvas.width = Math.max(Math.round(image.width * zoom), 1);
  canvas.height = Math.max(Math.round(image.height * zoom), 1);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  context.lineWidth = 4;
  context.font = "24px sans-serif";
  context.textBaseline = "bottom";
  for (const { rectangle, text, colour } of drawing(detections)) {
    const [x, y, width, height] = rectangle.map((n) => n * zoom);
    context.strokeStyle = context.fillStyle = colour;
    context.strokeRect(x, y, width, height);
    const wide = context.measureText(text).width + 8;
    const [left, bottom] = [Math.min(x, canvas.width - wide), Math.max(y, LINE)];
    context.fillRect(left, bottom - LINE, wide, LINE);
    context.fillStyle = "white";
    context.fillText(text, left + 4, bottom - 1);
  }
}

const useFiles = guarded(async (files) => {
  for (const file of files) {
    if (file.name.endsWith(".onnx")) await useModel(new Uint8Array(await file.arrayBuffer()), file.name);
    else await useImage(file);
  }
});

part("files").addEventListener("change", (event) => useFiles([...event.target.files]));
part("threshold").addEventListener("input", (event) => {
  part("least").textContent = Number(event.target.value).toFixed(2);
  guarded(look)();
});
for (const button of document.querySelectorAll("#samples button"))
  button.addEventListener(
    "click",
    guarded(async () => useImage(await (await fetch(button.querySelector("img").src)).blob()))
  );
for (const kind of ["dragover", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") useFiles([...event.dataTransfer.files]);
  });
document.addEventListener("dragleave", () => document.body.classList.remove("over"));

guarded(async () => {
  const name = options.get("model") ?? "model.onnx";
  say(`looking for ${name} ...`);
  const answer = await fetch(name);
  if (!answer.ok) {
    part("missing").hidden = false;
    throw new Error(`there is no ${name} beside this page (${answer.status})`);
  }
  await useModel(new Uint8Array(await answer.arrayBuffer()), name);
})();
