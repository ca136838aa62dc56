"""Folders of an object store as folders of this machine, for readers that open no other files.

ArrayRecord's reader is one: it jumps about in its shards. They are fetched once a host, whole and
checked by their sizes, to ``~/.cache/aqdetr_jax/data`` (``AQDETR_DATA_CACHE`` names another
folder, such as a local SSD), and what is there already is not fetched again: a killed fetch goes
on. A set that was prepared anew is another set.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.host import cache_folder
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.paths import as_path, each, fetch_file, files_of, is_local, snapshot

VARIABLE = "AQDETR_DATA_CACHE"


def local_copy(folder: Path, levels: int = 0) -> Path:
    """A folder on this machine with the content of one that may be in a store.

    Args:
      folder: of a disk, which is returned as it is, or of a store.
      levels: last parts of its path that the copy has, too.

    Raises:
      DatasetError: a file has another size than the store says, twice: it changes meanwhile.
      OSError: the store or the disk refuses.
    """
    if is_local(folder):
        return folder
    with snapshot(folder):
        files = [file for file in files_of(folder) if not file.name.startswith(".")]
        states = [file.stat() for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    sizes = {name: state.st_size for name, state in zip(names, states, strict=True)}
    listed = zip(names, states, strict=True)
    known = [str(folder), sorted((n, s.st_size, s.st_mtime_ns) for n, s in listed)]
    base = as_path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else cache_folder("data")
    target = base / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    target = target.joinpath(*folder.parts[len(folder.parts) - levels :])

    def there(name: str) -> bool:
        copy = target / name
        return copy.is_file() and copy.stat().st_size == sizes[name]

    missing = [name for name in names if not there(name)]
    if missing:
        size = sum(sizes[name] for name in missing)
        say(f"{folder}: fetching {len(missing)} files, {size / 1e9:.1f} GB, to {target}")

        def fetch(file: Path) -> None:
            fetch_file(file, target / file.relative_to(folder).as_posix())

        for _ in each(fetch, [folder / name for name in missing]):
            pass
    wrong = [name for name in names if not there(name)]
    if wrong:
        raise DatasetError(
            f"{folder / wrong[0]}: has another size than before: the set is being written; wait "
            "for that, then run the same command again"
        )
    return target
