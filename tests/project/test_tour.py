"""The notebook `examples/tour.ipynb` runs from top to bottom, with its pictures, and was committed as it came out.

python tests/project/test_tour.py        writes the outputs anew after a change
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "examples/tour.ipynb"
PICTURES = {"heat-map", "dendrogram", "dendrogram-with-the-new-task"}  # tags of the cells that draw


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook after a fresh run, by the Python of this process. A cell that fails raises."""
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(folder))
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: nbformat.NotebookNode) -> dict[str, list[bytes]]:
    """The PNG files that each tagged cell shows."""
    return {
        tag: [base64.b64decode(out.data["image/png"]) for out in cell.outputs if "image/png" in out.get("data", {})]
        for cell in code_cells(notebook)
        for tag in cell.metadata.get("tags", [])
    }


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(out.text for cell in code_cells(notebook) for out in cell.outputs if out.get("name") == "stdout")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return executed(tmp_path_factory.mktemp("tour"))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(TOUR, as_version=4)


@pytest.mark.parametrize("which", ["fresh", "committed"])
def test_heat_map_and_trees_are_drawn(which, request):
    from matplotlib import image

    found = pictures(request.getfixturevalue(which))
    assert found.keys() == PICTURES
    for tag, files in found.items():
        assert len(files) == 1, tag
        pixels = image.imread(io.BytesIO(files[0]), format="png")
        assert min(pixels.shape[:2]) > 200
        assert (pixels[..., :3].min(axis=-1) < 0.7).mean() > 0.01, f"{tag} is blank"


def test_the_student_learns_what_the_teacher_does(fresh):
    start, end, before, after = (int(share) for share in re.findall(r"(\d+)%$", printed(fresh), re.MULTILINE))
    assert start == 100
    assert end < 20
    assert after < before / 2


def test_the_new_task_is_found_to_be_like_its_family(fresh):
    alike = re.search(r"like restaurants: (.*)", printed(fresh))[1]
    assert set(re.findall(r"[a-z]+", alike)) == {"films", "books", "hotels"}


def test_what_was_committed_is_a_whole_run_and_tells_nothing_of_the_machine(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert not re.search(r"(?<![\w.:])/\w+/\w+", printed(committed))


def test_the_committed_notebook_is_valid_and_small(committed):
    nbformat.validate(committed)
    assert TOUR.stat().st_size < 300_000


if __name__ == "__main__":
    tour = executed(TOUR.parent)
    for code in code_cells(tour):  # what goes to stderr are warnings of the libraries on one machine
        code.outputs = [output for output in code.outputs if output.get("name") != "stderr"]
    tour.metadata["language_info"] = {"name": "python"}
    nbformat.write(tour, TOUR)
    sys.stdout.write(printed(tour))
