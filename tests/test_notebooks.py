"""The notebooks of `examples/`: what is kept of them, and that each runs from top to bottom."""

import platform
import re
import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
EXECUTE = runpy.run_path(str(EXAMPLES / "notebooks" / "execute.py"))
MOST_BYTES = 300_000
PATH = re.compile(r"(?<![\w.:/<])/(?!/)[\w.-]+/|\b[A-Z]:\\|~/")  # absolute, but no address and no closing tag


def output(kind, **fields):
    return nbformat.v4.new_output(kind, **fields)


def texts(outputs):
    """Every text that outputs show."""
    for shown in outputs:
        yield shown.get("text", "")
        yield from (value for kind, value in shown.get("data", {}).items() if not kind.startswith("image/"))


def check_outputs(outputs):
    """Nothing went wrong, and nothing tells where it was run."""
    assert {shown.output_type for shown in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [shown.text for shown in outputs if shown.get("name") == "stderr"]
    for text in texts(outputs):
        assert "Traceback" not in text and platform.node() not in text
        assert not PATH.search(text), text


def test_the_folder_tells_of_every_notebook():
    assert NOTEBOOKS
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in NOTEBOOKS} == set(re.findall(r"\(notebooks/(\w+)\.ipynb\)", text))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_what_it_shows(path):
    """Small, run once from top to bottom, and with a word before every cell of what it will show."""
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [number + 1 for number in range(len(cells))]
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert bool(cell.outputs) != ("Nothing is shown yet." in before.source), cell.source
            check_outputs(cell.outputs)


def test_kept_outputs_have_no_bars():
    bar = "Steps:   0%|          | 0/5 [00:00<?, ?it/s]\rSteps: 100%|##########| 5/5 [00:01<00:00, 4.5it/s]\n\x1b[A"
    note = output("stream", name="stderr", text=f"{bar}A warning\n")
    picture = output("display_data", data={"image/png": "AA==", "image/jpeg": "AA==", "text/plain": "<Image>"})
    table = output("display_data", data={"text/html": "<table></table>"})
    bars = [
        output("stream", name="stderr", text=bar),
        output("display_data", data={"text/html": "<div><progress value=5></progress></div>"}),
        output("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox()"}),
    ]
    assert EXECUTE["kept"]([bars[0], note, picture, bars[1], table, bars[2]]) == [note, picture, table]
    assert note.text == "A warning" and picture.data.keys() == {"image/png", "text/plain"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    kept = path.read_bytes()
    before, after = nbformat.read(path, as_version=4), EXECUTE["execute"](path)
    assert path.read_bytes() == kept
    for old, new in zip(before.cells, after.cells, strict=True):
        assert old.source == new.source
        if new.cell_type == "code":
            check_outputs(new.outputs)
            # What is kept is of the kind that it shows.
            assert {shown.output_type for shown in old.outputs} == {shown.output_type for shown in new.outputs}
