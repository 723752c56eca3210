"""Nearest-neighbour sheets like the paper's Figure 4: a query, its true neighbours, and its neighbours by SID.

`python -m benchmarks.neighbours --encoder DIR --dataset DIR` writes them as text, and as one picture where `--images`
names a folder with a file for each item. True neighbours are by cosine of an embedding signal. Neighbours by SID are by
cosine of SIDE's vectors (centred digits times their steps), or of decoded latent vectors if digits are not levels.
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidestack.benchmarks import record
from sidestack.benchmarks.items import read_items
from sidestack.benchmarks.quantizers.corpora import distinct_rows
from sidestack.benchmarks.quantizers.measures import nearest, side_vectors, unit
from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.signals import signal_batch
from sidestack.infra.errors import ConfigError, DataError, SidestackError
from sidestack.infra.snapshot import read_dataset

matplotlib.use("agg")

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_BLOCK = 1024
_CODE = {True: "centred digits of the SID times their steps, as SIDE unpacks them", False: "the SID's latent vector"}


@dataclass(frozen=True)
class Catalogue:
    """Items of distinct texts.

    Attributes:
        ids: item_id [N]. texts: [N]. true_ND: the embedding signal at unit length, [N, D].
        code_NK: the SID's vector at unit length, [N, K]. unpacked: whether it is SIDE's vector.
    """

    ids: Ids
    texts: Sequence[str]
    true_ND: Vectors
    code_NK: Vectors
    unpacked: bool


@dataclass(frozen=True)
class Sheet:
    """A query and its neighbours, as rows of the catalogue, nearest first."""

    query: int
    true: Ids
    found: Ids

    @property
    def hits(self) -> int:
        """The number of neighbours by SID that are true neighbours."""
        return len(set(self.true.tolist()) & set(self.found.tolist()))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the sheets; exit with 1 after a user error."""
    arguments = _arguments(argv)
    try:
        bundle = load_bundle(arguments.encoder, torch.device("cpu"))
        catalogue = read_catalogue(arguments.dataset, bundle, arguments.signal)
        sheets = make_sheets(catalogue, arguments.queries, arguments.neighbours, arguments.seed)
        path = _write(sheets, catalogue, arguments.images, arguments.out)
    except SidestackError as error:
        print(f"neighbours: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    hits, asked = sum(sheet.hits for sheet in sheets), len(sheets) * arguments.neighbours
    print(f"{len(sheets)} queries among {len(catalogue.ids):,} items: {hits} of {asked} true neighbours found; {path}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__)
    add = parser.add_argument
    add("--encoder", type=Path, required=True, metavar="DIR", help="an encoder bundle")
    add("--dataset", type=Path, required=True, metavar="DIR", help="a prepared dataset with its signals")
    add("--signal", help="embedding signal of the true neighbours; default: the encoder's first")
    add("--images", type=Path, metavar="DIR", help="pictures named by item_id, such as 17.png")
    add("--queries", type=int, default=8)
    add("--neighbours", type=int, default=5)
    add("--seed", type=int, default=0, help="of the choice of queries")
    add("--out", type=Path, default=record.RESULTS, metavar="DIR")
    return parser.parse_args(argv)


def read_catalogue(path: Path, bundle: EncoderBundle, signal: str | None) -> Catalogue:
    """Read a dataset's items of distinct texts and encode them.

    Raises:
        ConfigError: the encoder takes no such embedding.
        DataError: the dataset lacks the encoder's signals or a text.
    """
    embeddings = bundle.signals.embeddings
    signal = signal or next(iter(embeddings), "")
    if signal not in embeddings:
        raise ConfigError(f"--signal {signal!r}: the encoder's embeddings are {', '.join(embeddings) or 'none'}")
    dataset = read_dataset(path)
    bundle.signals.require(dataset.spec, path)
    table = read_items(dataset, [*bundle.signals.columns, "text"])
    table = table.take(pa.array(distinct_rows(table, signal)))
    if not table.num_rows:
        raise DataError(f"{path}: no item has a text and the signal {signal!r}")
    code_NK, unpacked = codes(table, bundle)
    true_ND = signal_batch(table, bundle.signals).embeddings[signal].numpy()
    texts = table["text"].to_pylist()
    return Catalogue(table["item_id"].to_numpy(), texts, unit(true_ND), unit(code_NK), unpacked)


@torch.no_grad()
def codes(table: pa.Table, bundle: EncoderBundle) -> tuple[Vectors, bool]:
    """Return the vectors of the items' SIDs, [N, K], and whether SIDE can unpack them from the digits alone."""
    spec, model = bundle.spec, bundle.model
    blocks = [signal_batch(table.slice(at, _BLOCK), bundle.signals) for at in range(0, table.num_rows, _BLOCK)]
    digits_NK = torch.cat([model.digits(block) for block in blocks])
    if spec.lines > 1 or spec.levels == 1:
        return model.quantizer.decode(digits_NK).float().numpy(), False
    steps = np.array(spec.steps or [1.0] * spec.digits, np.float32)
    return side_vectors(digits_NK.numpy(), spec.centre) * steps, True


def make_sheets(catalogue: Catalogue, queries: int, neighbours: int, seed: int) -> list[Sheet]:
    """Choose random queries and find their neighbours both ways.

    Raises:
        ConfigError: more neighbours or queries than items.
    """
    items = len(catalogue.ids)
    if not 0 < queries <= items or not 0 < neighbours < items:
        raise ConfigError(
            f"queries {queries}, neighbours {neighbours}: the dataset has {items} items of distinct texts"
        )
    chosen = np.random.default_rng(seed).choice(items, queries, replace=False)
    true = nearest(catalogue.true_ND, chosen, neighbours)
    found = nearest(catalogue.code_NK, chosen, neighbours)
    return [Sheet(int(query), *both) for query, *both in zip(chosen, true, found, strict=True)]


def _write(sheets: Sequence[Sheet], catalogue: Catalogue, images: Path | None, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "neighbours.md"
    if images is not None:
        draw_sheets(sheets, catalogue, _image_files(images), out / "neighbours.png")
    path.write_text(page(sheets, catalogue, "neighbours.png" if images is not None else None), encoding="utf-8")
    return path


def page(sheets: Sequence[Sheet], catalogue: Catalogue, picture: str | None) -> str:
    """Return the sheets as Markdown; a neighbour found both ways is in bold."""
    conditions = record.conditions(("faiss-cpu",))
    hits = sum(sheet.hits for sheet in sheets)
    asked = sum(len(sheet.true) for sheet in sheets)
    parts = [
        "# Nearest neighbours",
        f"Made by `{conditions['command']}` on {conditions['date']}.",
        f"Queries drawn at random among {len(catalogue.ids):,} items of distinct texts. True: by cosine of the raw"
        f" embedding. SIDE: by cosine of {_CODE[catalogue.unpacked]}. Bold: named by both, {hits} of {asked}."
        " The SID stands for all signals of the encoder, the raw embedding for one of them; most of these items were"
        " trained on.",
    ]
    parts += [f"![neighbours]({picture})"] if picture else []
    parts += [_sheet_text(sheet, catalogue) for sheet in sheets]
    return "\n\n".join(parts) + "\n"


def _sheet_text(sheet: Sheet, catalogue: Catalogue) -> str:
    rows = [
        {
            "rank": rank,
            "true": _named(catalogue, true, sheet.found),
            "cos": float(catalogue.true_ND[sheet.query] @ catalogue.true_ND[true]),
            "SIDE": _named(catalogue, found, sheet.true),
            "its true cos": float(catalogue.true_ND[sheet.query] @ catalogue.true_ND[found]),
        }
        for rank, (true, found) in enumerate(zip(sheet.true, sheet.found, strict=True), start=1)
    ]
    columns = {"rank": "d", "true": "", "cos": ".3f", "SIDE": "", "its true cos": ".3f"}
    return f"## {catalogue.texts[sheet.query]}\n\n{record.markdown_table(rows, columns)}".rstrip("\n")


def _named(catalogue: Catalogue, row: int, others: Ids) -> str:
    text = catalogue.texts[row].replace("|", "\\|")
    return f"**{text}**" if row in others else text


def _image_files(folder: Path) -> Mapping[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: is no folder")
    return {file.stem: file for file in folder.iterdir() if file.is_file()}


def draw_sheets(sheets: Sequence[Sheet], catalogue: Catalogue, files: Mapping[str, Path], out: Path) -> None:
    """Draw one row per query: its picture, those of its true neighbours, and those of its neighbours by SID."""
    number = len(sheets[0].true)
    gap = 0.3  # of a picture's width, before the true neighbours and before the SID's
    figure = Figure(figsize=(1.1 * (2 * number + 1 + 2 * gap), 1.15 * len(sheets) + 0.4))
    widths = [1.0, gap, *[1.0] * number, gap, *[1.0] * number]
    whole_grid = figure.subplots(len(sheets), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for axes in whole_grid.flat:
        axes.set_axis_off()
    grid = whole_grid[:, [at for at, width in enumerate(widths) if width == 1.0]]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.3 / figure.get_figheight(), wspace=0.08)
    for axes_row, sheet in zip(grid, sheets, strict=True):
        for axes, row in zip(axes_row, [sheet.query, *sheet.true, *sheet.found], strict=True):
            _draw_item(axes, catalogue, int(row), files)
    for at, title in ((0, "query"), (1, "true"), (1 + number, "SIDE")):
        grid[0, at].set_title(title, loc="left", fontsize=9)
    figure.savefig(out, dpi=120)


def _draw_item(axes: Axes, catalogue: Catalogue, row: int, files: Mapping[str, Path]) -> None:
    """Draw an item's picture, or its text if there is no picture."""
    file = files.get(str(catalogue.ids[row]))
    if file is None:
        text = textwrap.fill(textwrap.shorten(catalogue.texts[row], 80, placeholder=" …"), 18)
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=6)
        return
    try:
        axes.imshow(image.imread(file))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises a SyntaxError on a bad file
        raise DataError(f"{file}: cannot be read as a picture: {error}") from error


if __name__ == "__main__":
    main()
