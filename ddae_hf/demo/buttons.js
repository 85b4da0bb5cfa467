// Buttons in a table or a row: sends the data of the one that was clicked on.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { ...button.dataset });
});
