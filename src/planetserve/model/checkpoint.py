"""A checkpoint as both ends see it: configuration, identity, and tensors read one at a time.

Opening is cheap: it reads `config.json` and nothing else. Names, sizes and the fingerprint come
from the index file and the safetensors headers; a shard is downloaded only when one of its tensors
is read. The swarm knows a model by `model_prefix` (equal for equal configurations; servers and
clients find each other under it), and its weights by `fingerprint`, which names them at once, and
by `manifest`, which takes reading them all and is equal for equal weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from planetserve.errors import ConfigError, ModelError
from planetserve.model.configuration import read_config, read_generation_config
from planetserve.model.file_sources import CONFIG_FILE, FileSource, open_source
from planetserve.model.json_files import read_json_object
from planetserve.model.manifest import Manifest, TensorDigests
from planetserve.model.shards import TensorEntry, read_header, read_samples, read_tensor
from planetserve.model.text_config import text_config
from planetserve.model.weight_files import locate, weight_files, why_no_config
from planetserve.types import DTYPE_NAMES

GENERATION_FILE = "generation_config.json"
SAMPLE_BYTES = 64
MODELOPT_FILE = "hf_quant_config.json"
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}

_VOLATILE_KEYS = frozenset(
    {"transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "use_cache"}
)
"""Configuration keys that tools rewrite without changing the model."""


class Checkpoint:
    """One model's files at one revision. Not thread-safe; made by `Checkpoint.open`."""

    def __init__(self, source: FileSource):
        self._source = source
        if not source.has(CONFIG_FILE):
            raise ModelError(f"{source.folder} has no config.json{why_no_config(source)}")
        self._raw_config = read_json_object(source.fetch(CONFIG_FILE))
        self.config = read_config(source.name, self._raw_config)
        self.config.name_or_path = source.location[0]
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._local_headers: dict[str, dict[str, TensorEntry]] = {}
        self._digests = TensorDigests(digests_folder())

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Open a local folder, a hub model id, or the packaged model `demo`.

        Raises:
            ModelError: the model cannot be found or its configuration cannot be read.
        """
        return cls(
            open_source(
                model,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    @property
    def name(self) -> str:
        """Folder name or hub id."""
        return self._source.name

    @property
    def path(self) -> Path:
        """A folder with the checkpoint's configuration (the snapshot folder for a hub model)."""
        return self._source.folder

    @property
    def pretrained_location(self) -> tuple[str, str | None]:
        """`(name_or_path, revision)` to give to other `from_pretrained` calls (tokenizer)."""
        return self._source.location

    def generation_config(self) -> GenerationConfig | None:
        """The checkpoint's own generation settings, or None if it has none.

        Raises:
            ModelError: the file is there but cannot be read.
        """
        if not self._source.has(GENERATION_FILE):
            return None
        return read_generation_config(
            self.name, read_json_object(self._source.fetch(GENERATION_FILE))
        )

    def quantization(self) -> Mapping[str, Any] | None:
        """What the configuration says about how weights are stored; None if they are plain.

        ModelOpt writes it into a file of its own as well, or there alone.

        Raises:
            ModelError: that file cannot be read.
        """
        found = _quantization(self._raw_config)
        if found is None and self._source.has(MODELOPT_FILE):
            settings = read_json_object(self._source.fetch(MODELOPT_FILE)).get("quantization")
            if not isinstance(settings, dict):
                raise ModelError(f"{self.name}: {MODELOPT_FILE} describes no quantization")
            if settings.get("quant_algo") is not None:
                found = {"quant_method": "modelopt", **settings}
        return found

    @property
    def num_blocks(self) -> int:
        """Decoder layers of the whole model."""
        return int(text_config(self.config).num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that travel between blocks."""
        return int(text_config(self.config).hidden_size)

    @functools.cached_property
    def model_prefix(self) -> str:
        """Directory prefix: equal for equal configurations, whatever tool saved them."""
        digest = hashlib.sha256(canonical_config(self._raw_config)).hexdigest()
        return f"{self.config.model_type}-{digest[:12]}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights: the hub commit, or a digest of headers and sampled bytes.

        The digest covers every tensor's name, dtype, shape and three 64-byte samples, but not how
        tensors are split into files, so it costs seconds even for 100 GB.

        Raises:
            ModelError: a local file is missing or damaged.
        """
        if self._source.revision is not None:
            return f"hub-{self._source.revision}"
        digest = hashlib.sha256(canonical_config(self._raw_config))
        per_tensor: dict[str, bytes] = {}
        for filename in sorted(set(self.tensor_names().values())):
            entries = list(self._header(filename, local=True).values())
            samples = read_samples(self._source.fetch(filename), entries, SAMPLE_BYTES)
            for position, entry in enumerate(entries):
                label = f"{entry.name}|{entry.dtype_name}|{entry.shape}|".encode()
                per_tensor[entry.name] = label + b"".join(samples[3 * position : 3 * position + 3])
        for name in sorted(per_tensor):
            digest.update(hashlib.sha256(per_tensor[name]).digest())
        return f"sha256-{digest.hexdigest()[:40]}"

    def tensor_names(self) -> Mapping[str, str]:
        """Tensor name -> file that holds it.

        Raises:
            ModelError: there are no safetensors files, or the index cannot be used.
        """
        return self._index

    @functools.cached_property
    def _files(self) -> tuple[list[str], Mapping[str, str]]:
        return weight_files(self._source, self._raw_config.get("transformers_weights"))

    @functools.cached_property
    def _index(self) -> dict[str, str]:
        files, index = self._files
        source = self._source
        # A snapshot in the hub's cache may lack files; with the index no file has to be opened.
        is_whole = source.is_folder and (source.revision is None or all(map(source.has, files)))
        if index and not is_whole:
            return dict(index)
        return locate(files, self._header)

    def tensor_bytes(self, names: Iterable[str]) -> int:
        """Bytes the named tensors take in the checkpoint's own dtype.

        Raises:
            ModelError: a name is unknown or a header cannot be read.
        """
        return sum(self._entry(name).num_bytes for name in names)

    def tensor_dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in.

        Raises:
            ModelError: the name is unknown, or the dtype is one that is not read here.
        """
        return self._entry(name).dtype

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape a tensor is stored in.

        Raises:
            ModelError: the name is unknown.
        """
        return self._entry(name).shape

    def fetch_shards(self, names: Iterable[str]) -> None:
        """Download the files that hold the named tensors, if need be, with a progress bar for each.

        Raises:
            ModelError: a name is unknown, or a file cannot be fetched or is damaged.
        """
        for name in names:
            self._entry(name, local=True)

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh CPU memory, downloading its shard if need be.

        Raises:
            ModelError: the name is unknown, or the file cannot be read or is damaged.
        """
        entry = self._entry(name, local=True)
        path = self._source.fetch(self._index[name])
        hasher = self._digests.hasher(path, entry)
        if hasher is None:
            return read_tensor(path, entry)
        tensor = read_tensor(path, entry, hasher.update)
        self._digests.put(path, name, hasher.finish())
        return tensor

    def manifest(self, stop: threading.Event) -> Manifest | None:
        """What all weights are; reads those that have not been hashed yet.

        None if some files are not on disk, or once `stop` is set.

        Raises:
            ModelError: a file cannot be read or is damaged.
        """
        folder = self._source.folder
        names = list(self.tensor_names())
        if not all((folder / filename).is_file() for filename in self._files[0]):
            return None
        entries = [(name, self._entry(name, local=True)) for name in names]
        # Where `fetch` would lead to, which may ask the hub each time.
        placed = [(folder / self._index[name], entry) for name, entry in entries]
        if not self._digests.read(self.name, placed, stop):
            return None
        return Manifest.of(
            canonical_config(self._raw_config),
            {entry.name: self._digests.known(path, entry.name) for path, entry in placed},
        )

    def read_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each name, one tensor in memory at a time, file by file."""
        known = [name for name in names if self._entry(name)]
        for name in sorted(known, key=lambda name: (self._index[name], name)):
            yield name, self.read_tensor(name)

    def _entry(self, name: str, *, local: bool = False) -> TensorEntry:
        filename = self._index.get(name)
        if filename is None:
            raise ModelError(f"{self.name} has no tensor {name}")
        entry = self._header(filename, local=local).get(name)
        if entry is None:
            # Like transformers, which uses an index as a list of files.
            found = locate(self._files[0], self._header).get(name)
            if found is None:
                raise ModelError(
                    f"{self.name}: the index says {name} is in {filename}, but it is not there"
                )
            self._index[name] = found
            entry = self._header(found, local=local)[name]
        return entry

    def _header(self, filename: str, *, local: bool = False) -> dict[str, TensorEntry]:
        """The header of a file; `local` insists on the file itself, so that offsets hold."""
        if filename not in self._local_headers and local:
            self._local_headers[filename] = read_header(self._source.fetch(filename))
        if filename in self._local_headers:
            return self._local_headers[filename]
        if filename not in self._headers:
            self._headers[filename] = self._source.header(filename)
        return self._headers[filename]


def digests_folder() -> Path:
    """Where digests of weights are kept: beside the hub's cache of models."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "planetserve" / "weights"


def _quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of a configuration, or of the language model's within it."""
    for key in _QUANTIZATION_KEYS:
        if raw.get(key) is not None:
            if not isinstance(raw[key], dict):
                raise ModelError(f"config.json gives no settings as {key}")
            settings: Mapping[str, Any] = raw[key]
            return settings
    parts = (part for key, part in raw.items() if isinstance(part, dict) and "vision" not in key)
    return next(filter(None, map(_quantization, parts)), None)


def canonical_config(raw: Mapping[str, Any]) -> bytes:
    """The configuration as bytes that do not depend on the tool that saved it or on the dtype."""
    return json.dumps(_without_volatile(raw), sort_keys=True, separators=(",", ":")).encode()


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_volatile(v) for k, v in value.items() if k not in _VOLATILE_KEYS}
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    return value


