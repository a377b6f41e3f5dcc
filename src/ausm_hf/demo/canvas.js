// The picture to mark: clicks, boxes and brush strokes go to the server, which sends back the picture with the masks.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const brush = element.querySelector("input[type=range]");
const tools = [...element.querySelectorAll("[data-kind]")];
const picture = new Image();
let tool = tools[0].dataset;
let drag = null; // the points of a box or a stroke while the pointer is down

function choose(button) {
  tool = button.dataset;
  for (const other of tools) other.setAttribute("aria-pressed", other === button);
  element.dataset.tool = tool.kind;
  // With a click tool a finger still scrolls the page.
  canvas.style.touchAction = tool.kind === "point" ? "manipulation" : "none";
}

function radius() {
  return (brush.value / 1000) * Math.max(canvas.width, canvas.height);
}

function draw() {
  const view = props.value || {};
  if (!view.image || !picture.complete) return;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  element.dataset.marks = view.number;
  element.dataset.frame = view.frame;
  const scale = canvas.width / (canvas.getBoundingClientRect().width || canvas.width); // picture pixels per screen pixel
  context.lineWidth = 2 * scale;
  for (const mark of view.marks) {
    const [x, y] = mark.points[0];
    context.strokeStyle = mark.color;
    if (mark.kind === "box") {
      const [right, bottom] = mark.points[1];
      context.setLineDash([6 * scale, 4 * scale]);
      context.strokeRect(x, y, right - x, bottom - y);
      context.setLineDash([]);
    } else {
      context.beginPath();
      context.arc(x, y, 8 * scale, 0, 7);
      context.fillStyle = mark.add ? "#15803d" : "#b91c1c";
      context.fill();
      context.strokeStyle = "white";
      context.stroke();
      context.beginPath();
      context.moveTo(x - 4 * scale, y);
      context.lineTo(x + 4 * scale, y);
      if (mark.add) {
        context.moveTo(x, y - 4 * scale);
        context.lineTo(x, y + 4 * scale);
      }
      context.stroke();
    }
  }
  if (!drag) return;
  const [first, last] = [drag[0], drag[drag.length - 1]];
  context.strokeStyle = view.color;
  if (tool.kind === "box") {
    context.strokeRect(first[0], first[1], last[0] - first[0], last[1] - first[1]);
  } else {
    context.globalAlpha = 0.7;
    context.strokeStyle = tool.add === "1" ? view.color : "black";
    context.lineWidth = 2 * radius();
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...first);
    for (const point of drag) context.lineTo(...point);
    context.lineTo(last[0] + 0.01, last[1]);
    context.stroke();
    context.globalAlpha = 1;
    context.lineCap = "butt";
  }
}

function show() {
  const view = props.value || {};
  element.dataset.ready = view.image ? "yes" : "no";
  element.querySelector(".note").textContent = view.note || "";
  if (!view.image) return;
  canvas.width = view.width;
  canvas.height = view.height;
  canvas.style.aspectRatio = view.aspect; // pixels may be no squares
  canvas.style.width = `min(100%, calc(60vh * ${view.aspect}))`; // small videos are shown larger
  if (picture.src === view.image) draw();
  else picture.src = view.image;
}

function place(event) {
  const frame = canvas.getBoundingClientRect();
  const inside = (value, most) => Math.min(Math.max(value, 0), most - 0.01);
  return [
    inside(((event.clientX - frame.left) / frame.width) * canvas.width, canvas.width),
    inside(((event.clientY - frame.top) / frame.height) * canvas.height, canvas.height),
  ];
}

function send(points) {
  const mark = { frame: props.value.frame, kind: tool.kind, points, add: tool.add === "1", radius: radius() };
  trigger("mark", mark);
}

canvas.addEventListener("click", (event) => {
  if (tool.kind === "point" && props.value?.image) send([place(event)]);
});
canvas.addEventListener("pointerdown", (event) => {
  if (tool.kind === "point" || !props.value?.image) return;
  canvas.setPointerCapture(event.pointerId);
  drag = [place(event)];
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const point = place(event);
  if (tool.kind === "box") drag[1] = point;
  else if (drag.length < 1900) drag.push(point);
  draw();
});
canvas.addEventListener("pointerup", () => {
  if (!drag) return;
  const points = drag;
  drag = null;
  if (tool.kind === "paint" || points.length === 2) send(points);
  draw();
});
canvas.addEventListener("pointercancel", () => {
  drag = null;
  draw();
});
element.querySelector("button.away").addEventListener("click", () => {
  if (props.value?.image) trigger("mark", { frame: props.value.frame, kind: "away", points: [], add: false });
});
for (const button of tools) button.addEventListener("click", () => choose(button));
new ResizeObserver(draw).observe(canvas);
picture.addEventListener("load", draw);
watch("value", show);
choose(tools[0]);
show();
