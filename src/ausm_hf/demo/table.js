// A click on an object's number shows it alone.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-id]");
  if (button) trigger("choose", { id: Number(button.dataset.id) });
});
