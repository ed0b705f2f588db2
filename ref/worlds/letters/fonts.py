"""Makes the masks of `letters.py`: capitals A to Z of some hundred free typefaces, from Debian's font packages.

    apt-get download texlive-fonts-extra fonts-lato ...       # the packages that faces.csv names; nothing is installed
    for deb in *.deb; do dpkg -x $deb DIR/${deb%%_*}; done
    python -m ref.worlds.letters.fonts DIR                    # masks.npz and faces.csv, into outputs/letters_fonts

**Licences.** A face is taken only when the font file itself says in its name table that it stands under the SIL
Open Font License, the Apache License, the GUST Font License or the LPPL, and names nothing that would qualify this
(`PLAIN`, `DOUBTFUL`). Only pictures of 26 capitals are kept, 32 x 32 with 16 levels; no outline, no font file.

**Choice.** A face stays when a reader trained on other families reads all its letters. Of the closest
pair one face goes, again and again, until `faces` are left, so no two of them look alike.
"""

import csv
import logging
import re
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge
from tyro.conf import Positional

from ref.options import Options, command, read
from ref.settings import in_one_line
from ref.worlds.letters.data import LETTERS, SIDE, pack

PLAIN = {
    "OFL-1.1": r"Open ?Font Licen[sc]e|\bOFL\b",
    "Apache-2.0": r"Apache Licen[sc]e",
    "GFL": r"GUST Font Licen[sc]e",
    "LPPL": r"\bLPPL\b|LaTeX Project Public Licen[sc]e",
}
DOUBTFUL = r"G\.?P\.?L|General Public|non-?commercial|personal|prohibited|must agree|based on the SIL|nosource|Topia|nearly free"


class Face(NamedTuple):
    file: Path
    face: str
    family: str
    package: str
    licence: str


def licence(statement: str) -> str | None:
    """The plainly free licence that a font's own words name, or None."""
    if re.search(DOUBTFUL, statement, re.IGNORECASE):
        return None
    return next((name for name, words in PLAIN.items() if re.search(words, statement)), None)


def free_faces(folder: Path) -> list[Face]:
    """Every font file below `folder`/PACKAGE that has A to Z under a plainly free licence, one for each name."""
    from fontTools.ttLib import TTFont, TTLibError

    logging.getLogger("fontTools").setLevel(logging.ERROR)
    found = {}
    for file in sorted(f for ending in ("*.otf", "*.ttf") for f in folder.rglob(ending) if f.is_file()):
        try:
            with TTFont(file, lazy=True) as font:
                names, known = font["name"], font.getBestCmap() or {}
                statement, family, face = (
                    " ".join(str(names.getDebugName(i) or "") for i in which) for which in ((0, 13, 14), (1,), (4,))
                )
        except (TTLibError, AssertionError, KeyError):  # a broken file
            continue
        kind = licence(statement)
        if kind and face and all(ord(letter) in known for letter in LETTERS):
            family = re.sub(r"\d+$", "", family.split("-")[0]).strip() or family
            found.setdefault(face, Face(file, face, family, file.relative_to(folder).parts[0], kind))
    return list(found.values())