def parse_dtype(text: str, checkpoint: Checkpoint, device: torch.device | str) -> torch.dtype:
    """The dtype that `text` names; `auto` is the checkpoint's own.

    Raises:
        ConfigError: the name is unknown, or `device` cannot compute in that dtype.
    """
    if text == "auto":
        dtype = _own_dtype(checkpoint)
    elif text in DTYPES:
        dtype = DTYPES[text]
    else:
        raise ConfigError(f"unknown dtype {text!r}; choose one of: auto, {', '.join(DTYPES)}")
    device = torch.device(device)
    if not _computes(dtype, device):
        raise ConfigError(
            f"{device} cannot compute in {str(dtype).removeprefix('torch.')}; "
            "choose another dtype, for example float32"
        )
    return dtype


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    config = checkpoint.config
    dtype = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        name = next(iter(checkpoint.tensor_names()))
        dtype = checkpoint.tensor_dtype(name)
    if dtype not in DTYPES.values() and checkpoint.quantization():
        dtype = torch.bfloat16
    if dtype not in DTYPES.values():
        raise ConfigError(
            f"{checkpoint.name} is stored as {dtype}; choose one of: {', '.join(DTYPES)}"
        )
    return dtype


def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype is torch.bfloat16 and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        probe = torch.zeros(2, 2, dtype=dtype, device=device)
        (probe @ probe).sum().item()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
