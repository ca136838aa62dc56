"""The work directory of a run: its configuration, its origin, and a lock.

``config.json`` is the resolved configuration (loadable by ``load_config_file``), ``manifest.json``
says where the results come from: configuration, versions, commit, seed, data, devices, each start's
command, and what came out (``aqdetr rerun`` does it again).
Running the same command again resumes; a changed configuration is refused with its differences.
The same data and models at another place are the same run.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import secrets
import sys
import time
import types
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

import jax

from aqdetr_jax import trees
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.parallel.hosts import exchange, is_main, together
from aqdetr_jax.paths import is_local
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training.config_tools import (
    changed_keys,
    config_diff,
    flatten_config,
    to_plain,
)
from aqdetr_jax.training.lease import Lease
from aqdetr_jax.training.places import FileLock, WorkdirError, lock_file, place_of

# Keys that change neither what was computed so far nor its meaning.
CHANGEABLE = ("train.steps", "eval.*", "log.*")

DATA_PATHS = (
    "data.root",
    "data.train_images",
    "data.train_annotations",
    "data.eval_images",
    "data.eval_annotations",
)
"""Keys that say where the data lie: they may change while the data are the same."""


@dataclasses.dataclass
class Workdir:
    """A prepared and locked work directory; ``with`` or :meth:`release` unlocks it.

    Attributes:
      path: the folder.
      resumed: it held this run already.
      changes: keys that changed, as ``"key: old -> new"``; all of them were allowed to.
    """

    path: Path
    resumed: bool
    changes: list[str]
    _lock: FileLock | Lease | None = None

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Unlocks the folder; the end of the process, however it comes, does so too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check(self) -> None:
        """Whether the folder still is this run's, which in an object store may change.

        Raises:
          InUseError: another process took it, while this one could not be reached.
        """
        if self._lock is not None:
            self._lock.check()


def prepare_workdir(
    path: str | Path,
    config_dict: Any,
    *,
    seed: int | None = None,
    dataset: Any = None,
    models: Mapping[str, str | None] = types.MappingProxyType({}),
    teacher: str | None = None,
    changeable: Sequence[str] = CHANGEABLE,
) -> Workdir:
    """Makes or re-opens a work directory, locks it, and writes its configuration and manifest.

    In a multi-process run process 0 does this and the others only make the folder.

    Args:
      path: folder, made if missing.
      config_dict: resolved configuration: ``ConfigDict``, mapping or dataclass.
      seed: recorded; the configuration's ``seed`` when None.
      dataset: fingerprint of the data (JSON-serialisable), recorded. On resume another
        fingerprint than the first start's is refused; DATA_PATHS may differ if it is the same.
      models: of each key that points to a model, the checksum of that model (None = there is none
        now), recorded. The key may differ on resume if the checksum does not.
      teacher: the one of them whose model is read again on resume: another checksum than the first
        start's is refused.
      changeable: patterns (``fnmatch``) of dotted keys that may differ on resume; with "*" the
        data may, too.

    Returns:
      The locked folder.

    Raises:
      WorkdirError: another process uses the folder; it holds another configuration or data set
        (the differences are listed).
    """
    config = to_plain(config_dict)
    path = place_of(path)
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"the work directory {path} is a file; choose another --workdir")
    path.mkdir(parents=True, exist_ok=True)
    if not is_main():
        return Workdir(path, (path / "config.json").is_file(), [])
    now = {"dataset": to_plain(dataset), "models": dict(models)}
    return _prepared(path, config, seed, now, teacher, changeable)


def _prepared(
    path: Path,
    config: dict[str, Any],
    seed: int | None,
    now: Mapping[str, Any],
    teacher: str | None,
    changeable: Sequence[str],
) -> Workdir:
    lock = lock_file(path / ".lock") if is_local(path) else Lease(path)
    try:
        existing = (path / "config.json").is_file()
        manifest = _read_manifest(path) if existing else {}
        changes = _changes(path, config, manifest, now, teacher, changeable) if existing else []
        if "*" in changeable:  # nothing depends on it yet
            manifest = manifest and {**manifest, **now}
        # The manifest first: config.json is what makes the folder a run.
        if not manifest:
            number = seed if seed is not None else config.get("seed")
            manifest = {"seed": number, **now, "starts": []}
        manifest["starts"].append(_describe_start(changes))
        manifest["config"] = config
        write_json_atomic(path / "manifest.json", manifest)
        if changes or not existing:
            write_json_atomic(path / "config.json", config)
    except BaseException:
        lock.close()
        raise
    return Workdir(path, existing, changes, lock)


SHARED_SECONDS = 60.0
"""How long a host may take to see what another wrote."""


def check_shared(workdir: Workdir) -> None:
    """Whether all processes see the work directory that process 0 has prepared; else all stop.

    Raises:
      WorkdirError, ElsewhereError: one does not; process 0 names it.
    """
    if jax.process_count() == 1:
        return
    content = _read_manifest(workdir.path) if is_main() else {}
    wanted = exchange(content["starts"][-1]["id"] if content else "")[0]
    with together():
        end = time.monotonic() + SHARED_SECONDS
        while not _sees(workdir.path, wanted):
            if time.monotonic() > end:
                raise WorkdirError(
                    f"the work directory {workdir.path} is not the one that process 0 "
                    "wrote to: give a folder that all hosts share, or gs://BUCKET/NAME"
                )
            time.sleep(0.5)


def _sees(path: Path, start: str) -> bool:
    try:
        return _read_manifest(path)["starts"][-1]["id"] == start
    except (OSError, KeyError, IndexError, WorkdirError):
        return False


def note_result(path: Path, variables: Any, block: Mapping[str, Any] | None) -> None:
    """Adds to a run's manifest what came out of it.

    Args:
      path: work directory.
      variables: of the model that is kept.
      block: results of the last evaluation, None after a pretraining.
    """
    manifest = _read_manifest(path)
    digest = trees.digest(variables)
    kept = {k: v for k, v in (block or {}).items() if k.startswith(("AP", "AR"))}
    manifest["result"] = {"model": digest, "results": kept}
    write_json_atomic(path / "manifest.json", manifest)


def check_workdir(
    path: Path,
    config_dict: Any,
    *,
    dataset: Any,
    models: Mapping[str, str | None],
    teacher: str | None,
    changeable: Sequence[str],
) -> None:
    """Whether :func:`prepare_workdir` would refuse a folder for what it holds; nothing is written.

    Raises:
      WorkdirError: it holds another configuration, data set or teacher.
    """
    if (path / "config.json").is_file():
        now = {"dataset": to_plain(dataset), "models": dict(models)}
        config, manifest = to_plain(config_dict), _read_manifest(path)
        _changes(path, config, manifest, now, teacher, changeable)


def _changes(
    path: Path,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    now: Mapping[str, Any],
    teacher: str | None,
    changeable: Sequence[str],
) -> list[str]:
    """What differs from the last start; an error if it may not."""
    changes = _check_configuration(path, config, manifest, changeable, _moved(manifest, now))
    if "*" not in changeable:
        _check_content(path, manifest, now, teacher, changes)
    return changes


def platform_name() -> str:
    """Operating system and processor of this machine."""
    return f"{platform.system()} {platform.machine()}"


def _describe_start(changes: list[str]) -> dict[str, Any]:
    # The program's own folder is this machine's business; what the user typed is kept.
    program = PurePath(sys.argv[0]).name
    command = ["aqdetr" if program == "__main__.py" else program, *sys.argv[1:]]
    return {
        "id": secrets.token_hex(8),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(),
        "versions": package_versions(),
        "host": platform.node(),
        "platform": platform_name(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "changes": changes,
    }


def _moved(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The keys of paths that lead to what they led to at the first start, if that is known."""
    keys = {
        key
        for key, checksum in now["models"].items()
        if checksum is not None and checksum == manifest.get("models", {}).get(key)
    }
    known = manifest.get("dataset")
    return keys | set(DATA_PATHS if known is not None and now["dataset"] is not None else ())


