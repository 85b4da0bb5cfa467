// Pictures side by side: sends where the first of them was clicked, as parts of its width and height.
element.addEventListener("click", (event) => {
  const ground = event.target.closest("[data-clicked]");
  if (!ground) return;
  const box = ground.getBoundingClientRect();
  trigger("select", { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
});
