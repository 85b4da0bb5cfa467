// The pad of the page: sends what is drawn while it is drawn, a file, or the number of the image that was clicked on.
const canvas = element.querySelector("canvas");
const file = element.querySelector("input[type=file]");
const message = element.querySelector(".notice");
const MAX_BYTES = Number(element.querySelector(".pad").dataset.maxBytes);
const EVERY = 200; // milliseconds between two looks at a drawing

function send(given) {
  message.hidden = true;
  for (const button of element.querySelectorAll("[data-example]")) {
    button.setAttribute("aria-pressed", String(button.dataset.example === given.example));
  }
  props.value = JSON.stringify(given); // of many changes the last is answered, by what is there then
  trigger("input");
}

let clear = () => {};
if (canvas) {
  const context = canvas.getContext("2d");
  let last = null;
  let waiting = null;
  const sendDrawing = () => {
    waiting = null;
    send({ drawing: canvas.toDataURL() });
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const drawTo = (point) => {
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...point);
    context.stroke();
    last = point;
    waiting ??= setTimeout(sendDrawing, EVERY);
  };
  clear = () => {
    clearTimeout(waiting);
    waiting = null;
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    canvas.parentElement.classList.remove("drawn");
  };
  clear();
  Object.assign(context, { lineWidth: canvas.width / 13, lineCap: "round", lineJoin: "round", strokeStyle: "black" });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.parentElement.classList.add("drawn");
    last = place(event);
    drawTo(last);
  });
  canvas.addEventListener("pointermove", (event) => last && drawTo(place(event)));
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => (last = null));
  }
  element.querySelector("[data-clear]").addEventListener("click", clear);
}

function sendFile(given) {
  if (!given) return;
  clear();
  if (given.size > MAX_BYTES) {
    message.textContent = `This file has ${(given.size / 1e6).toFixed(0)} MB: send one of at most ${MAX_BYTES / 1e6} MB.`;
    message.hidden = false;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => send({ file: reader.result });
  reader.readAsDataURL(given);
}

file.addEventListener("change", () => {
  sendFile(file.files[0]);
  file.value = "";
});
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => {
  event.preventDefault();
  sendFile(event.dataTransfer.files[0]);
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-example]");
  if (!button) return;
  clear();
  send({ example: button.dataset.example });
});
