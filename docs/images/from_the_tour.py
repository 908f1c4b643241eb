"""Takes two pictures of the page "Look at the routing" out of the notebook, where they were drawn.

    python docs/images/from_the_tour.py

`python tests/project/test_tour.py` draws them anew, in the notebook.
"""

import base64
import json
from pathlib import Path

IMAGES = Path(__file__).parent
TOUR = IMAGES.parents[1] / "examples/tour.ipynb"
FILES = {"heat-map": "heat-map.png", "dendrogram": "dendrogram.png"}  # by the tag of the cell


def pictures():
    """Each file's name, and the bytes that the notebook has for it."""
    for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]:
        for tag in FILES.keys() & set(cell["metadata"].get("tags", [])):
            (drawn,) = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output["data"]]
            yield FILES[tag], base64.b64decode("".join(drawn))


if __name__ == "__main__":
    for name, content in pictures():
        (IMAGES / name).write_bytes(content)
