"""Where a checkpoint's files are: a local folder, the packaged demo model, or the Hugging Face Hub.

For a file name, a source tells whether the file exists, where it is on disk (it is downloaded if
need be), and what its safetensors header says (without the tensors). Failures become one-line
`ModelError`s here, so no other module needs the hub's exception types. Code from a model repository
is never run.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Protocol

from planetserve.errors import ModelError
from planetserve.model.shards import TensorEntry, check_header, read_header
from planetserve.model.weight_files import what_it_holds

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
DEMO = "demo"
"""The name of the model that comes with the package, even if there is a folder of that name."""


class FileSource(Protocol):
    """Files of one checkpoint at one revision."""

    name: str
    """Folder name or hub id: for people."""
    revision: str | None
    """Commit hash where the files come from the hub."""
    is_folder: bool
    """Whether the files are in a local folder, where each can be read without a download."""

    @property
    def folder(self) -> Path:
        """A folder with at least `config.json`."""
        ...

    @property
    def location(self) -> tuple[str, str | None]:
        """`(name_or_path, revision)` as other `from_pretrained` calls take them."""
        ...

    def has(self, filename: str) -> bool:
        """Whether the checkpoint has this file."""
        ...

    def fetch(self, filename: str) -> Path:
        """The file on disk, downloaded if need be.

        Raises:
            ModelError: it is not there or cannot be fetched.
        """
        ...

    def listing(self) -> list[str]:
        """Names of the files beside `config.json`, for error messages."""
        ...

    def header(self, filename: str) -> dict[str, TensorEntry]:
        """The safetensors header of a file, without its tensors.

        Offsets count from the start of the file only if it is on disk already.

        Raises:
            ModelError: it is not there, cannot be fetched, or is damaged.
        """
        ...


class LocalSource:
    """A folder in the layout of `save_pretrained`."""

    is_folder = True

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        self.name = name or folder.resolve().name
        # A folder snapshots/<commit> of a hub cache is treated like its hub id.
        resolved = folder.resolve()
        is_snapshot = resolved.parent.name == "snapshots" and _is_commit(resolved.name)
        self.revision = resolved.name if is_snapshot else None
        self.location: tuple[str, str | None] = (str(folder), None)

    def has(self, filename: str) -> bool:
        return (self.folder / filename).is_file()

    def fetch(self, filename: str) -> Path:
        path = self.folder / filename
        # The file itself may be a link, as in the hub's cache; its path may not lead out of the
        # folder.
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise ModelError(f"{path} is not within the model's folder, so it is not read")
        if not path.is_file():
            raise ModelError(f"{path} is missing; copy or download the whole model folder again")
        return path

    def listing(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except OSError as error:
            raise ModelError(f"cannot read {self.folder}: {error.strerror}") from error

    def header(self, filename: str) -> dict[str, TensorEntry]:
        return read_header(self.fetch(filename))


class HubSource:
    """A model repository on the Hugging Face Hub, pinned to the commit resolved on opening."""

    is_folder = False

    def __init__(
        self,
        model: str,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | None,
        local_files_only: bool = False,
    ):
        self.name = model
        self._local_files_only = local_files_only
        self._token = token
        self._cache_dir = cache_dir
        self.revision = revision
        config_path = self.fetch(CONFIG_FILE)
        self.folder = config_path.parent
        self.revision = self.folder.name
        self.location: tuple[str, str | None] = (model, self.revision)

    def has(self, filename: str) -> bool:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if (self.folder / filename).exists():
            return True
        try:
            self._download(filename, dry_run=True)
        except LocalEntryNotFoundError as error:
            # Offline. If the weights are in the cache, a file that is not beside them does not
            # exist.
            if not any(self.folder.rglob("*.safetensors")):
                raise self._error(filename, error) from error
            return False
        except EntryNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise self._error(filename, error) from error
        return True

    def fetch(self, filename: str) -> Path:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(self._download(filename))
        except (OSError, ValueError, EntryNotFoundError) as error:
            raise self._error(filename, error) from error

    def listing(self) -> list[str]:
        from huggingface_hub import HfApi

        try:
            return HfApi().list_repo_files(self.name, revision=self.revision, token=self._token)
        except (OSError, ValueError):
            return os.listdir(self.folder)

    def header(self, filename: str) -> dict[str, TensorEntry]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

        if (self.folder / filename).exists():
            return read_header(self.folder / filename)
        try:
            remote = HfApi().parse_safetensors_file_metadata(
                self.name, filename, revision=self.revision, token=self._token
            )
        except (OSError, ValueError, EntryNotFoundError, SafetensorsParsingError) as error:
            raise self._error(filename, error) from error
        except (RecursionError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"the header of {filename} of {self.name} is damaged") from error
        described = {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for name, info in remote.tensors.items()
        }
        return check_header(self.folder / filename, described)

    def _download(self, filename: str, *, dry_run: bool = False) -> Any:
        """The path of the file; with `dry_run`, only whether there is one."""
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {"dry_run": True} if dry_run else {}
        return hf_hub_download(
            self.name,
            filename,
            revision=self.revision,
            token=self._token,
            cache_dir=self._cache_dir,
            local_files_only=self._local_files_only,
            **options,
        )

    def _what_instead(self) -> str:
        """What kind of repository this is, if it has no configuration, as the end of a sentence."""
        from huggingface_hub import HfApi

        try:
            names = HfApi().list_repo_files(self.name, revision=self.revision, token=self._token)
        except (OSError, ValueError):
            return ""
        return what_it_holds(names)

    def _error(self, filename: str, error: Exception) -> ModelError:
        from huggingface_hub import errors

        where = f"{self.name}@{self.revision}" if self.revision else self.name
        if isinstance(error, errors.HFValidationError):
            return ModelError(f"{self.name!r} is neither an existing folder nor a hub model id")
        if isinstance(error, errors.GatedRepoError):
            return ModelError(
                f"{self.name} is gated: accept its licence on the hub, then give --token or log in "
                "with `hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelError(f"{self.name} has no revision {self.revision!r} on the hub")
        if isinstance(error, errors.RepositoryNotFoundError):
            return ModelError(
                f"{self.name!r} is neither an existing folder nor a model on the hub "
                "(a private one needs --token)"
            )
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return ModelError(
                f"{filename} of {where} is not in the local cache and the hub cannot be reached; "
                f"check the network, or give a local model folder (there is none at {self.name})"
            )
        if isinstance(error, errors.EntryNotFoundError):
            instead = self._what_instead() if filename == CONFIG_FILE else ""
            return ModelError(f"{where} has no {filename} on the hub{instead}")
        reason = str(error).strip().splitlines()
        return ModelError(
            f"cannot read {filename} of {where}: {reason[0] if reason else type(error).__name__}"
        )


def open_source(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> FileSource:
    """Find the files of `model`: the word `demo`, a folder, or a hub id. A path is a folder's.

    Raises:
        ModelError: nothing of that name can be read.
    """
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if not isinstance(name, str) or not name.strip():
        raise ModelError(f"a model is a folder, a repository name or demo, not {model!r}")
    path = Path(name)
    try:
        path = path.expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, a home folder of nobody
        raise ModelError(f"{name[:80]!r} is neither a folder nor a model on the hub") from error
    if model == DEMO:
        if is_folder:
            logger.warning(
                "%s is the model that comes with planetserve; for the folder of that name here, "
                "write ./%s", DEMO, DEMO,
            )  # fmt: skip
        return LocalSource(Path(__file__).resolve().parent.parent / "demo_model", name=DEMO)
    if is_folder:
        return LocalSource(path)
    if exists and path.suffix == ".gguf":
        raise ModelError(
            f"{name} is in the format of llama.cpp, which is not read; give the safetensors "
            "checkpoint that it was made from"
        )
    if exists:
        raise ModelError(f"{name} is a file; give the folder that holds config.json")
    if path.is_absolute() or not isinstance(model, str) or name.startswith((".", "~")):
        raise ModelError(f"the model folder {name} does not exist")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    return HubSource(name, revision, token, cache, local_files_only)


def _is_commit(name: str) -> bool:
    return len(name) == 40 and all(char in "0123456789abcdef" for char in name)
