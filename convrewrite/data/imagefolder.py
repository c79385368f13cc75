"""Images in folders: one folder for each class, or any images at all where no labels are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convrewrite.data import DATA, DataError, Images

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "test")


class Folder:
    """Image files with their labels; (PIL image, label) each."""

    def __init__(self, files: list[tuple[Path, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                image.load()
                return image, label
        except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError) as error:
            raise DataError(f"not a readable image ({type(error).__name__})", where=str(path)) from None


@DATA.register("imagefolder")
def imagefolder(path: str, download: bool) -> Images:  # noqa: FBT001 - the form of all kinds
    """``PATH/CLASS/*.jpg``, or the same below ``PATH/train`` and ``PATH/val``; without classes, no labels."""
    root = Path(path)
    if not root.is_dir():
        what = "this is a file" if root.exists() else "there is no such folder"
        raise DataError(what, where=path or "imagefolder:", fix="write imagefolder:PATH")
    train = next((root / name for name in _TRAIN if (root / name).is_dir()), None)
    if train is None:
        classes, files = _read(root)
        return Images(Folder(files), None, classes, path, labelled=classes is not None)
    classes, files = _read(train)
    val = next((root / name for name in _VAL if (root / name).is_dir()), None)
    if val is None:
        return Images(Folder(files), None, classes, path, labelled=classes is not None)
    others, held = _read(val)
    if others != classes:
        strange = sorted(set(others or ()) ^ set(classes or ()))
        raise DataError(f"class '{strange[0]}' is only in one of {train.name} and {val.name}", where=path)
    return Images(Folder(files), Folder(held), classes, path, labelled=classes is not None)


def _read(root: Path) -> tuple[tuple[str, ...] | None, list[tuple[Path, int]]]:
    """(classes in sorted order, files with labels); (None, all files) where images lie in `root` itself."""
    inside = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not inside:
        raise DataError("there are no images", where=str(root), fix=f"put {', '.join(SUFFIXES[:3])} files there")
    if any(p.parent == root for p in inside):
        return None, [(p, -1) for p in inside]
    classes = tuple(sorted({p.relative_to(root).parts[0] for p in inside}))
    number = {name: n for n, name in enumerate(classes)}
    return classes, [(p, number[p.relative_to(root).parts[0]]) for p in inside]
