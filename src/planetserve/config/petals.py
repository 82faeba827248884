"""Flags of Petals' commands that scripts and YAML files still pass, and what becomes of them.

What changes nothing that anybody would notice is accepted with a warning, what has another name or
spelling here is translated, and what would have to be a lie is refused with the way out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from planetserve.errors import ConfigError

logger = logging.getLogger(__name__)

_ONE_PROCESS = "one process serves all sessions"
_FULL = "a full server refuses at once and says when to retry"
_STAYS = "blocks are chosen when a server starts, and stay"
_NO_RELAY = "relays are never used; servers must be reachable"

IGNORED_FLAGS: Mapping[str, tuple[int | str, str]] = {
    "attn_cache_size": (1, "use --attn_cache_tokens"),
    "alloc_timeout": (1, _FULL),
    "max_alloc_timeout": (1, _FULL),
    "auto_relay": (0, _NO_RELAY),
    "no_auto_relay": (0, _NO_RELAY),
    "use_auto_relay": (0, _NO_RELAY),
    "use_relay": (0, _NO_RELAY),
    "no_relay": (0, _NO_RELAY),
    "num_handlers": (1, _ONE_PROCESS),
    "prefetch_batches": (1, _ONE_PROCESS),
    "sender_threads": (1, _ONE_PROCESS),
    "min_batch_size": (1, "batches form from whatever sessions are ready"),
    "max_chunk_size_bytes": (1, "--max_batch_size alone bounds a forward pass"),
    "compression": (1, "activations travel in --torch_dtype"),
    "increase_file_limit": (1, "the limit is raised to what the system allows"),
    "skip_reachability_check": (0, "there is none"),
    "balance_quality": (1, _STAYS),
    "mean_balance_check_period": (1, _STAYS),
    "stats_report_interval": (1, "there are no reports in the log"),
    "max_disk_space": (1, "only the shards of the served blocks are downloaded, and none removed"),
    "use_auth_token": (0, "the token that `hf auth login` saved is used anyway"),
    "link_bandwidth": (1, "use --network_mbps"),
}
"""Flags of Petals' server: number of values, and why there is no effect."""

_REFUSED_FLAGS: Mapping[str, tuple[int | str, str]] = {
    "adapters": (
        "*", "adapters are not served; merge one into its base model (peft: merge_and_unload()) "
        "and serve the folder that results",
    ),
    "custom_module_path": (1, "code is not loaded from files; leave the flag out"),
    "dht_client_mode": (0, "servers must be reachable; leave the flag out"),
    "client_mode": (0, "servers must be reachable; leave the flag out"),
    "use_ipfs": (0, "peers join through --initial_peers only"),
}  # fmt: skip

_TRANSLATED_FLAGS: Mapping[str, int | str] = {
    "converted_model_name_or_path": 1,
    "load_in_8bit": 1,
    "tensor_parallel_devices": "+",
}

OTHER_FLAGS: Mapping[str, int | str] = {
    **{name: num_values for name, (num_values, _) in _REFUSED_FLAGS.items()},
    **_TRANSLATED_FLAGS,
}
"""The other flags of Petals' server that are none here: number of values."""

DHT_FLAGS: Mapping[str, tuple[int | str, str]] = {
    "new_swarm": (0, "without --initial_peers a swarm of its own is started anyway"),
    "refresh_period": (1, "peers refresh what they know by themselves"),
    "no_relay": (0, "that is the default"),
    "use_auto_relay": (0, _NO_RELAY),
    "no_auto_relay": (0, _NO_RELAY),
}
"""Flags of Petals' run_dht that have no effect here."""

_DTYPES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16",
           "half": "float16"}  # fmt: skip


def translate(given: dict[str, object]) -> None:
    """Change settings as they are passed to Petals' server into those of ours, in place.

    Raises:
        ConfigError: one of them asks for something that there is not; says what to do.
    """
    for name in sorted(given.keys() & _REFUSED_FLAGS.keys()):
        if given.pop(name) not in (None, False, []):
            raise ConfigError(f"--{name}: {_REFUSED_FLAGS[name][1]}")
    other_name = given.pop("converted_model_name_or_path", None)
    if other_name is not None and given.setdefault("model", other_name) != other_name:
        raise ConfigError("MODEL and --converted_model_name_or_path exclude each other; give one")
    _take_8bit(given)
    _take_device(given)
    _take_spellings(given)
    ignore(given, IGNORED_FLAGS)


def ignore(given: dict[str, object], flags: Mapping[str, tuple[int | str, str]]) -> None:
    """Remove settings without effect, and say so."""
    for name in sorted(given.keys() & flags.keys()):
        del given[name]
        logger.warning("--%s has no effect: %s", name, flags[name][1])


def _take_8bit(given: dict[str, object]) -> None:
    wanted = given.pop("load_in_8bit", None)
    if str(wanted).lower() in ("true", "1", "yes"):
        if given.setdefault("quant_type", "int8") != "int8":
            raise ConfigError("--load_in_8bit and --quant_type exclude each other; give one")
        logger.warning("--load_in_8bit means --quant_type int8 now")
    elif wanted is not None and str(wanted).lower() not in ("false", "0", "no"):
        raise ConfigError(f"--load_in_8bit {wanted!r} is not true or false")


def _take_device(given: dict[str, object]) -> None:
    devices = given.pop("tensor_parallel_devices", None)
    devices = devices.split() if isinstance(devices, str) else devices
    if not devices:
        return
    if not isinstance(devices, list) or len(devices) > 1:
        raise ConfigError(
            "--tensor_parallel_devices: a server runs on one device; start one server for each, "
            "with --device"
        )
    if given.setdefault("device", devices[0]) != devices[0]:
        raise ConfigError("--tensor_parallel_devices and --device exclude each other; give one")
    logger.warning("--tensor_parallel_devices %s means --device %s now", devices[0], devices[0])


def _take_spellings(given: dict[str, object]) -> None:
    """Names of types in other spellings, and the words of --throughput."""
    for name in ("quant_type", "torch_dtype"):
        value = given.get(name)
        if isinstance(value, str):
            word = value.strip().lower().removeprefix("torch.")
            given[name] = _DTYPES.get(word, word)
        elif name == "quant_type" and name in given and value is None:
            given[name] = "none"  # YAML reads the word so
    throughput = given.get("throughput")
    if throughput == "eval":
        given["throughput"] = "auto"
        logger.warning("--throughput eval means auto, which measures at every start")
    elif throughput == "dry_run":
        raise ConfigError(
            "--throughput dry_run: nothing is measured apart from serving; start the server with "
            "--throughput auto and read the log"
        )