def _check_configuration(
    path: Path,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    changeable: Sequence[str],
    moved: set[str],
) -> list[str]:
    """The changes since the last start; an error if one is not allowed."""
    try:
        old = read_json(path / "config.json")
    except ValueError as error:
        raise WorkdirError(f"cannot resume: {error}. Restore the file from a copy.") from error
    changes = config_diff(old, config)
    refused = {
        key: change
        for key, change in zip(changed_keys(old, config), changes, strict=True)
        if key not in moved and not any(fnmatchcase(key, pattern) for pattern in changeable)
    }
    if refused:
        listing = "\n  ".join(refused.values())
        if refused.keys() & (flatten_config(old).keys() ^ flatten_config(config).keys()):
            raise WorkdirError(
                f"{path} holds a run of another version of this program, with other keys:\n  "
                f"{listing}\nIt goes on with that version only{_made_with(manifest)}; choose "
                "another --workdir for a new run"
            )
        raise WorkdirError(
            f"{path} holds a run with another configuration:\n  {listing}\n"
            "Use the old values to resume it, or choose another --workdir for the new ones. "
            f"Only these may change on resume: {', '.join(changeable)}, and the paths of data and "
            "models that are the same at another place"
        )
    return changes


def _made_with(manifest: Mapping[str, Any]) -> str:
    """The versions of the last start, as far as it is known."""
    start = (manifest.get("starts") or [{}])[-1]
    found = start.get("versions", {}).get("aqdetr-jax", "unknown"), start.get("commit", "unknown")
    return f" (aqdetr-jax {found[0]}, commit {found[1]})"


def _check_content(
    path: Path,
    manifest: Mapping[str, Any],
    now: Mapping[str, Any],
    teacher: str | None,
    changes: Sequence[str],
) -> None:
    """Errors for other data, or another teacher, than those of the first start."""
    known, fingerprint = manifest.get("dataset"), now["dataset"]
    if known is not None and fingerprint is not None and known != fingerprint:
        moves = [change for change in changes if change.startswith(DATA_PATHS)]
        place = f" at another place ({'; '.join(moves)})" if moves else ""
        raise WorkdirError(
            f"{path} was trained on other data{place}: recorded {known}, now {fingerprint}. "
            "Restore the data, or choose another --workdir."
        )
    before = manifest.get("models", {}).get(teacher)
    found = now["models"].get(teacher)
    if before is not None and found is not None and before != found:
        raise WorkdirError(
            f"{path} was trained with another teacher than the model that config.{teacher} leads "
            "to now. Restore that model, or choose another --workdir."
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return {}
    try:
        content = read_json(manifest)
    except ValueError as error:
        raise WorkdirError(f"cannot resume: {error}. Restore the file or delete it.") from error
    if not isinstance(content, dict) or not isinstance(content.get("starts"), list):
        raise WorkdirError(f"{manifest} is not a run's manifest. Restore the file or delete it.")
    return content
