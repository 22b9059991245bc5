"""The Colab notebook, run from top to bottom with a reduced setting."""

import re
import signal
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "tpu" / "colab_demo.ipynb"
# The quickstart's three runs, each of a few steps.
REDUCED = {
    "quickstart_student.yaml": "train: {num_steps: 10, prompts_per_iteration: 16, diagnostics_every: 0}",
    "quickstart_teacher.yaml": "train: {num_steps: 10, prompts_per_iteration: 16, diagnostics_every: 0}",
    "quickstart.yaml": "train: {num_steps: 4, prompts_per_iteration: 8, diagnostics_every: 2}",
}


def reduced(folder):
    for file in ("quickstart_base.yaml", *REDUCED):
        text = (ROOT / "configs" / file).read_text()
        if file in REDUCED:
            text, times = re.subn(r"^train: .*$", REDUCED[file], text, flags=re.M)
            assert times == 1
        (folder / file).write_text(text.replace("num_prompts: 256", "num_prompts: 16"))
    return folder / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _ctrl_c_means_what_it_meant():
    """Where it was ignored, as in the background of a shell, nbclient leaves Python's own meaning behind."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    settings.source += f"\nCONFIG = {str(reduced(tmp_path))!r}\nSETTINGS = ['log.rollouts_every=2']"
    for cell in notebook.cells:
        cell.source = cell.source.replace('Path("runs/colab_demo")', f"Path({str(tmp_path / 'run')!r})")
    # As Colab and Jupyter open it: in the folder that it lies in.
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "tpu")}}
    )
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "step 4/4" in said
    assert "\x1b[2K" not in said, "a bar that writes over itself, in a notebook that keeps it all"
    assert "held-out questions (16)" in said
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2, "the curves, and the report"
    (viewer,) = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert viewer.startswith('<iframe sandbox="allow-scripts"')
    assert viewer.count("id=&quot;block-") == 2
    assert "skipped: REAL_MODEL is False" in said
    asked = said[said.index("prompt=8+7+6+5") :]
    assert "8+7+6+5" in asked


def test_an_error_in_a_program_stops_the_notebook(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    settings.source += "\nSETTINGS = ['train.nm_steps=2']"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "tpu")}}
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ended with 2; its last lines say why"):
        client.execute()


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert all(len(line) <= 110 for c in code for line in c.source.splitlines())
