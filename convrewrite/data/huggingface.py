"""Data sets of Hugging Face `datasets`: by name on the hub, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convrewrite.data import DATA, DataError, Images
from convrewrite.errors import ConvrewriteError

_VAL = ("validation", "valid", "val", "test")


class Rows:
    """(image, label) of every row; label -1 where there is none."""

    def __init__(self, rows: Any, image: str, label: str | None) -> None:
        self.rows, self.image, self.label = rows, image, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return row[self.image], -1 if self.label is None else row[self.label]


@DATA.register("hf")
def huggingface(spec: str, download: bool) -> Images:  # noqa: FBT001 - the form of all kinds
    """``NAME``, ``NAME:CONFIG`` (fetched by `datasets` unless it is in its cache), or a local folder."""
    try:
        import datasets
    except ImportError:
        raise ConvrewriteError("'hf:' needs Hugging Face datasets", fix="pip install 'convrewrite[train]'") from None
    where = f"hf:{spec}"
    try:
        if Path(spec).is_dir() and any((Path(spec) / f).is_file() for f in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(spec)
        else:
            name, _, config = spec.partition(":")
            found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub, the network, a wrong name, a damaged file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot be read: {lines[0][:150]}", where=where) from None
    parts = dict(found) if isinstance(found, dict) else {"train": found}
    train = parts.get("train")
    if train is None:
        raise DataError(f"it has no part 'train' ({', '.join(parts)})", where=where)
    val = next((parts[name] for name in _VAL if name in parts), None)
    image, label = _columns(train, where)
    names = getattr(train.features[label], "names", None) if label else None
    classes = tuple(names) if names else None
    held = None if val is None else Rows(val, image, label)
    return Images(Rows(train, image, label), held, classes, where, labelled=label is not None)


def _columns(rows: Any, where: str) -> tuple[str, str | None]:
    """Names of the columns with images and labels, by their types."""
    import datasets

    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise DataError(f"no column holds images ({', '.join(rows.features)})", where=where)
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    return images[0], next((name for name in ("label", "labels", *labels) if name in rows.features), None)
