// The video while it is being made: every frame that has come can be looked at again with the slider.
const picture = element.querySelector("img");
const bar = element.querySelector("progress");
const text = element.querySelector(".text");
const slider = element.querySelector("input");
let run = null;
let pictures = [];
let follow = true; // show the newest frame

function look(index) {
  if (pictures[index]) picture.src = pictures[index];
}

function update() {
  const news = props.value || {};
  if (news.run !== run) {
    run = news.run;
    pictures = [];
    follow = true;
  }
  bar.max = news.total || 1;
  bar.value = news.done || 0;
  text.textContent = news.text || "";
  element.dataset.state = news.state || "none";
  (news.pictures || []).forEach((url, i) => (pictures[news.first + i] = url));
  slider.max = Math.max(pictures.length - 1, 0);
  if (follow) {
    slider.value = slider.max;
    look(pictures.length - 1);
  }
}

slider.addEventListener("input", () => {
  follow = slider.value === slider.max;
  look(Number(slider.value));
});
watch("value", update);
update();