def render(file: Path, cap: float = 20.0, most: float = 29.0, supersample: int = 4) -> np.ndarray | None:
    """A to Z in one size, each centred, [26, SIDE, SIDE] in [0, 1]; None when a letter has no ink.

    H is `cap` pixels high unless a letter of the face would then be wider or higher than `most`.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = SIDE * supersample

    def boxes(size: float) -> tuple:
        font = ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
        return font, [font.getbbox(letter) for letter in LETTERS]

    try:
        _, rough = boxes(200)
        height = rough[LETTERS.index("H")][3] - rough[LETTERS.index("H")][1]
        largest = max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in rough)
        if height < 20 or largest > 2000:
            return None
        font, tight = boxes(200 * supersample * min(cap / height, most / largest))
    except (OSError, ValueError):
        return None
    masks = np.zeros((len(LETTERS), SIDE, SIDE), np.float32)
    for mask, letter, (x0, y0, x1, y1) in zip(masks, LETTERS, tight):
        page = Image.new("L", (side, side))
        corner = ((side - x1 + x0) / 2 - x0, (side - y1 + y0) / 2 - y0)
        ImageDraw.Draw(page).text(corner, letter, fill=255, font=font)
        mask[:] = np.asarray(page.reduce(supersample)) / 255
    return masks if (masks.sum((1, 2)) > 12).all() and np.median(masks.max((1, 2))) > 0.75 else None


def letters_read(masks: np.ndarray, families: list[str]) -> np.ndarray:
    """How many of its 26 letters are read by a reader that knows only other families, for each face."""
    from sklearn.decomposition import PCA
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    half = masks.reshape(*masks.shape[:2], SIDE // 2, 2, SIDE // 2, 2).mean((3, 5)).reshape(-1, SIDE**2 // 4)
    truth = np.tile(np.arange(26), len(masks))
    reader = make_pipeline(PCA(60, random_state=0), SVC(C=10))
    said = cross_val_predict(reader, half, truth, groups=np.repeat(families, 26), cv=GroupKFold(4))
    return (said == truth).reshape(-1, 26).sum(1)


def unlike(masks: np.ndarray, faces: int) -> list[int]:
    """Indices of `faces` faces: of the closest pair, the one with the closer next neighbour goes, until so many are left."""
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(masks, (0, 0, 0.7, 0.7)).reshape(len(masks), -1)
    squares = (blurred**2).sum(1)
    distance = squares[:, None] + squares - 2 * blurred @ blurred.T
    np.fill_diagonal(distance, np.inf)
    left = list(range(len(masks)))
    while len(left) > faces:
        pair = np.unravel_index(distance.argmin(), distance.shape)
        goes = min(pair, key=lambda i: np.partition(distance[i], 1)[1])
        distance[goes], distance[:, goes] = np.inf, np.inf
        left.remove(goes)
    return left


def make(folder: Path | str, output: Path | str, faces: int, least: int) -> tuple[int, int, int]:
    """Write masks.npz and faces.csv. Returns how many faces were free, rendered and legible."""
    folder, output = Path(folder), Path(output)
    free = free_faces(folder)
    drawn = [(face, masks) for face in free if (masks := render(face.file)) is not None]
    if not drawn:
        raise ValueError(
            f"no free font with A to Z below {folder}; unpack packages there: dpkg -x lato.deb {folder}/lato"
        )
    masks = np.stack([m for _, m in drawn])
    families = [face.family for face, _ in drawn]
    legible = np.flatnonzero(letters_read(masks, families) >= least)
    kept = legible[unlike(masks[legible], faces)]
    kept = sorted(kept, key=lambda i: drawn[i][0].face.casefold())
    output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output / "masks.npz", masks=pack(masks[kept]))
    with open(output / "faces.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(Face._fields[1:])
        rows.writerows(drawn[i][0][1:] for i in kept)
    return len(free), len(drawn), len(legible)


@in_one_line
class Masks(Options):
    """Draw the letters' masks from unpacked font packages."""

    fonts: Positional[Path]  # a folder with one folder for each package
    output_dir: Path = Path("outputs/letters_fonts")  # where masks.npz and faces.csv go
    faces: Annotated[int, Ge(2)] = 360  # how many are kept
    least: Annotated[int, Ge(0)] = 26  # of a face's 26 letters that the reader must read


def make_as_asked(arguments: list[str] | None) -> None:
    options = read(Masks, "ref.worlds.letters.fonts", arguments)
    free, drawn, legible = make(options.fonts, options.output_dir, options.faces, options.least)
    print(f"{free} free faces, {drawn} drawn, {legible} legible, {min(legible, options.faces)} kept")


def main(arguments: list[str] | None = None) -> int:
    return command(make_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
