"""Run the notebooks of this folder from top to bottom, and keep what they show: `make notebooks`.

python examples/notebooks/execute.py                  # all of them
python examples/notebooks/execute.py your_own_folder  # some of them, by name

Each runs in an empty folder of its own and without a network. Progress bars are left out of what is kept.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 600  # that a cell may take
BAR = re.compile(r"\d+%\||\d+it \[")


def kept(outputs):
    """Return outputs of a cell without progress bars, whether they are text, HTML or widgets, and each picture once."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr":
            lines = re.split(r"[\r\n]+|\x1b\[A", output["text"])  # a bar below another moves the cursor up
            output["text"] = "\n".join(line for line in lines if not BAR.search(line)).strip()
            if not output["text"]:
                continue
        if "<progress" in data.get("text/html", "") or "application/vnd.jupyter.widget-view+json" in data:
            continue
        if "image/png" in data:
            data.pop("image/jpeg", None)  # Pillow gives both
        found.append(output)
    return found


def execute(path):
    """Return a notebook with what its cells show; the first error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as settings:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        # The settings of whoever runs this change nothing; where ipywidgets is missing, bars are text.
        client.execute(
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "IPYTHONDIR": settings,
                "PYTHONWARNINGS": "ignore:IProgress not found",
            }
        )
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})  # of any version
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    return notebook


def main():
    """Write the notebooks that the command line names, or all, with their new outputs."""
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb")):
        path = HERE / f"{name}.ipynb"
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
